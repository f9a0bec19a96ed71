"""Training does what it says: recipe and schedule, what is frozen, resuming, accumulation, many processes."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, small_model
from safetensors.torch import load_file

import train
from blip2 import Blip2
from train import TrainConfig, build_optimizer, complete, lr_at, main, memory_estimate, parse_flags, parts_table

FAST = [*TINY, "--stage", "1", "--batch", "8", "--queries", "4", "--eval-every", "0", "--precision", "fp32"]


@pytest.fixture
def run_train(monkeypatch):
    """run_train(out, flags...) -> the rows of the log. The evaluation of 1,000 pictures at the end is left out."""
    way = {"image_to_text": {}, "text_to_image": {}}
    nothing = dict.fromkeys(("chance", "shuffled pictures", "itc"), way) | {"subsets": {}, "mistakes": []}
    monkeypatch.setattr(train, "retrieval", lambda *_, **__: {"photos": 0, "texts": 0, "seconds": 0, **nothing})

    def run(out, *flags):
        main(["--resume", "--out", str(out)] if flags == ("--resume",) else [*FAST, "--out", str(out), *flags])
        return rows(out)

    return run


def rows(out):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


# --- recipe, schedule, optimizer


def test_paper_recipe_is_the_papers():
    """Section 3.4: 250k steps of 1680, AdamW (0.9, 0.98), decay 0.05, peak 1e-4, 2k warm-up, 224 pixels."""
    cfg, why = complete(*parse_flags(["--data", "coco.json"]))
    assert (cfg.steps, cfg.batch, cfg.warmup, cfg.image_size) == (250_000, 1680, 2000, 224)
    assert (cfg.lr, cfg.beta2, cfg.weight_decay) == (1e-4, 0.98, 0.05)
    assert (cfg.queries, cfg.embed_dim) == (32, 256)  # 3.1, and the original's
    assert 'recipe "paper", because --data is not shapes' in why
    assert complete(*parse_flags([]))[1].startswith('recipe "tiny", because --data is shapes')
    cfg, why = complete(*parse_flags(["--steps", "7", "--lr", "0.5"]))
    assert cfg.steps == 7 and cfg.lr == 0.5 and "steps" not in why  # a flag wins over the recipe


def test_learning_rate_at_some_steps():
    cfg = TrainConfig(steps=1000, lr=1e-4, min_lr=1e-5, warmup=100)
    assert lr_at(1, cfg) == pytest.approx(1e-6) and lr_at(50, cfg) == pytest.approx(5e-5)
    assert lr_at(100, cfg) == pytest.approx(1e-4) and lr_at(1000, cfg) == pytest.approx(1e-5)
    assert lr_at(550, cfg) == pytest.approx(5.5e-5)
    assert lr_at(325, cfg) == pytest.approx(1e-5 + 9e-5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_at(1, TrainConfig(steps=1, lr=1e-3, min_lr=0.0, warmup=0)) == 0.0


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
    from conftest import random_batch

    optimizer = build_optimizer(model, TrainConfig(lr=1e-2, beta2=0.98, weight_decay=0.0))
    sum(model.stage1_losses(random_batch(4)).values()).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("vit.")
        assert torch.equal(parameter, before[name]) == name.startswith("vit."), name


def test_a_batch_is_learned_by_heart():
    """All three losses fall far below chance on four pairs: gradients go where they should."""
    from conftest import random_batch

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
    straight = run_train(tmp_path / "straight", "--steps", "6", "--save-every", "3", "--keep", "2")
    broken = tmp_path / "broken"
    run_train(broken, "--steps", "6", "--save-every", "3", "--keep", "2")
    shutil.rmtree(broken / "step-000006")  # as if it had died after the checkpoint of step 3
    resumed = run_train(broken, "--resume")
    for key in ("itc", "itm", "itg", "lr", "norm", "temperature"):
        assert [row[key] for row in resumed] == [row[key] for row in straight], key
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]
    one, other = (load_file(run / "model.safetensors") for run in (tmp_path / "straight", broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


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
    scores = iter([10.0, 30.0, 20.0])

    def fake(model, photos, k=128, **_):
        way = dict.fromkeys(("R@1", "R@5", "R@10"), next(scores) if k == 16 else 0.0)
        both = {"image_to_text": way, "text_to_image": way}
        return {"photos": 1, "texts": 1, "k": k, "seconds": 0, "chance": both, "shuffled pictures": both, "itc": both,
                "reranked": both, "subsets": {}, "mistakes": []}  # fmt: skip

    monkeypatch.setattr(train, "retrieval", fake)
    main([*FAST, "--out", str(tmp_path), "--steps", "6", "--eval-every", "2", "--save-every", "2", "--keep", "3"])
    best = (tmp_path / "best/model.safetensors").read_bytes()
    assert best == (tmp_path / "step-000004/model.safetensors").read_bytes()
    assert best != (tmp_path / "model.safetensors").read_bytes()


def test_every_step_is_in_the_log_with_the_true_means(tmp_path, run_train):
    """One line a step whatever --log-every says; accumulated micro-batches are averaged over all their words."""
    whole = run_train(tmp_path / "whole", "--steps", "3", "--log-every", "2", "--losses", "itc,itg", "--dropout", "0")
    parts = run_train(
        tmp_path / "parts",
        "--steps",
        "3",
        "--log-every",
        "2",
        "--losses",
        "itc,itg",
        "--dropout",
        "0",
        "--micro-batch",
        "2",
    )
    assert [row["step"] for row in whole] == [1, 2, 3]
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(a["itc"] + a["itg"])
        assert b["itg"] == pytest.approx(a["itg"], rel=0.02 * a["step"])
        assert b["itc"] < a["itc"] - 0.5  # two candidates against eight
    assert parts[0]["itg"] == pytest.approx(whole[0]["itg"], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_it(tmp_path, run_train):
    with pytest.raises(train.UserError, match="the it. loss became (nan|inf) at step . .* lower --lr"):
        run_train(tmp_path, "--steps", "5", "--lr", "1e30", "--warmup", "0", "--clip", "1e30")


def test_cached_features_train_like_the_encoder_itself(tmp_path, capsys, run_train):
    """The ViT runs once per photo; the file is found again; without augmentation both ways see the same pictures."""
    from test_data import write_photos

    path = write_photos(tmp_path, 20, (64, 64))
    flags = [
        "--data",
        str(path),
        "--image-size",
        "64",
        "--steps",
        "3",
        "--dropout",
        "0",
        "--val-photos",
        "4",
        "--warmup",
        "1",
    ]
    flags += ["--save-every", "3", "--embed-dim", "8", "--cache-features"]
    first = run_train(tmp_path / "runs/a", *flags)
    assert "caching the ViT's tokens of 20 photos" in capsys.readouterr().out
    again = run_train(tmp_path / "runs/b", *flags)
    assert "caching" not in capsys.readouterr().out
    assert [row["loss"] for row in first] == [row["loss"] for row in again]
    assert len(list((tmp_path / "runs/features").iterdir())) == 2  # tokens, and which photos were unreadable


# --- one process and many


def torchrun(processes, out, *flags):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    done = subprocess.run(
        [*command, "train.py", *FAST, "--out", str(out), *flags], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return rows(out)


def test_two_processes_train_like_one(tmp_path, run_train):
    """With dropout off: the same pictures, captions and negatives, the same losses, the same weights."""
    flags = ["--steps", "4", "--dropout", "0", "--warmup", "1", "--lr", "1e-3", "--save-every", "2"]
    one = run_train(tmp_path / "one", *flags)
    two = torchrun(2, tmp_path / "two", *flags)
    for a, b in zip(one, two, strict=True):
        for key in ("itc", "itm", "itg", "norm", "temperature"):
            assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(
            weights[0][name], weights[1][name], rtol=1e-2, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


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
