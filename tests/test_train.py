"""Training does what it says: recipe and schedule, what is frozen, resuming, accumulation, many processes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, random_batch, small_model, stage2_model
from safetensors.torch import load_file

import blip2
import train
from blip2 import Blip2
from data import CachedTokens, make_llm_batch, open_photos
from qformer import attend
from shapes import ShapesWorld
from train import (
    TrainConfig,
    build_optimizer,
    complete,
    hardness_at,
    lr_at,
    main,
    memory_estimate,
    parse_flags,
    parts_table,
)

FAST = [*TINY, "--stage", "1", "--batch", "8", "--queries", "4", "--eval-every", "0", "--precision", "fp32"]


@pytest.fixture
def run_train(monkeypatch):
    """run_train(out, flags...) -> the rows of the log. The evaluation of 1,000 pictures at the end is left out."""
    way = {"image_to_text": {}, "text_to_image": {}}
    nothing = dict.fromkeys(("chance", "shuffled pictures", "itc"), way) | {"subsets": {}, "mistakes": []}
    monkeypatch.setattr(
        train, "retrieval", lambda *_, **__: {"task": "retrieval", "photos": 0, "texts": 0, "seconds": 0, **nothing}
    )

    def run(out, *flags):
        main(["--resume", "--out", str(out)] if flags == ("--resume",) else [*FAST, "--out", str(out), *flags])
        return rows(out)

    return run


def rows(out):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


# --- recipe, schedule, optimizer


def test_the_learning_rate_never_rises_after_its_peak():
    """Nor below a recipe's lowest rate, if a lower peak is asked for."""
    cfg, _ = complete(*parse_flags(["--lr", "5e-6"]))
    rates = [lr_at(step, cfg) for step in range(cfg.warmup, cfg.steps + 1)]
    assert max(rates) == rates[0] and rates == sorted(rates, reverse=True)
    with pytest.raises(train.UserError, match="got --min-lr 0.1, expected at most --lr 0.01"):
        main([*FAST, "--lr", "0.01", "--min-lr", "0.1", "--out", "nowhere"])


@pytest.mark.parametrize("stage, folder", [("1", "stage1"), ("2", "stage2"), ("vqa", "vqa"), ("caption", "caption")])
def test_a_run_without_a_name_is_where_the_readme_says(stage, folder, monkeypatch):
    def where(run, *_):
        raise train.UserError(str(run))

    monkeypatch.setattr(train, "resume", where)
    with pytest.raises(train.UserError, match=f"^runs/{folder}$"):
        main(["--resume", "--stage", stage])


def test_paper_recipe_is_the_papers():
    """Section 3.4: 250k steps of 1680, AdamW (0.9, 0.98), decay 0.05, peak 1e-4, 2k warm-up, 224 pixels."""
    cfg, why = complete(*parse_flags(["--data", "coco.json"]))
    assert (cfg.steps, cfg.batch, cfg.warmup, cfg.image_size) == (250_000, 1680, 2000, 224)
    assert (cfg.lr, cfg.beta2, cfg.weight_decay) == (1e-4, 0.98, 0.05)
    assert (cfg.queries, cfg.embed_dim) == (32, 256)  # 3.1, and the original's
    assert 'recipe "stage 1, paper", because --data is not shapes' in why
    assert complete(*parse_flags([]))[1].startswith('recipe "stage 1, tiny", because --data is shapes')
    cfg, why = complete(*parse_flags(["--steps", "7", "--lr", "0.5"]))
    assert cfg.steps == 7 and cfg.lr == 0.5 and "steps" not in why  # a flag wins over the recipe


def test_learning_rate_at_some_steps():
    cfg = TrainConfig(steps=1000, lr=1e-4, min_lr=1e-5, warmup=100)
    assert lr_at(1, cfg) == pytest.approx(1e-6) and lr_at(50, cfg) == pytest.approx(5e-5)
    assert lr_at(100, cfg) == pytest.approx(1e-4) and lr_at(1000, cfg) == pytest.approx(1e-5)
    assert lr_at(550, cfg) == pytest.approx(5.5e-5)
    assert lr_at(325, cfg) == pytest.approx(1e-5 + 9e-5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_at(1, TrainConfig(steps=1, lr=1e-3, min_lr=0.0, warmup=0)) == 0.0


def test_negatives_become_hard_along_the_ramp(monkeypatch):
    """From any other photo to ITC's choice; the paper has no ramp, they are ITC's choice from the first step."""
    ramp = TrainConfig(negatives_ramp=200)
    assert [hardness_at(step, ramp) for step in (0, 50, 200, 999)] == [0.0, 0.25, 1.0, 1.0]
    assert hardness_at(1, TrainConfig(negatives_ramp=0)) == 1.0
    assert train.RECIPES["stage 1, paper"]["negatives_ramp"] == 0
    seen, draw = [], blip2.sample_hard_negatives
    monkeypatch.setattr(blip2, "sample_hard_negatives", lambda sim, *rest: seen.append(sim) or draw(sim, *rest))
    for hardness in (1.0, 0.25, 0.0):
        small_model().stage1_losses(random_batch(4), hardness=hardness)
    torch.testing.assert_close(seen[2], seen[0] / 4)
    assert seen[4].eq(0).all() and not seen[0].eq(0).any()


def test_decay_is_on_matrices_and_tables_never_on_the_temperature():
    model = small_model()
    groups = build_optimizer(model, TrainConfig(lr=1e-4, beta2=0.98, weight_decay=0.05)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in groups)
    assert groups[0]["weight_decay"] == 0.05 and groups[1]["weight_decay"] == 0
    assert {"qformer.queries", "qformer.word_embedding.weight", "itm_head.weight"} <= decayed
    assert {"temperature", "ln_vision.weight", "itm_head.bias", "qformer.lm_head.bias"} <= spared
    assert not any(name.startswith("vit.") for name in decayed | spared)
    assert len(decayed | spared) == sum(not name.startswith("vit.") for name in names.values())


# --- what is trained


def test_frozen_stays_frozen_and_everything_else_learns():
    model = small_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    assert not model.vit.training and model.qformer.training
    optimizer = build_optimizer(model, TrainConfig(lr=1e-2, beta2=0.98, weight_decay=0.0))
    sum(model.stage1_losses(random_batch(4)).values()).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("vit.")
        assert torch.equal(parameter, before[name]) == name.startswith("vit."), name


def test_a_batch_is_learned_by_heart():
    """All three losses fall far below chance on four pairs: gradients go where they should."""
    model, batch = small_model(width=32, depth=2).train(), random_batch(4)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    optimizer = build_optimizer(model, TrainConfig(lr=3e-3, beta2=0.98, weight_decay=0.0))
    for _ in range(150):
        optimizer.zero_grad()
        losses = model.stage1_losses(batch)
        sum(losses.values()).backward()
        optimizer.step()
    floor = train.smoothing_floor
    assert losses["itc"] < floor(4) + 0.3 and losses["itm"] < 0.3 and losses["itg"] < floor(30) + 0.5


def test_without_itg_its_head_is_not_trained(tmp_path, run_train):
    log = run_train(tmp_path / "run", "--losses", "itc,itm", "--steps", "2")
    assert set(log[0]) & {"itc", "itm", "itg"} == {"itc", "itm"}
    trained = load_file(tmp_path / "run/model.safetensors")
    torch.manual_seed(0)
    fresh, _ = Blip2.build(TINY[1], TINY[3], 64, 4, 2, 64)
    assert torch.equal(trained["qformer.lm_head.dense.weight"], fresh.qformer.lm_head.dense.weight)
    assert not torch.equal(trained["itm_head.weight"], fresh.itm_head.weight)


# --- runs


def test_a_run_can_be_stopped_and_resumed_bit_for_bit(tmp_path, run_train):
    """6 steps are 3 steps, a new process's worth of resuming, and 3 steps: the same losses, the same weights."""
    flags = ["--steps", "6", "--save-every", "3", "--keep", "2", "--dropout", "0.1"]
    straight = run_train(tmp_path / "straight", *flags)
    broken = tmp_path / "broken"
    run_train(broken, *flags)
    shutil.rmtree(broken / "step-000006")  # as if it had died after the checkpoint of step 3
    resumed = run_train(broken, "--resume")
    for key in ("itc", "itm", "itg", "lr", "norm", "temperature"):
        assert [row[key] for row in resumed] == [row[key] for row in straight], key
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]
    one, other = (load_file(run / "model.safetensors") for run in (tmp_path / "straight", broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path, monkeypatch, run_train, name):
    number, handler = getattr(signal, name), signal.getsignal(getattr(signal, name))
    set_lr, rates = train.set_lr, []

    def set_lr_and_interrupt(optimizer, lr):
        set_lr(optimizer, lr)
        rates.append(lr)
        if len(rates) == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train, "set_lr", set_lr_and_interrupt)
    assert [row["step"] for row in run_train(tmp_path, "--steps", "4")] == [1, 2]
    assert signal.getsignal(number) == handler
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000002"]
    assert [row["step"] for row in run_train(tmp_path, "--resume")] == [1, 2, 3, 4]


def test_checkpoints_appear_whole_and_only_the_last_are_kept(tmp_path, run_train):
    run_train(tmp_path, "--steps", "6", "--save-every", "2", "--keep", "2")
    whole = {"config.json", "model.safetensors", "tokenizer.json", "train_state.pt"}
    latest = {p.name for p in tmp_path.iterdir()}
    assert latest == whole | {"log.jsonl", "retrieval.json", "step-000004", "step-000006"}
    assert {p.name for p in (tmp_path / "step-000004").iterdir()} == whole
    for folder in (tmp_path, tmp_path / "step-000006"):
        Blip2.from_pretrained(folder)
    assert os.path.samefile(tmp_path / "model.safetensors", tmp_path / "step-000006/model.safetensors")


def test_a_checkpoint_that_could_not_be_finished_changes_nothing(tmp_path, monkeypatch, run_train):
    run_train(tmp_path, "--steps", "2", "--save-every", "2")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "log.jsonl"}

    def disk_full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(train.torch, "save", disk_full)
    model = Blip2.from_pretrained(tmp_path)
    with pytest.raises(OSError):
        train.save_checkpoint(tmp_path, 4, model, {}, TrainConfig(), is_best=True)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sorted(tmp_path.glob("step-*")) == [tmp_path / "step-000002"]


def test_the_best_model_in_validation_is_kept(tmp_path, monkeypatch):
    scores, final = iter([10.0, 30.0, 20.0]), {}

    def fake(model, photos, k=128, **_):
        final.update(model.trained_state())
        way = dict.fromkeys(("R@1", "R@5", "R@10"), next(scores) if k == 16 else 0.0)
        both = {"image_to_text": way, "text_to_image": way}
        return {"task": "retrieval", "photos": 1, "texts": 1, "k": k, "seconds": 0, "chance": both, "itc": both,
                "shuffled pictures": both, "reranked": both, "subsets": {}, "mistakes": []}  # fmt: skip

    monkeypatch.setattr(train, "retrieval", fake)
    main([*FAST, "--out", str(tmp_path), "--steps", "6", "--eval-every", "2", "--save-every", "2", "--keep", "3"])
    best = (tmp_path / "best/model.safetensors").read_bytes()
    assert best == (tmp_path / "step-000004/model.safetensors").read_bytes()
    assert best != (tmp_path / "model.safetensors").read_bytes()
    kept = load_file(tmp_path / "best/model.safetensors")
    assert all(torch.equal(final[name], kept[name]) for name in kept)  # it is the one that is evaluated at the end


def test_held_out_photos_are_not_trained_on_and_negatives_are_drawn_anew(tmp_path, monkeypatch, run_train):
    from test_data import write_photos

    trained, validated, draws, losses = set(), set(), [], Blip2.stage1_losses

    def spy(model, batch, objectives, totals, generator, *rest):
        trained.update(batch.image_ids.tolist())
        draws.append(generator.initial_seed())
        return losses(model, batch, objectives, totals, generator, *rest)

    retrieval = train.retrieval  # run_train's, which evaluates nothing
    both = {way: dict.fromkeys(("R@1", "R@5", "R@10"), 0.0) for way in ("image_to_text", "text_to_image")}

    def spy_on_validation(model, photos, **_):
        validated.update(photos.image_id(row) for row in range(len(photos)))
        return {**retrieval(), "itc": both}

    monkeypatch.setattr(Blip2, "stage1_losses", spy)
    monkeypatch.setattr(train, "retrieval", spy_on_validation)
    flags = f"--data {write_photos(tmp_path, 20, (64, 64))} --image-size 64 --val-photos 4 --steps 4 --eval-every 4"
    run_train(tmp_path / "run", *flags.split(), "--micro-batch", "4")
    assert len(validated) == 4 and len(trained) == 16 and not trained & validated
    assert len(set(draws)) == len(draws) == 8  # 4 steps of 2 micro-batches


def test_every_step_is_in_the_log_with_the_true_means(tmp_path, run_train):
    """One line a step whatever --log-every says; accumulated micro-batches are averaged over all their words."""
    flags = "--steps 3 --log-every 2 --losses itc,itg --dropout 0".split()
    whole = run_train(tmp_path / "whole", *flags)
    parts = run_train(tmp_path / "parts", *flags, "--micro-batch", "2")
    assert [row["step"] for row in whole] == [1, 2, 3]
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(a["itc"] + a["itg"])
        assert b["itg"] == pytest.approx(a["itg"], rel=0.02 * a["step"])
        assert b["itc"] < a["itc"] - 0.5  # two candidates against eight
    assert parts[0]["itg"] == pytest.approx(whole[0]["itg"], rel=1e-4)


def test_the_temperature_is_kept_within_its_bounds(tmp_path, run_train, monkeypatch):
    monkeypatch.setattr(train, "TEMPERATURES", (0.2, 0.5))
    assert run_train(tmp_path, "--steps", "2")[-1]["temperature"] == pytest.approx(0.2, abs=1e-3)


def test_what_happens_to_a_validation_costs_nothing(tmp_path, monkeypatch):
    """The checkpoint of its step is there before it."""

    def fails(*_, **__):
        raise train.UserError("evaluation needs every photo")

    monkeypatch.setattr(train, "retrieval", fails)
    with pytest.raises(train.UserError):
        main([*FAST, "--out", str(tmp_path), "--steps", "4", "--eval-every", "2", "--save-every", "2"])
    assert (tmp_path / "step-000002/model.safetensors").exists()


@pytest.mark.parametrize("stopped_at", [2, 4])
def test_a_validation_that_a_stop_has_prevented_is_made_up_for(stopped_at, tmp_path, monkeypatch):
    """Ctrl-C in a step that is to be validated, the last one too: the run that goes on has all validations of one that
    was never stopped, and the same best model."""
    both, set_lr, steps = ("image_to_text", "text_to_image"), train.set_lr, []

    def better_each_time(model, photos, k=128, **_):
        scores = {way: dict.fromkeys(("R@1", "R@5", "R@10"), len(steps)) for way in both}
        found = dict.fromkeys(("chance", "itc", "shuffled pictures", "reranked"), scores) | dict(
            subsets={}, mistakes=[]
        )
        return found | dict(task="retrieval", photos=1, texts=1, k=k, seconds=0, subsets={}, mistakes=[])

    def interrupt(optimizer, lr):
        set_lr(optimizer, lr)
        steps.append(lr)
        if len(steps) == stopped_at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "retrieval", better_each_time)
    monkeypatch.setattr(train, "set_lr", interrupt)
    assert main([*FAST, "--out", str(tmp_path), *"--steps 4 --eval-every 2 --save-every 2".split()]) is None
    main(["--resume", "--out", str(tmp_path)])
    log = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert [row["step"] for row in log if "validation" in row] == [2, 4]
    assert json.loads((tmp_path / "best/config.json").read_text())["step"] == 4


def test_a_run_goes_on_beside_a_copy_of_a_checkpoint_and_behind_a_line_that_was_cut(tmp_path, run_train):
    flags = "--steps 4 --save-every 2 --keep 2 --dropout 0".split()
    whole = run_train(tmp_path / "whole", *flags)
    run_train(tmp_path / "cut", *flags)
    shutil.rmtree(tmp_path / "cut/step-000004")
    shutil.copytree(tmp_path / "cut/step-000002", tmp_path / "cut/step-000002.bak")
    log = tmp_path / "cut/log.jsonl"
    log.write_text(log.read_text()[:-20])
    again = run_train(tmp_path / "cut", "--resume")
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]
    assert (tmp_path / "cut/step-000002.bak").exists()


def test_what_cannot_be_resumed_or_means_two_things_gets_a_sentence(tmp_path, run_train):
    run_train(tmp_path, "--steps", "1")
    (tmp_path / "step-000001/train_state.pt").write_bytes(b"PK")
    with pytest.raises(train.UserError, match="step-000001 cannot be read .*take that folder away"):
        run_train(tmp_path, "--resume")
    with pytest.raises(train.UserError, match="got --steps and --epochs, expected one of them"):
        main([*FAST, "--steps", "1", "--epochs", "1", "--out", str(tmp_path / "other")])


def test_a_run_says_which_losses_it_lacks_and_writes_no_captions_without_itg(tmp_path, run_train):
    run_train(tmp_path, "--steps", "1", "--losses", "itc,itm")
    model = Blip2.from_pretrained(tmp_path)
    assert model.sources["lacks"] == ["itg"]
    with pytest.raises(train.UserError, match="is not trained here, as in runs of other --losses"):
        model.caption("assets/tiny/picture.png")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_it(tmp_path, run_train):
    with pytest.raises(train.UserError, match="the it. loss became (nan|inf) at step [0-9], .* lower --lr"):
        run_train(tmp_path, "--steps", "5", "--lr", "1e30", "--warmup", "0", "--clip", "1e30")


def test_cached_features_are_the_encoders_and_it_sees_each_photo_once(tmp_path, monkeypatch, run_train):
    """The file is found again, by a run of the same encoder and photos; without augmentation nothing else is random."""
    from test_data import write_photos

    seen, vit = [], Blip2.image_tokens
    monkeypatch.setattr(Blip2, "image_tokens", lambda model, images: (seen.append(len(images)), vit(model, images))[1])
    path = write_photos(tmp_path, 20, (64, 64))
    flags = f"--data {path} --image-size 64 --embed-dim 8 --steps 3 --warmup 1 --dropout 0 --val-photos 4".split()
    first = run_train(tmp_path / "runs/a", *flags, "--cache-features")
    assert sum(seen) == 20
    again = run_train(tmp_path / "runs/b", *flags, "--cache-features")
    assert sum(seen) == 20
    assert [row["loss"] for row in first] == [row["loss"] for row in again]

    model = Blip2.from_pretrained(tmp_path / "runs/a")
    (file,) = (tmp_path / "runs/features").glob("*.npy")
    photos = open_photos([str(path)], "train", 64)
    photos.cached = CachedTokens(file, np.arange(len(photos)))
    for part in photos.held_out(4):  # each photo gets its own tokens
        own = [int(Path(part.name(row)).stem) for row in range(len(part))]
        assert np.array_equal(part.tokens(list(range(len(part)))).numpy(), np.load(file)[own])
    for photo, tokens in enumerate(torch.from_numpy(np.load(file))):
        fresh = model.encode_image(tmp_path / f"{photo}.png").tokens[0]
        torch.testing.assert_close(tokens, fresh.half(), rtol=2e-3, atol=2e-3)  # a last place of fp16 or two


def test_micro_batches_that_itc_compares_train_like_the_whole_batch(tmp_path, run_train, capsys):
    """--itc-batch, also where the run is stopped and resumed; without it ITC has an easier task."""
    flags = "--steps 4 --dropout 0 --lr 1e-3 --warmup 1 --negatives-ramp 3 --save-every 2 --keep 2".split()
    whole = run_train(tmp_path / "whole", *flags)
    parts = run_train(tmp_path / "parts", *flags, "--micro-batch", "2", "--itc-batch", "8")
    assert "compared with 8 texts at once: its own and 7 negatives\n" in capsys.readouterr().out
    for a, b in zip(whole, parts, strict=True):
        for key in ("itc", "itm", "itg", "norm", "temperature"):
            assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)
    alone = run_train(tmp_path / "alone", *flags, "--micro-batch", "2")
    assert all(a["itc"] < b["itc"] - 0.5 for a, b in zip(alone, whole, strict=True))
    flags[3] = "0.1"  # with dropout, whose numbers the first pass has to leave to the second
    parts = run_train(tmp_path / "drop", *flags, "--micro-batch", "2", "--itc-batch", "8")
    shutil.rmtree(tmp_path / "drop/step-000004")
    again = run_train(tmp_path / "drop", "--resume")
    assert [row["loss"] for row in again[2:]] == [row["loss"] for row in parts[2:]]


def test_a_group_that_itc_compares_draws_the_same_however_it_is_cut(tmp_path, run_train):
    """Two groups a step; each has its negatives whether it is one micro-batch or two."""
    flags = ["--steps", "2", "--dropout", "0", "--lr", "1e-3", "--warmup", "1", "--negatives-ramp", "0"]
    one = run_train(tmp_path / "one", *flags, "--micro-batch", "4")
    two = run_train(tmp_path / "two", *flags, "--micro-batch", "2", "--itc-batch", "4")
    for a, b in zip(one, two, strict=True):
        for key in ("itc", "itm", "itg"):
            assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)


# --- one process and many


def torchrun(processes, out, *flags):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    done = subprocess.run(
        [*command, "train.py", *FAST, "--out", str(out), *flags], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return rows(out)


def test_gradients_are_clipped_before_the_step(tmp_path, run_train):
    """The log has the norm before clipping. AdamW's first step forgets the scale, so it is the moments that tell."""
    (row,) = run_train(tmp_path / "run", "--steps", "1", "--clip", "0.01", "--save-every", "1")
    state = torch.load(tmp_path / "run/train_state.pt", weights_only=True)["optimizer"]["state"]
    first = torch.stack([moments["exp_avg"].norm() for moments in state.values()]).norm()
    assert row["norm"] > 1 and first.item() == pytest.approx(0.1 * 0.01, rel=1e-3)  # (1 - beta1) * the clipped norm


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card, and pytest -m cuda")
def test_a_cuda_card_computes_what_the_processor_does():
    """Losses and gradients in fp32; in bf16 with the frozen ViT in fp16 (paper 3.4) the losses are close."""
    reference, batch = small_model(), random_batch(6)
    model = small_model().set_precision("fp32", "cuda")
    losses = []
    for m, b in ((reference, batch), (model, batch.to("cuda"))):
        losses.append(m.stage1_losses(b, generator=torch.Generator().manual_seed(3)))
        sum(losses[-1].values()).backward()
    for name, loss in losses[0].items():
        assert losses[1][name].item() == pytest.approx(loss.item(), rel=1e-4)
    for (name, cpu), (_, cuda) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
        if cpu.grad is not None:
            torch.testing.assert_close(cuda.grad.cpu(), cpu.grad, rtol=1e-3, atol=1e-5, msg=name)
    half = small_model().set_precision("bf16", "cuda")
    assert next(half.vit.parameters()).dtype == torch.float16
    for name, loss in half.stage1_losses(batch.to("cuda"), generator=torch.Generator().manual_seed(3)).items():
        assert loss.item() == pytest.approx(losses[0][name].item(), rel=0.1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card, and pytest -m cuda")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_attention_on_a_card_drops_as_many_as_it_says(precision):
    """Ones, averaged with dropout, are 1 on average; if 0.1 were rounded to sixteenths, it would be 1.04 or 0.97."""
    small_model().set_precision(precision, "cuda")
    zeros = torch.zeros(64, 12, 64, 64, device="cuda", dtype=blip2.PRECISIONS[precision])
    mean = attend(zeros, zeros, torch.ones_like(zeros), None, dropout=0.1).float().mean().item()
    assert mean == pytest.approx(1, abs=0.01)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card, and pytest -m cuda")
@pytest.mark.parametrize("kind", ["stage 1", "stage 1, compared", "opt", "t5"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_host_never_waits_for_the_card_inside_a_step(kind, precision):
    """So that it runs ahead of it: no .item(), no test of a device tensor. fp16 has its loss scaled."""
    if (kind, precision) == ("t5", "fp16"):
        pytest.skip("T5 does not run in fp16")
    cfg = TrainConfig(clip=1.0, lr=1e-4, beta2=0.98, weight_decay=0.05, negatives_ramp=0)
    if kind.startswith("stage 1"):
        model, objectives = small_model(dropout=0.1), ("itc", "itm", "itg")
        batches = [random_batch(4, seed, list(range(4 * seed, 4 * seed + 4))) for seed in range(2)]
        cfg.itc_batch = 8 if "compared" in kind else 0
    else:
        model, objectives = stage2_model(kind, dropout=0.1), ("lm",)
        layout, images = model.llm.layout, torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
        batches = [make_llm_batch([[2]] * 3, [[7] * n for n in (3, 5, 9)], 0, layout.pads, [1, 2, 3], images=images)]
    model = model.set_precision(precision, "cuda").train()
    batches = [batch.pin_memory().to("cuda") for batch in batches]
    optimizer = build_optimizer(model, cfg)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    train.optimize(model, optimizer, scaler, batches, cfg, objectives, 1)  # makes what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, norm = train.optimize(model, optimizer, scaler, batches, cfg, objectives, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all() and (norm.isfinite() or precision == "fp16")


@pytest.mark.parametrize(
    ("objectives", "cut"),
    [("itc,itm,itg", []), ("itc,itm,itg", ["--micro-batch", "2", "--itc-batch", "8"]), ("itc", [])],
    ids=["all", "compared", "itc"],
)
def test_two_processes_train_like_one(tmp_path, run_train, objectives, cut):
    """With dropout off: the same pictures, captions and negatives, the same losses, the same weights."""
    world, records = ShapesWorld("train"), []
    for i in range(24):
        world.picture(i).save(tmp_path / f"{i}.png")
        records.append({"image": f"{i}.png", "caption": world.captions(i)})
    (tmp_path / "a.json").write_text(json.dumps(records))
    flags = f"--data {tmp_path / 'a.json'} --image-size 64 --embed-dim 16 --steps 4 --dropout 0 --warmup 1".split()
    flags += ["--lr", "1e-3", "--losses", objectives]
    one = run_train(tmp_path / "one", *flags)
    two = torchrun(2, tmp_path / "two", *flags, *cut)
    for a, b in zip(one, two, strict=True):
        for key in (*objectives.split(","), "norm", "temperature"):
            assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name in weights[0]:  # in four steps of AdamW it moves by up to 4e-3; where its gradient is 0, by rounding alone
        difference = (weights[0][name] - weights[1][name]).abs().mean().item()
        assert difference < 5e-5, f"{name} differs by {difference:.1e}"


# --- what is printed


def test_parts_table_counts_what_is_trained():
    text = parts_table(small_model())
    assert "ViT (frozen)" in text and "temperature" in text
    total = sum(p.numel() for p in small_model().parameters())
    assert f"{total:,}" in text.splitlines()[-1]


def test_memory_estimate_counts_weights_exactly_and_grows_with_the_batch():
    model = small_model()
    one, two = (memory_estimate(model, n, ["itc", "itm", "itg"]) for n in (1, 2))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert one["weights"] == 4 * trained and one["gradients + AdamW"] == 12 * trained
    assert two["activations"] == 2 * one["activations"]


def test_help_names_every_flag_with_its_comment(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    assert "--cache-features" in text and "--no-cache-features" in text and "frozen image encoder" in text
    assert "None" not in text
