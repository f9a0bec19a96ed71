"""Flags and recipes: what is not given comes from the run that --init names, then from the columns of the paper; what
cannot work is refused in one sentence before any work; a resumed run keeps what makes it that run."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from conftest import ROOT, TINY, copy_of

import config
import train
from blip2 import Blip2
from config import FLAGS, STAGES, TrainConfig, check, complete, continues, parse_flags, resume, saved_config
from data import StepSampler, TrainSet, collate_captions
from engine.errors import UserError, run_command
from qformer import QFormer, QFormerConfig
from sources.mixture import open_images
from sources.shapes import ShapesWorld
from sources.text import BertTokenizer
from train import build_optimizer, lr_at, set_lr
from vit import PRESETS, ViT


def completed(*flags: str, images: int = 1_000_000, texts: int = 5_000_000) -> tuple[TrainConfig, str]:
    """The configuration of a new run, and what was chosen and why."""
    return complete(*parse_flags(list(flags), ""), images, texts)


def config_of_a_run(folder, image_width: int = 96, **more) -> str:
    """A folder with the config.json of a run, which is all that a recipe depends on."""
    qformer = {"image_width": image_width, "dropout": 0.1, "num_queries": 32, "cross_every": 2}
    run = {"model": "blip2", "vit": "eva-g", "bert": "bert", "image_size": 224, "embed_dim": 256, "qformer": qformer}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(run | {"max_text_tokens": 32, "ln_vision_eps": 1e-5} | more))
    return str(folder)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vit", "batch", "name"), [("clip-l", 2320, "ViT-L"), ("eva-g", 1680, "ViT-g")])
def test_stage_1_has_the_recipe_of_the_paper(vit, batch, name):
    """Section 3.4: 250k steps of 2320 (ViT-L) or 1680 (ViT-g), AdamW (0.9, 0.98), decay 0.05, peak 1e-4, 2k warm-up,
    224 pixels; hard negatives from the first step."""
    cfg, why = completed("--data", "coco.json", "--vit", vit)
    assert (cfg.steps, cfg.batch, cfg.warmup, cfg.image_size) == (250_000, batch, 2000, 224)
    assert (cfg.lr, cfg.beta2, cfg.weight_decay, cfg.negatives_ramp) == (1e-4, 0.98, 0.05, 0)
    assert (cfg.queries, cfg.embed_dim) == (32, 256)  # 3.1, and LAVIS's
    reason = f"because 1,000,000 images are 50,000 or more and the ViT has width {1024 if vit == 'clip-l' else 1408}"
    assert " ".join(why.split()).startswith(f'recipe "stage 1, paper, {name}", {reason}: ')
    assert completed()[1].startswith('recipe "stage 1, tiny", because --data is shapes: ')


@pytest.mark.parametrize(("llm", "batch"), [("opt-2.7b", 1920), ("flan-t5-xl", 1520)])
def test_stage_2_has_the_recipes_of_the_paper(llm, batch):
    """Section 3.4: 80k steps of 1920 (OPT) or 1520 (FlanT5), warm-up 2k, peak 1e-4, down to 5e-5."""
    cfg, why = completed("--stage", "2", "--init", "none", "--data", "coco.json", "--llm", llm)
    assert (cfg.steps, cfg.batch, cfg.warmup, cfg.lr, cfg.min_lr) == (80_000, batch, 2000, 1e-4, 5e-5)
    assert (cfg.beta2, cfg.weight_decay, cfg.image_size, cfg.queries) == (0.98, 0.05, 224, 32)
    assert why.startswith('recipe "stage 2, paper, ')


# Tables 7, 8 and 9: (stage, language model, width of the ViT), batch, resolution, peak, beta2, layer-wise decay.
ROWS = [
    (("caption", "flan-t5-xl", 1408), 256, 364, 1e-5, 0.999, 1.0),
    (("caption", "opt-2.7b", 1408), 256, 364, 1e-5, 0.999, 1.0),
    (("caption", "opt-6.7b", 1408), 256, 364, 1e-5, 0.999, 0.95),
    (("vqa", "flan-t5-xl", 1408), 128, 490, 1e-5, 0.999, 0.95),
    (("vqa", "opt-2.7b", 1408), 128, 490, 1e-5, 0.999, 0.95),
    (("vqa", "opt-6.7b", 1408), 128, 490, 1e-5, 0.999, 0.9),
    (("retrieval", None, 1024), 224, 364, 5e-6, 0.98, 1.0),
    (("retrieval", None, 1408), 224, 364, 1e-5, 0.999, 0.95),
]


@pytest.mark.parametrize("row, batch, size, peak, beta2, decay", ROWS)
def test_fine_tuning_has_the_recipes_of_the_paper(tmp_path, row, batch, size, peak, beta2, decay):
    """Read from the optimizer and the loader that are built: 5 epochs, warm-up 1,000, AdamW, weight decay 0.05."""
    stage, llm, width = row
    records = [{"image": "a.png", "caption": ["a dog", "a cat"]}] * (3 * batch)
    if stage == "vqa":
        records = [{"image": "a.png", "question": "what?", "answer": ["a dog", "a cat"]}] * (3 * batch)
    (tmp_path / "a.json").write_text(json.dumps(records))
    ShapesWorld("train").image(0).save(tmp_path / "a.png")
    run = config_of_a_run(tmp_path / "run", width, **({"llm": llm} if llm else {}))
    shown = 3 * batch * (1 if stage == "vqa" else 2)
    cfg, why = completed("--stage", stage, "--init", run, "--data", f"{tmp_path}/a.json", texts=shown)
    assert why.startswith(f'recipe "{stage}, paper, ') and cfg.epochs == 5
    assert (cfg.prompt == "a photo of") == (stage == "caption")
    assert (cfg.template == "Question: {} Answer:") == (stage == "vqa")  # for FlanT5 too, unlike zero-shot

    # An epoch shows each caption, or question, once.
    images = open_images(cfg.data, "train", cfg.image_size, questions=stage == "vqa")
    assert images.num_texts() == shown and cfg.steps == 5 * 3 * (1 if stage == "vqa" else 2)
    (samples,) = list(StepSampler(images, 0, cfg.batch, 1, 1, 0, 0, 1))
    collate = partial(collate_captions, BertTokenizer(ROOT / "assets/tiny/bert"))
    first = TrainSet(images, collate, cfg.image_size, 0)[samples[:1]]
    assert len(samples) == batch and first.images.shape == (1, 3, size, size)

    with torch.device("meta"):
        vit = ViT(PRESETS["eva-g" if width == 1408 else "clip-l"])
        model = Blip2(vit, QFormer(QFormerConfig(image_width=width)), None, size)
    model.unfreeze_vit()
    optimizer, depth = build_optimizer(model, cfg), vit.cfg.depth
    cfg.steps = 11_000
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for step, share in ((0, 0.0), (500, 0.5), (1000, 1.0), (6000, 0.5), (11_000, 0.0)):
        set_lr(optimizer, lr_at(step, cfg))
        for group in optimizer.param_groups:
            assert group["betas"] == (0.9, beta2)
            for parameter in group["params"]:
                name, scale = names[id(parameter)], 1.0
                if name.startswith("vit."):  # block i of d: decay ** (d - i), and once more below the first
                    place = int(name.split(".")[2]) if name.startswith("vit.blocks.") else -1
                    scale = decay ** (depth - place)
                assert group["lr"] == pytest.approx(peak * share * scale, abs=1e-12), (name, step)
                assert group["weight_decay"] == (0.05 if parameter.ndim >= 2 else 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(names.values()) and "vit.patch_embed.weight" in trained


def test_a_flag_wins_over_the_recipe():
    cfg, why = completed("--steps", "7", "--lr", "0.5")
    assert cfg.steps == 7 and cfg.lr == 0.5 and "steps 7" not in why


def test_the_learning_rate_never_rises_after_its_peak():
    """Even if the peak that is asked for is below the recipe's lowest rate."""
    cfg, _ = completed("--lr", "5e-6")
    rates = [lr_at(step, cfg) for step in range(cfg.warmup, cfg.steps + 1)]
    assert max(rates) == rates[0] and rates == sorted(rates, reverse=True)


def test_epochs_become_steps(tmp_path):
    """Each caption, or question, is shown as often as the epochs say."""
    run = config_of_a_run(tmp_path / "run", llm="opt-2.7b")
    flags = ["--stage", "vqa", "--init", run, "--data", "a.json", "--epochs", "2.5", "--batch", "10"]
    cfg, why = completed(*flags, texts=1000)
    assert cfg.steps == 250 and "2.5 epochs of 1,000 questions are 250 steps" in why
    assert completed("--steps", "3")[0].steps == 3


@pytest.mark.parametrize("flags", (["--steps", "189"], ["--epochs", "0.6048"]))
def test_what_is_counted_in_steps_is_scaled_with_their_number(flags):
    """A tenth of the steps of the shapes world: a tenth of its warm-up, ramp, and between validations; not what is
    given."""
    cfg, why = completed(*flags, texts=10_000)
    assert (cfg.steps, cfg.warmup, cfg.negatives_ramp, cfg.eval_every, cfg.save_every) == (189, 9, 60, 95, 95)
    assert "scaled to 189 steps: warmup 9, negatives_ramp 60, eval_every 95, save_every 95" in why
    cfg, why = completed(*flags, "--warmup", "90", "--eval-every", "0", texts=10_000)
    assert (cfg.warmup, cfg.negatives_ramp, cfg.eval_every) == (90, 60, 0) and "warmup" not in why
    assert "scaled" not in completed("--batch", "16")[1]


# --- small data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, held_out, batch, passes",
    [(500, 50, 32, 28), (2000, 200, 32, 15), (6000, 200, 32, 4.7), (49_999, 200, 32, 4)],
)
def test_the_number_of_images_chooses_the_recipe_for_small_data(images, held_out, batch, passes):
    """Held-out images, passes over the others, cached tokens; all said, with the reasons."""
    cfg, why = completed("--data", "a.json", images=images)
    assert f'recipe "stage 1, small", because {images:,} images are fewer than 50,000' in why
    assert (cfg.val_photos, cfg.batch, cfg.cache_features) == (held_out, batch, images <= 20_000)
    assert cfg.steps * cfg.batch / (images - held_out) == pytest.approx(passes, rel=0.05)
    assert cfg.warmup < cfg.negatives_ramp < cfg.steps and cfg.eval_every == cfg.save_every == -(-cfg.steps // 4)
    shown = f"{cfg.steps} steps of {batch} show each of {images - held_out:,} images {passes:.0f} times"
    assert shown in why and f"{held_out} images are held out to validate on" in why
    assert (cfg.image_size, cfg.queries, cfg.embed_dim, cfg.dropout) == (224, 32, 256, 0.0)


def test_a_handful_of_images_is_said_to_be_too_few():
    cfg, why = completed("--data", "a.json", images=40, texts=200)
    assert cfg.batch == 32 and cfg.val_photos == 4 and "36 images teach next to nothing: expect recall near" in why
    assert completed("--data", "a.json", images=5)[0].batch == 4  # a batch is never larger than what there is
    assert "teach next to nothing" not in completed("--data", "a.json", images=500)[1]


def test_a_flag_wins_over_the_recipe_for_small_data(tmp_path):
    flags = ["--data", "a.json", "--no-cache-features", "--val-photos", "7", "--batch", "8", "--steps", "100"]
    cfg, why = completed(*flags, images=500)
    assert (cfg.cache_features, cfg.val_photos, cfg.batch, cfg.steps, cfg.warmup) == (False, 7, 8, 100, 7)
    assert completed("--data", "a.json", "--val-data", "b.json", images=500)[0].val_photos == 0


@pytest.mark.parametrize("stage", ["caption", "vqa", "retrieval"])
def test_with_few_images_fine_tuning_leaves_the_vit_frozen(tmp_path, stage):
    """At the run's own resolution, over cached tokens; a ViT that is trained has none to cache."""
    run = config_of_a_run(tmp_path / "run", **({} if stage == "retrieval" else {"llm": "opt-2.7b"}))
    cfg, why = completed("--stage", stage, "--init", run, "--data", "a.json", images=500)
    assert f'recipe "{stage}, small"' in why and (cfg.freeze_vit, cfg.cache_features, cfg.image_size) == (
        True,
        True,
        224,
    )
    check(dataclasses.replace(cfg, data=["shapes"]))
    cfg, _ = completed("--stage", stage, "--init", run, "--data", "a.json", "--no-freeze-vit", images=500)
    assert (cfg.freeze_vit, cfg.cache_features) == (False, False)


def test_the_tiny_parts_are_warned_of_with_real_images():
    """They know drawn shapes alone: what to pass, where it is, how large it is."""
    cfg, _ = completed("--data", "a.json", images=500)
    said = config.unfit_parts(cfg)
    assert "WARNING: --vit, --bert: the tiny parts that ship with the code know drawn shapes alone" in said
    assert "pass --vit W/dinov2-small --bert W/all-MiniLM-L6-v2" in said and said.count("curl -L") == 2
    assert "facebook/dinov2-small/resolve/main/{config.json,preprocessor_config.json,model.safetensors}" in said
    assert "--llm W/opt-125m" in config.unfit_parts(dataclasses.replace(cfg, stage="2"))
    assert not config.unfit_parts(dataclasses.replace(cfg, vit="W/vit", bert="W/bert"))
    assert not config.unfit_parts(completed()[0])


# --- a configuration as a file ---------------------------------------------------------------------------------------


def test_the_whole_configuration_is_written_and_read_back(tmp_path, capsys):
    """--write-config stops before anything is loaded; --config takes its flags, the command line wins."""
    file = str(tmp_path / "c.json")
    with pytest.raises(SystemExit) as stop:
        train.main(
            ["--stage", "1", "--steps", "50", "--queries", "4", "--write-config", file, "--out", f"{tmp_path}/r"]
        )
    assert not stop.value.code and not (tmp_path / "r").exists()
    assert f"to start this run: python train.py --config {file}" in capsys.readouterr().out
    again, _ = completed("--config", file)
    assert (again.steps, again.queries, again.warmup, again.out, again.lr) == (50, 4, 3, "", 1e-3)
    assert completed("--config", file, "--lr", "0.5")[0].lr == 0.5
    assert completed("--config", file, "--epochs", "1", texts=320)[0].steps == 10  # in the place of its steps
    saved = {name: value for name, value in dataclasses.asdict(again).items() if name not in ("config", "write_config")}
    written = json.loads((tmp_path / "c.json").read_text())
    assert saved == {name: written[name] for name in saved} | {"out": ""}


def test_the_configuration_of_a_run_starts_another(stage1_run):
    cfg, _ = completed("--config", str(stage1_run / "config.json"))
    assert (cfg.queries, cfg.batch, cfg.steps, cfg.out) == (4, 4, 4, "")


@pytest.mark.parametrize(
    "content, said",
    [("[]", "holds no object"), ('{"stps": 1}', "has stps, which are no flags"),
     ('{"steps": "many"}', "has steps 'many', expected int"), ('{"lr": true}', "has lr True, expected float")],
)  # fmt: skip
def test_a_configuration_that_is_none_gets_a_sentence(tmp_path, content, said):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=f"c.json {said}"):
        completed("--config", str(tmp_path / "c.json"))


# --- what a run takes from the run it starts from --------------------------------------------------------------------


def test_a_stage_takes_parts_and_sizes_from_the_run_it_starts_from(stage1_run):
    """Fine-tuning has an image size of its own; --vit, --llm and --dropout may differ."""
    cfg, why = completed("--stage", "2", "--init", str(stage1_run))
    assert cfg.queries == 4 and cfg.image_size == 64 and cfg.vit == TINY[1] and cfg.bert == TINY[3]
    assert f"from {stage1_run}: vit {TINY[1]}, " in " ".join(why.split())
    any_file = str(stage1_run / "config.json")
    cfg, why = completed("--stage", "vqa", "--init", "assets/tiny/blip2", "--data", any_file)
    why = " ".join(why.split())
    assert (cfg.llm, cfg.vit, cfg.queries, cfg.image_size) == ("assets/tiny/opt", "assets/tiny/vit", 8, 490)
    assert "OPT-2.7B" in why and "the language model has width 128" in why
    other = ["--vit", "clip-l", "--dropout", "0.3", "--llm", "flan-t5-xl"]
    cfg, _ = completed("--stage", "2", "--init", "assets/tiny/blip2", *other)
    assert (cfg.vit, cfg.dropout, cfg.llm) == ("clip-l", 0.3, "flan-t5-xl")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_without_a_name_is_where_the_docs_say(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = f"runs/stage{stage}" if stage in "12" else f"runs/{stage}"
    assert str(config.run_folder(TrainConfig(stage=stage))) == folder
    with pytest.raises(UserError, match=f"--resume: {folder} has no checkpoint yet: leave --resume out to start it"):
        train.main(["--resume", "--stage", stage])


# --- wrong flags -----------------------------------------------------------------------------------------------------

# S1 and S2 are runs of stages 1 and 2, VQA one with the question in the Q-Former, HF a public checkpoint, FILE a file.
WRONG = {
    "--stage 4": "got --stage 4, expected 1, 2, caption, vqa or retrieval",
    "--steps 0": "got --steps 0, expected at least 1",
    "--steps 1 --epochs 1": "got --steps and --epochs, expected one of them",
    "--lr 0.01 --min-lr 0.1": "got --min-lr 0.1, expected at most --lr 0.01",
    "--clip 0": "got --clip 0.0, expected above 0",
    "--beta2 1": "got --beta2 1.0, expected 0 or more, and below 1",
    "--seed -1": "got --seed -1, expected 0 or more",
    "--image-size 0": "got --image-size 0, expected 1 to 4096",
    "--cross-every 0": "got --cross-every 0, expected at least 1",
    "--precision int8": "got --precision int8, expected auto, fp32, bf16 or fp16",
    "--device tpu": "got --device tpu, expected auto, cuda, mps or cpu",
    "--losses itc,mlm": "got --losses itc,mlm, expected any of itc, itm, itg, with commas",
    "--losses itc,itc": "got --losses itc,itc, expected any of itc",
    "--micro-batch -4": "got --micro-batch -4, expected 0 or more",
    "--batch 10 --micro-batch 4": "does not divide into 1 processes with micro-batches of 4: pass --batch 12",
    "--batch 2 --micro-batch 4": "does not divide into 1 processes with micro-batches of 4: pass --batch 4",
    "--val-photos 2 --val-data FILE": "got --val-photos and --val-data, expected one of the two",
    "--data nowhere.json": "--data nowhere.json does not exist: expected an annotation file, a folder of images",
    "--val-data nowhere.json": "--val-data nowhere.json does not exist",
    "--init S1": "got --init, a flag of stage 2, caption, vqa, retrieval, in stage 1: leave it out",
    # stage 2
    "--stage 2": "stage 2 starts from a run of stage 1: pass --init runs/stage1, or --init none to go without",
    "--stage 2 --init nowhere": "--init nowhere is not a run: train it with --stage 1 --out nowhere, or pass --init",
    "--stage 2 --init none --losses itc": "got --losses, a flag of stage 1, retrieval, in stage 2: leave it out",
    "--stage 2 --init S1 --gradcache": "got --gradcache, a flag of stage 1, retrieval, in stage 2: leave it out",
    "--stage 2 --init S1 --queries 9": "got --queries 9, but S1 has 32: leave it out",
    "--stage 2 --init S1 --image-size 64": "got --image-size 64, but S1 has 224: leave it out",
    "--stage 2 --init S1 --data FILE --llm nowhere": "--llm nowhere does not exist: expected a folder, or a name (opt-",
    "--stage 2 --init HF": "--init HF is a public checkpoint, expected a run: make one of it with python -m tools.wei",
    "--stage 2 --init VQA": "--init VQA was fine-tuned with the question in the Q-Former: continue it in --stage vqa",
    # fine-tuning
    "--stage vqa": "stage vqa starts from a run of stage 2: pass --init runs/stage2",
    "--stage vqa --init nowhere": "--init nowhere is not a run: train it with --stage 2 --out nowhere",
    "--stage retrieval --init none": "stage retrieval starts from a run of stage 1: pass --init runs/stage1",
    "--stage retrieval --init S2": "is a run with a language model, stage retrieval starts from a run of stage 1",
    "--stage caption --init S1": "is a run without a language model, stage caption starts from a run of stage 2",
    "--stage caption --init S2 --no-condition": "got --condition, a flag of stage vqa, in stage caption",
    "--stage vqa --init VQA --no-condition": "--init VQA was fine-tuned with the question in the Q-Former",
    "--stage vqa --init S2 --template hello": "got --template hello, expected {} in it, where the question goes",
    "--stage vqa --init S2 --vit-lr-decay 2": "got --vit-lr-decay 2.0, expected above 0 and at most 1",
    "--epochs inf": "got --epochs inf, expected a number",
    "--lr inf": "got --lr inf, expected a number",
    "--lr nan": "got --lr nan, expected a number",
    f"--seed {10**40}": f"got --seed {10**40}, expected 0 or more, and below 2^63",
    "--image-size 100000": "got --image-size 100000, expected 1 to 4096",
    "--queries 1000000000": "got --queries 1000000000, expected 1 to 4096",
    "--embed-dim 1000000000": "got --embed-dim 1000000000, expected 1 to 65536",
    "--workers 100000": "got --workers 100000, expected -1 to 256",
    "--stage vqa --init S2 --epochs -1": "got --epochs -1.0, expected above 0",
    "--stage vqa --init S2 --val-data nowhere.json": "--val-data nowhere.json does not exist",
    "--stage vqa --init S2 --data FILE --data shapes": "got --data shapes beside other questions, expected one kind",
    "--stage vqa --init S2 --cache-features": "--cache-features keeps the tokens of a frozen ViT, here it is trained",
    "--stage retrieval --init S1 --gradcache": "--gradcache keeps the tokens of a frozen ViT, here it is trained: add "
    "--freeze-vit",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_get_a_sentence_before_any_part_is_loaded(tmp_path, flags):
    """What was got, what was expected, what to type."""
    (tmp_path / "HF").mkdir()
    (tmp_path / "HF/config.json").write_text('{"model_type": "blip-2"}')
    (tmp_path / "FILE").write_text("[]")
    config_of_a_run(tmp_path / "S1")
    config_of_a_run(tmp_path / "S2", llm="opt-2.7b")
    config_of_a_run(tmp_path / "VQA", llm="opt-2.7b", conditioned=True)
    words = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in flags.split()]
    with pytest.raises(UserError) as error:
        check(completed(*words)[0])
    assert WRONG[flags] in str(error.value).replace(f"{tmp_path}/", "")


def complaint(capsys, *flags: str) -> str:
    """What train.py prints when it refuses; it exits with 2."""
    try:
        status = run_command(lambda: train.main(list(flags)))
    except SystemExit as exit_:
        status = exit_.code
    printed = capsys.readouterr().err
    assert status == 2 and printed.startswith("error: ") and "Traceback" not in printed
    return printed.removeprefix("error: ")


VQA_RUN = "--stage vqa --init assets/tiny/blip2 "
UNFIT = {
    "--precision fp16 --device cpu": "--precision fp16 needs a CUDA GPU, this is cpu: pass --precision ",
    "--device cuda": "--device cuda, but PyTorch sees no CUDA GPU here: pass --device cpu",
    "--image-size 60": "--image-size 60 is no multiple of the patch size 8 of ",
    "--image-size 4": "--image-size 4 is no multiple of the patch size 8 of ",
    "--max-text-tokens 100": "got --max-text-tokens 100, expected 3 to 64, the positions that ",
    "--stage 2 --init none --llm nowhere": "--llm nowhere does not exist: expected a folder, or a name (opt-125m",
    VQA_RUN + "--image-size 60": "--image-size 60 is no multiple of the patch size 8 of ",
    VQA_RUN + "--data asked.json": "1 questions of --data have no answer: remove them, or if",
    VQA_RUN + "--data answered.json --val-data asked.json": "1 questions of --val-data have no answer: remove them",
    VQA_RUN + "--data captions.json": "captions.json: record 0 has ['caption', 'image'], expected \"image\" and \"ques",
}


@pytest.mark.parametrize("flags", UNFIT)
def test_what_does_not_fit_the_parts_or_the_data_gets_a_sentence_and_no_folder(tmp_path, capsys, flags):
    (tmp_path / "asked.json").write_text('[{"image": "0.png", "question": "what?"}]')
    (tmp_path / "answered.json").write_text('[{"image": "0.png", "question": "what?", "answer": "a dog"}]')
    (tmp_path / "captions.json").write_text('[{"image": "0.png", "caption": "a dog"}]')
    words = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in flags.split()]
    said = complaint(capsys, "--steps", "1", "--image-size", "64", "--out", str(tmp_path / "out"), *words)
    assert UNFIT[flags] in said.replace(f"{tmp_path}/", "")
    assert not (tmp_path / "out").exists()


def test_an_unknown_flag_is_answered_with_the_nearest(capsys):
    said = complaint(capsys, "--learning-rat", "1")
    assert "unrecognized arguments: --learning-rat 1" in said and "--help lists all flags" in said
    assert "did you mean --min-lr?" in complaint(capsys, "--min-l", "1")
    assert "did you mean --queries?" in complaint(capsys, "--querys", "1")


def test_a_flag_of_the_wrong_type_is_named(capsys):
    assert "argument --steps: invalid int value: 'many'" in complaint(capsys, "--steps", "many")


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_flag_of_a_stage_in_groups_with_the_recipes_values(capsys, stage):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--stage", stage, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0 and "None" not in text and "UnionType" not in text
    for name, field in FLAGS.items():
        mine = stage in field.metadata["stages"]
        assert (" ".join(field.metadata["help"].split()) in text) == mine, name
        assert not mine or f"--{name.replace('_', '-')} " in text or f"--{name.replace('_', '-')}, " in text, name
    places = [text.index(f" {group}: ") for group in config.GROUPS.values() if f" {group}: " in text]
    assert len(places) == len(config.GROUPS) - (stage == "2")  # which has no choice of objective
    assert places == sorted(places)
    if stage == "1":
        assert (
            "(default: paper 0.0001; tiny 0.001; small 0.0008)" in text
            and "(default: paper and small 224; tiny" in text
        )
        assert "paper 250000; tiny 1890; small by the number of images" in text and "of AdamW (default: 0.98)" in text


# --- a resumed run ---------------------------------------------------------------------------------------------------


def resumed(run, *flags: str) -> TrainConfig:
    return resume(run, *parse_flags(["--resume", "--out", str(run), *flags], ""))[0]


def test_a_resumed_run_keeps_its_flags_but_for_those_that_may_change(stage1_run):
    saved = resumed(stage1_run)
    assert (saved.batch, saved.queries, saved.lr, saved.negatives_ramp) == (4, 4, 1e-3, 2)
    assert resumed(stage1_run, "--batch", "4") == saved  # the same is no change
    may_change = dict(lr=0.5, eval_every=7, save_every=9, keep=3, log_every=1, workers=2)
    may_change |= dict(precision="bf16", device="cpu")
    flags = [word for name, value in may_change.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert resumed(stage1_run, *flags) == dataclasses.replace(saved, **may_change)


def test_flags_that_would_make_another_run_are_refused_on_resume(stage1_run):
    for flags, was in (
        ("--batch 64", "--batch 4"),
        ("--stage 2", "--stage 1"),
        ("--steps 99", "--steps 4"),
        ("--gradcache", "--gradcache False"),
        ("--val-photos 3", "--val-photos 0"),
    ):
        with pytest.raises(UserError) as error:
            resumed(stage1_run, *flags.split())
        assert f"{stage1_run} was started with {was}: leave those flags out" in str(error.value)


def test_what_cannot_be_resumed_gets_a_sentence(stage1_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="has no checkpoint yet: leave --resume out to start it, or pass --resume auto"):
        continues(tmp_path, parse_flags(["--resume"], "")[0])
    assert not continues(tmp_path, parse_flags(["--resume", "auto"], "")[0])
    assert continues(stage1_run, parse_flags(["--resume", "auto"], "")[0])
    broken = copy_of(stage1_run, tmp_path)
    (broken / "step-000004/train_state.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match="step-000004 is damaged .*: remove it to continue without; there is none bef"):
        resumed(broken)
    monkeypatch.setattr(config, "world_size", lambda: 3)
    divided = "4 images, which ITC and ITM compare at a time, do not divide into 3 processes: start one of 1, 2, 4"
    with pytest.raises(UserError, match=divided):
        resumed(stage1_run)


@pytest.mark.parametrize(
    ("flags", "before", "now", "expected"),
    [  # of a batch of 32: what 4 processes took at once -> what so many take now
        ("", 0, 2, 0),  # its share
        ("", 0, 16, 0),
        ("", 4, 2, 8),  # ITC goes on to compare 16
        ("", 4, 1, 16),
        ("", 4, 16, 1),
        ("", 4, 4, 4),
        ("--gradcache", 4, 1, 4),  # compares all 32 whatever the micro-batch
        ("--gradcache", 4, 16, 0),
        ("--gradcache", 0, 1, 8),
        ("--stage 2 --init none", 0, 2, 8),  # compares nothing, and needs no more memory than before
        ("--stage 2 --init none", 0, 32, 0),
    ],
)
def test_with_other_processes_as_many_images_are_compared_in_the_memory_there_is(
    flags, before, now, expected, monkeypatch, capsys
):
    saved, _ = completed("--batch", "32", "--micro-batch", str(before), *flags.split())
    monkeypatch.setattr(config, "world_size", lambda: now)
    assert config.share_out(saved, 4, 0) == config.share_out(saved, 4, before) == expected
    check(dataclasses.replace(saved, micro_batch=expected))
    said = capsys.readouterr().out
    assert (f"resumed with {now} process(es) instead of 4: samples and losses go on" in said) == (now != 4)


def old_config(**flags) -> dict:
    """The configuration in a run that was written when there were --itc-batch, --compile and --last-block."""
    saved = dataclasses.asdict(completed("--batch", "32", "--micro-batch", "8")[0])
    del saved["gradcache"]
    return saved | dict(itc_batch=0, compile=False, last_block=False) | flags


def test_an_older_run_resumes_without_the_flags_that_no_longer_exist():
    """ITC over the whole batch is --gradcache now; compiled blocks compute the same."""
    cfg, _ = completed("--batch", "32", "--micro-batch", "8")
    assert saved_config(old_config()) == saved_config(old_config(compile=True)) == cfg
    assert saved_config(old_config(itc_batch=32)) == dataclasses.replace(cfg, gradcache=True)
    assert saved_config(dataclasses.asdict(dataclasses.replace(cfg, gradcache=True))).gradcache
    for flags in (dict(itc_batch=16), dict(last_block=True)):
        with pytest.raises(UserError, match="started with --last-block, or with an --itc-batch below --batch"):
            saved_config(old_config(**flags))
