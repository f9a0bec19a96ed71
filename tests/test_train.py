"""Training does what it says: schedule and optimizer, where each stage starts and what it trains, accumulation, log,
checkpoints, stops, resuming bit for bit, validation, the feature cache."""

import errno
import json
import math
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FEW_STEPS, ROOT, TINY, copy_of, random_batch, small_model, stage2_model
from safetensors.torch import load_file, save_file
from samples import caption_file, question_file

import losses
import train
from blip2 import Blip2
from config import TrainConfig
from data import collate_lm
from engine import checkpoint, stop
from engine.checkpoint import save_checkpoint
from engine.errors import UserError, run_command
from engine.log import memory_estimate, model_summary
from model import Blip2Model
from recipes import RECIPES
from sources import shapes
from sources.mixture import Mixture, open_images
from sources.shapes import ShapesWorld
from tasks import validation
from tasks.features import CachedTokens, cache_tokens
from train import build_optimizer, hardness_at, lr_at, set_lr
from vit import SIGLIP, ViT, ViTConfig
from weights.configs import SIGLIP_FIELDS, write_fields
from weights.load import unload
from weights.runs import Source
from weights.tables import CLIP

STAGE1 = "--vit assets/tiny/vit --bert assets/tiny/bert --batch 4 --queries 4 --eval-every 0 --precision fp32"
STAGE2 = "--stage 2 --batch 4 --eval-every 0 --precision fp32"
CAPTIONS = ["a small red circle above a large blue square", "a small green cross", "three shapes", "a white star"]


@pytest.fixture
def run_train(monkeypatch):
    """run_train(folder, "--flags of a run", ...) -> the steps in its log. The evaluation at the end is left out."""
    monkeypatch.setattr(train, "final_evaluation", lambda *_: None)

    def run(out: Path, *flags: str | Path) -> list[dict]:
        words = [word for flag in flags for word in (flag.split() if isinstance(flag, str) else [str(flag)])]
        with stop.signals(), suppress(stop.Stopped):
            train.main([*words, "--out", str(out)])
        return [row for row in log_of(out) if "loss" in row]

    return run


def siglip_folder(folder: Path) -> Path:
    """A small random SigLIP of two blocks over 8 x 8 patches, as a hub serves it without the text side."""
    vit = ViT(ViTConfig(24, depth=3, heads=2, mlp=40, patch_size=8, image_size=64, act="gelu_pytorch_tanh", **SIGLIP))
    folder.mkdir()
    save_file(unload(vit, CLIP), folder / "model.safetensors")
    config = {"model_type": "siglip_vision_model", **write_fields(SIGLIP_FIELDS, vit.cfg)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def few_images(monkeypatch):
    """A few of the shapes world's images to validate on and to test on."""
    monkeypatch.setitem(shapes.SPLITS, "val", 20)
    monkeypatch.setitem(shapes.SPLITS, "test", 16)
    for subset in shapes.TEST_SUBSETS:
        monkeypatch.setitem(shapes.TEST_SUBSETS, subset, 4)


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def in_step(monkeypatch, number: int, action) -> list[float]:
    """Call action() in the number-th step from here on; returns the learning rates of the steps, as they come."""
    rates = []

    def set_lr_and_act(optimizer, lr):
        set_lr(optimizer, lr)
        rates.append(lr)
        if len(rates) == number:
            action()

    monkeypatch.setattr(train, "set_lr", set_lr_and_act)
    return rates


def die():
    raise KeyboardInterrupt


def retrieval_result(score: float) -> dict:
    """A result of the retrieval task; all recalls are `score`."""
    recalls = {way: dict.fromkeys(("R@1", "R@5", "R@10"), score) for way in ("image_to_text", "text_to_image")}
    numbers = dict.fromkeys(("chance", "shuffled images", "itc", "reranked"), recalls)
    rest = {"images": 1, "texts": 1, "k": 1, "subsets": {}, "best": [], "mistakes": [], "seconds": 0}
    return {"task": "retrieval"} | rest | numbers


# --- schedule and optimizer ------------------------------------------------------------------------------------------


def test_learning_rate_at_some_steps():
    """Linear from 0 to the peak, then a cosine to the minimal rate at the last step."""
    cfg = TrainConfig(steps=1000, lr=1e-4, min_lr=1e-5, warmup=100)
    assert lr_at(1, cfg) == pytest.approx(1e-6) and lr_at(50, cfg) == pytest.approx(5e-5)
    assert lr_at(100, cfg) == pytest.approx(1e-4) and lr_at(1000, cfg) == pytest.approx(1e-5)
    assert lr_at(550, cfg) == pytest.approx(5.5e-5)
    assert lr_at(325, cfg) == pytest.approx(1e-5 + 9e-5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_at(1, TrainConfig(steps=1, lr=1e-3, min_lr=0.0, warmup=0)) == 0.0


def test_negatives_become_hard_along_the_ramp(monkeypatch):
    """From any other image to ITC's choice; the paper has no ramp, its negatives are hard from the first step."""
    ramp = TrainConfig(negatives_ramp=200)
    assert [hardness_at(step, ramp) for step in (0, 50, 200, 999)] == [0.0, 0.25, 1.0, 1.0]
    assert hardness_at(1, TrainConfig(negatives_ramp=RECIPES["stage 1, paper, ViT-g"]["negatives_ramp"])) == 1.0
    seen, sample = [], losses.sample_hard_negatives
    monkeypatch.setattr(losses, "sample_hard_negatives", lambda sim, *rest: seen.append(sim) or sample(sim, *rest))
    for hardness in (1.0, 0.25, 0.0):
        small_model().stage1_losses(random_batch(4), hardness=hardness)
    torch.testing.assert_close(seen[2], seen[0] / 4)
    assert seen[4].eq(0).all() and not seen[0].eq(0).any()


def test_weight_decay_is_on_matrices_and_tables_never_on_the_temperature():
    model = small_model()
    groups = build_optimizer(model, TrainConfig(lr=1e-4, beta2=0.98, weight_decay=0.05)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in groups)
    assert groups[0]["weight_decay"] == 0.05 and groups[1]["weight_decay"] == 0
    assert {"qformer.queries", "qformer.word_embedding.weight", "itm_head.weight"} <= decayed
    assert {"temperature", "ln_vision.weight", "itm_head.bias", "qformer.lm_head.bias"} <= spared
    assert not any(name.startswith("vit.") for name in decayed | spared)
    assert len(decayed | spared) == sum(not name.startswith("vit.") for name in names.values())


def test_a_trained_vit_learns_slower_block_by_block_and_what_starts_as_bert_by_its_share():
    """AdamW's first step moves every weight by its learning rate, so the decay can be read from the weights."""
    model = small_model()
    model.unfreeze_vit()
    cfg = TrainConfig(lr=1e-3, beta2=0.999, weight_decay=0.0, vit_lr_decay=0.5, bert_lr=0.2)
    optimizer = build_optimizer(model.train(), cfg)
    before = {name: p.clone() for name, p in model.named_parameters()}
    sum(model.stage1_losses(random_batch(6)).values()).backward()
    set_lr(optimizer, cfg.lr)
    optimizer.step()
    scales = {"vit.blocks.1.fc1.weight": 0.5, "vit.blocks.0.fc1.weight": 0.25, "vit.pos_embed": 0.125}
    new = ("queries", "blocks.0.cross.q.weight", "blocks.0.cross.ln.weight")
    old = ("embedding_ln.weight", "blocks.0.attn.qkv.weight", "blocks.1.ffn_query.up.weight", "lm_head.dense.weight")
    scales |= {f"qformer.{name}": 1 for name in new} | {f"qformer.{name}": 0.2 for name in old} | {"itm_head.weight": 1}
    for name, scale in scales.items():
        moved = (model.get_parameter(name) - before[name]).abs().median().item()
        assert moved == pytest.approx(1e-3 * scale, rel=1e-2), name


def test_gradients_are_clipped_before_the_step(tmp_path, run_train):
    """The log has the norm before clipping. AdamW's first step forgets the scale, so its moments are looked at."""
    (row,) = run_train(tmp_path / "run", STAGE1, "--steps 1 --clip 0.01")
    state = torch.load(tmp_path / "run/train_state.pt", weights_only=True)["optimizer"]["state"]
    first = torch.stack([moments["exp_avg"].norm() for moments in state.values()]).norm()
    assert row["norm"] > 1 and first.item() == pytest.approx(0.1 * 0.01, rel=1e-3)  # (1 - beta1) * the clipped norm


def test_the_temperature_is_kept_within_its_bounds(tmp_path, run_train, monkeypatch):
    monkeypatch.setattr(train, "TEMPERATURES", (0.2, 0.5))
    assert run_train(tmp_path, STAGE1, "--steps 2")[-1]["temperature"] == pytest.approx(0.2, abs=1e-3)


# --- where each stage starts, and what it trains ---------------------------------------------------------------------


def test_without_itg_its_head_is_not_trained_and_the_run_writes_no_captions(tmp_path, run_train):
    """The ablation of the paper's Table 6."""
    log = run_train(tmp_path / "run", STAGE1, "--losses itc,itm --steps 2")
    assert set(log[0]) & {"itc", "itm", "itg"} == {"itc", "itm"}
    torch.manual_seed(0)
    fresh, _ = Blip2.build(TINY[1], TINY[3], 64, 64, num_queries=4)
    trained = Blip2.from_pretrained(tmp_path / "run")
    assert torch.equal(trained.qformer.lm_head.dense.weight, fresh.qformer.lm_head.dense.weight)
    assert not torch.equal(trained.itm_head.weight, fresh.itm_head.weight)
    assert trained.untrained_heads == ("itg",)
    with pytest.raises(UserError, match="is not trained here, as in runs of other --losses"):
        trained.caption("assets/tiny/picture.png")


def test_stage_2_learns_and_leaves_what_is_frozen_alone():
    model = stage2_model("opt").train()
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    batch = collate_lm(model.llm_tokenizer, [("", text) for text in CAPTIONS], [], list(range(4)), images=images)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.stage2_losses(batch)["lm"]
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.7 * found[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_stage_2_keeps_the_text_branch_and_the_heads_of_stage_1_as_they_were(stage1_run, stage2_run):
    before, after = weights_of(stage1_run), weights_of(stage2_run)
    assert before.keys() < after.keys() and not any(name.startswith(("vit.", "llm.")) for name in after)
    kept = ("qformer.word_embedding", "qformer.position", "qformer.lm_head", "vision_proj", "text_proj", "itm_head")
    for name in before:
        is_kept = ".ffn_text." in name or name.startswith((*kept, "temperature"))
        assert torch.equal(before[name], after[name]) == is_kept, name


def test_stage_2_without_stage_1_starts_from_bert(tmp_path, run_train):
    """The ablation of the paper's Figure 5."""
    run_train(tmp_path, STAGE2, "--init none --steps 1 --lr 1e-9")
    torch.manual_seed(0)
    fresh, _ = Blip2.build(TINY[1], TINY[3], 64, 64, num_queries=8)
    name = "qformer.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(weights_of(tmp_path)[name], fresh.get_parameter(name).detach(), rtol=0, atol=1e-6)


def test_stage_2_over_the_same_language_model_keeps_its_projection(tmp_path, run_train, stage2_run, capsys):
    """However its folder is spelled."""
    run_train(tmp_path, STAGE2, "--llm ./assets/tiny/opt/ --steps 1 --lr 1e-9 --init", stage2_run)
    assert "the projection to it is new" not in capsys.readouterr().out
    one, two = (weights_of(run)["llm_proj.weight"] for run in (stage2_run, tmp_path))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_stage_2_over_another_language_model_writes_a_run_that_opens_and_resumes(
    tmp_path, run_train, stage2_run, capsys
):
    """With a new projection, and the hash of the new language model."""
    log = run_train(tmp_path, STAGE2, "--llm assets/tiny/t5 --steps 2 --save-every 1 --keep 2 --init", stage2_run)
    assert "the projection to it is new" in capsys.readouterr().out
    assert Path(Blip2.from_pretrained(tmp_path).sources["llm"].spec) == ROOT / "assets/tiny/t5"
    shutil.rmtree(tmp_path / "step-000002")
    assert [row["lm"] for row in run_train(tmp_path, "--resume")] == [row["lm"] for row in log]


def test_stage_2_after_fine_tuning_for_captions_has_no_prompt(tmp_path, run_train, stage2_run):
    """It is trained without one, so its captions have to begin without one."""
    short = "--batch 4 --steps 1 --eval-every 0 --precision fp32 --init"
    run_train(tmp_path / "caption", "--stage caption", short, stage2_run, "--prompt", Path("a photo of"))
    assert Blip2.from_pretrained(tmp_path / "caption").prompt == "a photo of"
    run_train(tmp_path / "stage2", "--stage 2", short, tmp_path / "caption")
    assert Blip2.from_pretrained(tmp_path / "stage2").prompt == ""


@pytest.mark.parametrize("stage", ["caption", "vqa", "retrieval"])
def test_a_fine_tuned_run_holds_its_vit_at_its_resolution_and_opens_alone(
    tmp_path, run_train, stage, stage1_run, stage2_run, capsys
):
    before = stage1_run if stage == "retrieval" else stage2_run
    flags = f"--stage {stage} --batch 4 --steps 2 --warmup 0 --lr 1e-3 --image-size 48 --eval-every 0 --precision fp32"
    run_train(tmp_path / "run", flags, "--init", before)
    said = capsys.readouterr().out
    assert "peak learning rate 1.0e-03; in the ViT, from below: 2.6e-04, 3.3e-04, " in said
    assert "ViT (frozen)" not in said
    state = weights_of(tmp_path / "run")
    assert "vit.blocks.0.fc1.weight" in state and not any(name.startswith("vit.") for name in weights_of(before))
    assert state["vit.pos_embed"].shape[1] == 1 + 6 * 6  # 48 pixels, patches of 8

    model = Blip2.from_pretrained(tmp_path / "run")
    assert model.image_size == 48 and model.holds_vit and not model.vit_is_trained
    assert torch.equal(model.vit.pos_embed, state["vit.pos_embed"]) and model.conditioned == (stage == "vqa")
    image = ShapesWorld("train").image(0)
    if stage == "vqa":
        assert isinstance(model.ask(image, "how many shapes are there?"), str)
    other = Blip2.from_pretrained(tmp_path / "run", image_size=64)  # at another size, its positions are resized
    assert other.encode_image(image).tokens.shape[1] == 1 + 8 * 8
    without = {name: tensor for name, tensor in state.items() if not name.startswith("vit.blocks.1.")}
    save_file(without, tmp_path / "run/model.safetensors")
    with pytest.raises(UserError, match="missing: no source for vit.blocks.1."):
        Blip2.from_pretrained(tmp_path / "run")


def test_freeze_vit_leaves_it_alone_and_out_of_the_checkpoint(tmp_path, run_train, stage2_run):
    flags = "--stage vqa --freeze-vit --no-condition --batch 4 --steps 1 --eval-every 0 --precision fp32 --init"
    run_train(tmp_path, flags, stage2_run)
    assert not any(name.startswith("vit.") for name in weights_of(tmp_path))
    model = Blip2.from_pretrained(tmp_path)
    assert not model.holds_vit and not model.conditioned


# --- the steps of a run ----------------------------------------------------------------------------------------------


def test_every_step_is_in_the_log_with_the_true_means(tmp_path, run_train):
    """One line a step whatever --log-every says; accumulated micro-batches are averaged over all their tokens, and
    share no negatives."""
    flags = [STAGE1, "--batch 8 --steps 3 --log-every 2 --losses itc,itg"]
    whole = run_train(tmp_path / "whole", *flags)
    parts = run_train(tmp_path / "parts", *flags, "--micro-batch 2")
    assert [row["step"] for row in whole] == [1, 2, 3]
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(a["itc"] + a["itg"])
        assert b["itg"] == pytest.approx(a["itg"], rel=0.03 * a["step"])
        assert b["itc"] < a["itc"] - 0.5  # two candidates against eight
    assert parts[0]["itg"] == pytest.approx(whole[0]["itg"], rel=1e-4)


def test_gradcache_trains_like_the_whole_batch(tmp_path, run_train, capsys):
    """Losses, negatives, gradient norms and temperature; accumulation alone has an easier ITC."""
    flags = [STAGE1, "--batch 8 --steps 2 --lr 1e-3 --warmup 1 --negatives-ramp 2"]
    whole = run_train(tmp_path / "whole", *flags)
    capsys.readouterr()
    alone = run_train(tmp_path / "alone", *flags, "--micro-batch 2")
    assert "ITC: 1 positive + 1 negatives per image; accumulation adds none" in capsys.readouterr().out
    parts = run_train(tmp_path / "parts", *flags, "--micro-batch 2 --gradcache")
    assert "ITC: 1 positive + 7 negatives per image\n" in capsys.readouterr().out
    for a, b in zip(whole, parts, strict=True):
        for key in ("itc", "itm", "itg", "norm", "temperature"):
            assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)
    assert all(a["itc"] < b["itc"] - 0.5 for a, b in zip(alone, whole, strict=True))


def test_accumulated_micro_batches_of_stage_2_are_the_big_batch(tmp_path, run_train, stage1_run):
    """Every token counts the same, whichever micro-batch it is in; and blocks that are recomputed change nothing."""
    flags = [STAGE2, "--steps 3 --init", stage1_run]
    whole, parts, again = (
        [row["lm"] for row in run_train(tmp_path / (more or "whole"), *flags, more)]
        for more in ("", "--micro-batch 2", "--grad-checkpointing")
    )
    assert parts == pytest.approx(whole, rel=1e-4)
    assert again == pytest.approx(whole, rel=1e-5)


def test_held_out_images_are_not_trained_on_and_negatives_are_drawn_anew(tmp_path, monkeypatch, run_train):
    trained, validated, draws, stage1_losses = set(), set(), [], Blip2Model.stage1_losses

    def spy(model, batch, generator, **rest):
        trained.update(batch.image_ids.tolist())
        draws.append(generator.initial_seed())
        return stage1_losses(model, batch, generator=generator, **rest)

    def spy_on_validation(model, images, *_, **__):
        validated.update(images.image_id(row) for row in range(len(images)))
        return retrieval_result(0.0)

    monkeypatch.setattr(Blip2Model, "stage1_losses", spy)
    monkeypatch.setattr(validation, "evaluate", spy_on_validation)
    flags = "--image-size 64 --embed-dim 8 --val-photos 4 --steps 4 --eval-every 4 --micro-batch 2 --workers 0 --data"
    run_train(tmp_path / "run", STAGE1, flags, Path(caption_file(tmp_path, 20)))
    assert len(validated) == 4 and len(trained) == 16 and not trained & validated
    assert len(set(draws)) == len(draws) == 8  # 4 steps of 2 micro-batches


def test_a_loss_that_is_not_finite_stops_the_run_and_names_it(tmp_path, run_train):
    with pytest.raises(UserError, match="the it. loss became (nan|inf) at step [23], .* lower --lr"):
        run_train(tmp_path, STAGE1, "--steps 3 --lr 1e30 --warmup 0 --clip 1e30")


# --- what is printed -------------------------------------------------------------------------------------------------


def test_the_summary_counts_what_is_trained():
    model = small_model()
    lines = model_summary(model).splitlines()
    assert lines[1].startswith("ViT (frozen)") and lines[1].split()[-2:] == ["0", "float32"]
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= only) for only in (False, True))
    assert lines[-1].split()[:3] == ["all", f"{total:,}", f"{trained:,}"]
    model.unfreeze_vit()
    lines = model_summary(model).splitlines()
    assert lines[1].startswith("ViT  ") and lines[-1].split()[:3] == ["all", f"{total:,}", f"{total:,}"]


def test_the_memory_estimate_counts_weights_exactly_and_grows_with_the_batch():
    model = small_model()
    one, two = (memory_estimate(model, count, ("itc", "itm", "itg")) for count in (1, 2))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert one["weights"] == 4 * trained and one["gradients + AdamW"] == 12 * trained
    assert two["activations"] == 2 * one["activations"]


# --- checkpoints -----------------------------------------------------------------------------------------------------

WHOLE = {"config.json", "model.safetensors", "tokenizer.json", "train_state.pt", "SHA256SUMS"}


def test_checkpoints_are_whole_and_only_the_last_are_kept(tmp_path, run_train, stage1_run):
    run_train(tmp_path, STAGE1, "--steps 3 --save-every 1 --keep 2")
    assert {path.name for path in tmp_path.iterdir()} == WHOLE | {"log.jsonl", "step-000002", "step-000003"}
    assert {path.name for path in (tmp_path / "step-000002").iterdir()} == WHOLE
    for folder in (tmp_path, tmp_path / "step-000003"):
        Blip2.from_pretrained(folder)
    assert os.path.samefile(tmp_path / "model.safetensors", tmp_path / "step-000003/model.safetensors")
    assert {path.name for path in stage1_run.iterdir()} == WHOLE | {
        "log.jsonl", "step-000004", "retrieval.json", "samples.json", "report.html",
    }  # fmt: skip


def test_a_checkpoint_that_could_not_be_finished_changes_nothing(tmp_path, monkeypatch, stage1_run):
    run = copy_of(stage1_run, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def disk_full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    model, cfg = Blip2.from_pretrained(run), TrainConfig(lr=1.0, beta2=0.9, weight_decay=0.0, vit_lr_decay=1.0)
    monkeypatch.setattr(checkpoint.torch, "save", disk_full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device, .* needed, .* free\)"):
        save_checkpoint(run, 6, model, build_optimizer(model, cfg), {}, cfg, is_best=True)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sorted(run.glob("step-*")) == [run / "step-000004"]


def test_an_existing_run_is_not_overwritten_by_accident(tmp_path, run_train, stage1_run):
    """Nor by a command that asks for it and is then refused for something else."""
    run = copy_of(stage1_run, tmp_path)
    with pytest.raises(UserError, match="holds a run: pass --resume to continue it, --out to start another, or --over"):
        run_train(run, STAGE1)
    for wrong in ("--steps 0", "--data nowhere.json", "--vit nowhere", "--precision int8", "--batch 99999"):
        with pytest.raises(UserError):
            run_train(run, STAGE1, "--overwrite", wrong)
    assert (run / "model.safetensors").read_bytes() == (stage1_run / "model.safetensors").read_bytes()
    assert len(run_train(run, STAGE1, "--overwrite --steps 2 --keep 2 --save-every 2")) == 2
    assert [path.name for path in run.glob("step-*")] == ["step-000002"]


# --- stops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_end_the_run_after_the_step_with_a_checkpoint(tmp_path, monkeypatch, run_train, capsys, name):
    """However many there are; the exit status says which was the first."""
    number, handler = getattr(signal, name), signal.getsignal(getattr(signal, name))

    def ask():
        for each in (number, number, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(each)

    in_step(monkeypatch, 2, ask)
    flags = [*STAGE1.split(), "--steps", "4", "--out", str(tmp_path)]
    assert run_command(lambda: train.main(flags)) == 128 + number
    said = f"stopped: step 2 is saved; continue with: python train.py --resume --out {tmp_path}\n"
    assert capsys.readouterr().err.endswith(said) and signal.getsignal(number) == handler
    assert [row["step"] for row in log_of(tmp_path) if "loss" in row] == [1, 2]
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000002"]
    assert [row["step"] for row in run_train(tmp_path, "--resume")] == [1, 2, 3, 4]


def test_only_a_second_ctrl_c_that_a_person_types_later_ends_the_step_and_never_a_write(monkeypatch):
    now, typed = [100.0], [True]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: typed[0]))
    with stop.signals():
        stop.be_patient()
        for number in (signal.SIGINT, signal.SIGINT):  # within a second
            signal.raise_signal(number)
        now[0], typed[0] = 105.0, False
        signal.raise_signal(signal.SIGINT)  # of a batch system
        signal.raise_signal(signal.SIGTERM)
        typed[0], written = True, []
        with pytest.raises(stop.Stopped), stop.uninterrupted():
            signal.raise_signal(signal.SIGINT)
            written.append(True)
        assert written
        with pytest.raises(stop.Stopped):
            signal.raise_signal(signal.SIGINT)


def test_before_the_steps_a_signal_ends_the_command_at_once_and_once():
    """What cleans up after it is not disturbed by a second one; a signal that the shell ignores stays ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.signals():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(stop.Stopped):
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("stopped_at", [2, 4])
def test_a_validation_that_a_stop_has_prevented_is_made_up_for(stopped_at, tmp_path, monkeypatch, run_train):
    """A stop in a step that is to be validated, the last one too: the run that continues has all validations of one
    that was never stopped, and the same best model."""
    rates = in_step(monkeypatch, stopped_at, lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(validation, "evaluate", lambda *_, **__: retrieval_result(len(rates)))  # better each time
    run_train(tmp_path, STAGE1, "--steps 4 --eval-every 2 --save-every 2")
    assert len(rates) == stopped_at
    run_train(tmp_path, "--resume")
    assert [row["step"] for row in log_of(tmp_path) if "validation" in row] == [2, 4]
    assert json.loads((tmp_path / "best/config.json").read_text())["step"] == 4


# --- resume ----------------------------------------------------------------------------------------------------------


def assert_same_run(one: Path, two: Path) -> None:
    """Bit for bit: the numbers of every step, and all weights."""
    logs = [[row for row in log_of(run) if "loss" in row] for run in (one, two)]
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4]
    for a, b in zip(*logs, strict=True):
        for key in a.keys() - {"images_per_s", "waited", "gigabytes", "trained_s"}:
            assert a[key] == b[key], (a["step"], key)
    a, b = weights_of(one), weights_of(two)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_stage_1_resumes_bit_for_bit(tmp_path, run_train):
    """With dropout and GradCache; after the checkpoint of the second step, beside a copy of it and with a line of the
    log cut off."""
    flags = "--steps 4 --save-every 2 --keep 2 --dropout 0.1 --micro-batch 2 --gradcache"
    run_train(tmp_path / "straight", STAGE1, flags)
    broken = Path(shutil.copytree(tmp_path / "straight", tmp_path / "broken"))
    shutil.rmtree(broken / "step-000004")
    shutil.copytree(broken / "step-000002", broken / "step-000002.bak")
    log = broken / "log.jsonl"
    log.write_text(log.read_text()[:-20])
    run_train(broken, "--resume")
    assert_same_run(tmp_path / "straight", broken)
    assert (broken / "step-000002.bak").exists()


def test_stage_2_resumes_bit_for_bit_without_the_run_it_started_from(
    tmp_path, monkeypatch, run_train, stage1_run, stage2_run
):
    init = copy_of(stage1_run, tmp_path)
    in_step(monkeypatch, 3, die)
    with pytest.raises(KeyboardInterrupt):
        run_train(tmp_path, " ".join(FEW_STEPS), "--stage 2 --init", init)
    shutil.rmtree(init)
    run_train(tmp_path, "--resume")
    assert_same_run(stage2_run, tmp_path)


def test_vqa_resumes_bit_for_bit(tmp_path, monkeypatch, run_train, stage2_run, vqa_run):
    """With the ViT trained, which the checkpoint holds."""
    in_step(monkeypatch, 3, die)
    with pytest.raises(KeyboardInterrupt):
        run_train(tmp_path, " ".join(FEW_STEPS), "--stage vqa --init", stage2_run)
    run_train(tmp_path, "--resume")
    assert_same_run(vqa_run, tmp_path)


def test_a_run_is_not_resumed_over_another_encoder(tmp_path, run_train):
    """Its files may have changed under the same name."""
    vit = Path(shutil.copytree(ROOT / "assets/tiny/vit", tmp_path / "vit"))
    run_train(tmp_path / "run", STAGE1, "--steps 1 --vit", vit)
    tensors = load_file(vit / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, vit / "model.safetensors")
    with pytest.raises(UserError, match="has other weights than the run was trained over: put the old ones back"):
        run_train(tmp_path / "run", "--resume")


def test_a_run_resumes_where_its_data_its_parts_and_the_user_have_moved(tmp_path, run_train, monkeypatch):
    """--data says where they are now; other records are refused. Parts are found beside the run, from any folder."""
    (tmp_path / "old").mkdir()
    data = caption_file(tmp_path / "old", 8)
    shutil.copytree(ROOT / "assets/tiny/vit", tmp_path / "old/vit")
    run = tmp_path / "old/run"
    short = "--steps 2 --save-every 1 --keep 2 --image-size 64 --vit"
    run_train(run, STAGE1, short, tmp_path / "old/vit", "--data", data)
    shutil.rmtree(run / "step-000002")
    os.rename(tmp_path / "old", tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    run, data = tmp_path / "new/run", data.replace("/old/", "/new/")
    with pytest.raises(UserError, match="does not exist"):
        run_train(run, "--resume")
    records = json.loads(Path(data).read_text())
    Path(data).write_text(json.dumps(records[::-1]))
    with pytest.raises(
        UserError, match="--resume: the records of --data and the images of --data differ from before: put"
    ):
        run_train(run, "--resume --data", data)
    Path(data).write_text(json.dumps(records))
    assert [row["step"] for row in run_train(run, "--resume --data", data)] == [1, 2]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and pytest -m cuda")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_on_a_gpu_resumes_with_its_dropout_and_loss_scale(tmp_path, run_train, precision):
    """Not bit for bit: the backward passes of some kernels are not deterministic there."""
    flags = f"--steps 4 --save-every 2 --keep 2 --dropout 0.1 --device cuda --workers 0 --precision {precision}"
    straight = run_train(tmp_path, STAGE1, flags)
    states = [torch.load(tmp_path / f"step-00000{n}/train_state.pt", weights_only=True) for n in (2, 4)]
    shutil.rmtree(tmp_path / "step-000004")
    resumed = run_train(tmp_path, "--resume")
    for key in ("itc", "itm", "itg"):
        assert [row[key] for row in resumed] == pytest.approx([row[key] for row in straight], rel=0.02), key
    again = torch.load(tmp_path / "step-000004/train_state.pt", weights_only=True)
    assert "cuda" in again["rng"][0] and torch.equal(again["rng"][0]["cuda"], states[1]["rng"][0]["cuda"])
    assert again["scaler"] == states[1]["scaler"] and bool(again["scaler"]) == (precision == "fp16")


# --- validation ------------------------------------------------------------------------------------------------------


def test_the_best_model_in_validation_is_kept_and_evaluated_at_the_end(tmp_path, monkeypatch, few_images):
    scores, final = iter([10.0, 30.0, 20.0]), {}

    def evaluate(model, *_, quick=False):
        final.update(model.state_dict())
        return retrieval_result(next(scores) if quick else 0.0)

    monkeypatch.setattr(validation, "evaluate", evaluate)
    flags = "--steps 3 --eval-every 1 --save-every 1 --keep 3"
    train.main([*STAGE1.split(), *flags.split(), "--out", str(tmp_path)])
    best = (tmp_path / "best/model.safetensors").read_bytes()
    assert best == (tmp_path / "step-000002/model.safetensors").read_bytes()
    assert best != (tmp_path / "model.safetensors").read_bytes()
    kept = weights_of(tmp_path / "best")
    assert all(torch.equal(final[name], kept[name]) for name in kept)
    assert [row["mean_recall"] for row in log_of(tmp_path) if "validation" in row] == [10.0, 30.0, 20.0]


def test_what_happens_to_a_validation_costs_nothing(tmp_path, monkeypatch, run_train):
    """The checkpoint of its step is there before it."""

    def fails(*_, **__):
        raise UserError("evaluation needs every image")

    monkeypatch.setattr(validation, "evaluate", fails)
    with pytest.raises(UserError, match="evaluation needs every image"):
        run_train(tmp_path, STAGE1, "--steps 4 --eval-every 2 --save-every 2")
    assert (tmp_path / "step-000002/model.safetensors").exists()


@pytest.mark.parametrize("objectives", ["itc", "itc,itm"])
def test_a_run_without_itg_is_validated_without_captions(tmp_path, capsys, few_images, objectives):
    """And finishes with its evaluation, which re-ranks only if ITM is trained."""
    flags = [*STAGE1.split(), "--steps", "2", "--eval-every", "1", "--losses", objectives]
    result = train.main([*flags, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.count("R@1 by ITC: image-to-text ") == 2 and 'reference: "' not in said
    assert ("reranked" in result) == ("itm" in objectives)
    assert json.loads((tmp_path / "retrieval.json").read_text())["itc"] == result["itc"]


def test_each_number_of_a_validation_stands_beside_that_of_chance():
    """In short lines."""
    caption, model = {"correct captions": 5.0, "correct captions of shuffled images": 0.5}, small_model(0)
    model.untrained_heads = ("itg",)
    accuracies = {"the image": {"all": 93.0}, "the majority answer": {"all": 26.6}}
    for result, lines in [
        (
            retrieval_result(40.0) | {"chance": retrieval_result(2.0)["chance"]},
            [
                "validation at step 500: mean recall 40.0 % (chance 2.0 %), the best so far (0 s)",
                "  R@1 by ITC: image-to-text 40.0 %, text-to-image 40.0 % (chance 2.0 %)",
                "  R@1 by ITM: image-to-text 40.0 %, text-to-image 40.0 % (chance 2.0 %)",
            ],
        ),
        (
            retrieval_result(40.0) | {"itm": retrieval_result(30.0)["itc"], "rerank": "posterior"},
            [
                "validation at step 500: mean recall 40.0 % (chance 40.0 %), the best so far (0 s)",
                "  R@1 by ITC: image-to-text 40.0 %, text-to-image 40.0 % (chance 40.0 %)",
                "  R@1 by ITM: image-to-text 30.0 %, text-to-image 30.0 % (chance 40.0 %)",
                "  R@1 by ITM+ITC: image-to-text 40.0 %, text-to-image 40.0 % (chance 40.0 %)",
            ],
        ),
        (
            {"task": "vqa", "accuracy": 41.0, "majority answer": "2", "accuracy of the majority answer": 26.6},
            ['validation at step 500: accuracy 41.0 % (always "2": 26.6 %), the best so far (0 s)'],
        ),
        (
            {"task": "captions", "CIDEr": 36.0, "shuffled images": {"CIDEr": 7.3}},
            ["validation at step 500: CIDEr 36.0 (shuffled images: 7.3), the best so far (0 s)"],
        ),
        (
            {"task": "answers", "accuracy": accuracies} | caption,
            [
                "validation at step 500: accuracy 93.0 % (majority answers: 26.6 %), the best so far (0 s)",
                "  correct captions 5.0 % (shuffled images: 0.5 %)",
            ],
        ),
        (
            {"task": "shapes captions"} | caption,
            ["validation at step 500: correct captions 5.0 % (shuffled images: 0.5 %), the best so far (0 s)"],
        ),
    ]:
        said = validation.validation_lines(model, None, result | {"seconds": 0}, 500, True)
        assert said.split("\n") == lines and max(map(len, lines)) < 100


def test_a_run_that_overfits_says_what_helps_also_after_a_resume(tmp_path, monkeypatch, capsys, run_train):
    """At the third validation in a row below the best, and the sixth."""
    scores = iter([10.0, 30.0, 20.0, 25.0, 30.0, 5.0, 5.0, 5.0, 31.0])
    monkeypatch.setattr(validation, "evaluate", lambda *_, **__: retrieval_result(next(scores)))
    monkeypatch.setattr(validation, "validation_lines", lambda *_: "")
    said = []
    for flags in (f"{STAGE1} --steps 9 --eval-every 1 --save-every 1 --dropout 0.1", "--resume"):
        in_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        run_train(tmp_path, flags)
        said.append(capsys.readouterr().out)
    warnings = [line for line in "".join(said).splitlines() if "has not improved" in line]
    assert warnings == [
        f"validation has not improved for {count} times since step 2: the model overfits" for count in (3, 6)
    ]
    assert "has not improved for 3" in said[0] + said[1] and "has not improved for 6" in said[1]
    helps = "  best/ keeps the best one. What helps: more images, fewer --steps\n"
    assert "".join(said).count(helps) == 2  # there is dropout, and no cache


@pytest.mark.parametrize(("count", "evaluated"), [(0, 16), (5, 6), (6, 6), (100, 16)])
def test_the_final_evaluation_may_take_the_first_images_and_no_half_of_twins(
    tmp_path, monkeypatch, few_images, count, evaluated
):
    seen = []

    def evaluate(model, images, *_, quick):
        seen.append(images.rows(range(len(images))).tolist())
        return retrieval_result(1.0)

    monkeypatch.setattr(validation, "evaluate", evaluate)
    cfg = SimpleNamespace(data=["shapes"], image_size=64, stage="1", test_images=count, val_photos=0)
    run = Path("assets/tiny/blip2")
    monkeypatch.setattr(validation, "write_result", lambda *_: None)
    validation.final_evaluation(Blip2.from_pretrained(run), None, cfg, ("itc",), 0, run)
    assert seen == [list(range(evaluated))]


def test_a_validation_shows_two_captions_with_their_references(tmp_path, run_train, capsys, few_images):
    run_train(tmp_path, STAGE1, "--steps 1 --eval-every 1")
    said = capsys.readouterr().out
    for index in (0, 10):
        assert f'  shapes val {index}: "' in said and f'reference: "{ShapesWorld("val").captions(index)[0]}"' in said


def test_a_validation_asks_the_questions_of_a_file(tmp_path, capsys):
    """And shows two of them; the best of the run is what answers best."""
    data = question_file(tmp_path, 8)
    flags = "--stage vqa --init assets/tiny/blip2 --steps 1 --batch 4 --eval-every 1 --image-size 64 --workers 0"
    train.main([*flags.split(), "--data", data, "--val-data", data, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    asked = json.loads(Path(data).read_text())
    assert f'0.png: {asked[0]["question"]} "' in said and f'; reference: "{asked[0]["answer"][0]}"' in said
    assert "accuracy" in said and "the best so far" in said and (tmp_path / "run/best/model.safetensors").exists()
    result = json.loads((tmp_path / "run/answers.json").read_text())
    assert result["metric"] == "vqa" and result["questions"] == len(asked) and "seconds" not in result
    assert result["data"]["files"] == [data]


@pytest.mark.parametrize("stage", ["2", "caption"])
def test_shapes_beside_a_file_are_validated_by_their_captions(tmp_path, few_images, stage):
    """Whichever comes first: only where all images are of the shapes world is the truth about each known."""
    data = caption_file(tmp_path, 4)
    for specs in (["shapes", data], [data, "shapes"]):
        images = open_images(specs, "val", 8).held_out(8)[1]
        assert validation.evaluate(stage2_model("opt"), images, stage, ("lm",), 0, quick=True)["task"] == "captions"


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (retrieval_result(30.0) | {"itc": retrieval_result(90.0)["itc"]}, ("mean recall", 30.0)),
        ({"task": "captions", "CIDEr": 81.0, "BLEU-4": 30.0}, ("CIDEr", 81.0)),
        ({"task": "vqa", "accuracy": 62.0}, ("accuracy", 62.0)),
        ({"task": "answers", "accuracy": {"the image": {"all": 93.0}}, "correct captions": 5.0}, ("accuracy", 93.0)),
        ({"task": "shapes captions", "correct captions": 71.0}, ("correct captions", 71.0)),
    ],
)
def test_a_model_is_best_by_one_number_of_its_task(result, expected):
    """Retrieval: the mean of the six recalls, re-ranked."""
    assert validation.headline(result) == expected


# --- the feature cache -----------------------------------------------------------------------------------------------


def test_other_weights_or_another_order_of_the_images_are_another_cache(tmp_path, monkeypatch):
    """Random weights, or trained since, have no file: all of them count."""
    model, images = Blip2.from_pretrained("assets/tiny/blip2"), open_images([caption_file(tmp_path, 3)], "train", 64)
    model.sources["vit"] = Source("")

    def file(*image_ids: int) -> str:
        monkeypatch.setattr(Mixture, "image_id", lambda _, row: image_ids[row])
        return cache_tokens(model, images, tmp_path / "cache", 0).file.filename

    first = file(1, 1, 2)
    assert file(1, 1, 2) == first != file(1, 2, 2)
    model.vit.blocks[-1].fc2.weight.data[0] += 1
    assert file(1, 1, 2) != first


@pytest.mark.parametrize("cls", [True, False], ids=["with [CLS]", "SigLIP"])
def test_cached_features_are_the_encoders_and_it_sees_each_image_once(cls, tmp_path, monkeypatch, run_train):
    """In validation too. The file is found again by a run of the same encoder and images; without augmentation nothing
    else is random."""
    seen, vit = [], Blip2.image_tokens
    monkeypatch.setattr(Blip2, "image_tokens", lambda model, images: (seen.append(len(images)), vit(model, images))[1])
    data = Path(caption_file(tmp_path, 20))
    flags = "--image-size 64 --embed-dim 8 --steps 3 --warmup 1 --dropout 0 --val-photos 4 --eval-every 3 --workers 0"
    flags += " --cache-features" + f" --vit {siglip_folder(tmp_path / 'siglip')}" * (not cls)
    first = run_train(tmp_path / "runs/a", STAGE1, flags, "--data", data)
    assert sum(seen) == 20
    again = run_train(tmp_path / "runs/b", STAGE1, flags, "--data", data)
    assert sum(seen) == 20
    assert [row["loss"] for row in first] == [row["loss"] for row in again]

    model = Blip2.from_pretrained(tmp_path / "runs/a")
    (file,) = (tmp_path / "runs/features").glob("*.npy")
    images = open_images([str(data)], "train", 64)
    images.cached = CachedTokens(file, np.arange(len(images)))
    for part in images.held_out(4):  # each image gets its own tokens
        own = [int(Path(part[row].name).stem) for row in range(len(part))]
        assert np.array_equal(part.cached.tokens(part.rows(range(len(part)))).numpy(), np.load(file)[own])
    for image, tokens in enumerate(torch.from_numpy(np.load(file))):
        fresh = model.encode_image(tmp_path / f"{image}.png").tokens[0]
        assert len(tokens) == 8 * 8 + cls
        torch.testing.assert_close(tokens, fresh.half(), rtol=2e-3, atol=2e-3)  # a last place of fp16 or two
