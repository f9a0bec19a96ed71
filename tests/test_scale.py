"""docs/scale.md: its tables are calculated as bench.py counts and as a training estimates; its batch script is stopped,
put back, and continues."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, random_batch, small_model, stage2_model

import bench
import config
from engine.log import memory_estimate
from llm import OPT, T5, OPTConfig, T5Config
from model import OBJECTIVES
from qformer import QFormerConfig
from tools import models, scale
from tools.results import with_tables
from vit import PRESETS, ViTConfig

PAGE = scale.PAGE.read_text()
SCRIPT = next(block for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) if "#SBATCH" in block)


# --- the calculator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("llm", ["", "small-opt", "small-t5"])
def test_flops_are_those_that_bench_counts_in_a_step(llm, monkeypatch):
    """There over real tensors, here over tensors without data."""
    monkeypatch.setattr(bench, "peak_flops", lambda *_: 1e9)
    small = dict(vocab_size=600, width=32, depth=2, heads=2, mlp=64)
    monkeypatch.setattr(bench, "QFormerConfig", partial(QFormerConfig, **small | {"vocab_size": 30523}))
    monkeypatch.setitem(PRESETS, "small", ViTConfig(width=24, depth=2, heads=2, mlp=48, patch_size=8, image_size=32))
    monkeypatch.setitem(OPT.presets, "small-opt", OPTConfig(**small, embed_width=32))
    monkeypatch.setitem(T5.presets, "small-t5", T5Config(**small, decoder_depth=2, head_width=16))
    what, recipe = ("stage2", "stage 2, paper, OPT") if llm else ("stage1", "stage 1, paper, ViT-g")
    run = scale.run_of("small", llm, recipe, image_size=32, queries=4)
    flags = ["--vit", "small", "--image-size", "32", "--queries", "4", "--batch", "8", "--precision", "fp32"]
    flags += ["--device", "cpu", "--warmup", "0", "--repeats", "1", *(["--llm", llm] if llm else [])]
    assert run.flops[0] / 1e9 == pytest.approx(bench.main([what, *flags])["numbers"]["GFLOPs per image"])
    assert bool(llm) or run.flops[1] > run.flops[0]  # --gradcache runs queries and texts twice


def test_memory_is_what_a_training_prints_at_its_start():
    """Of the micro-batch; with --gradcache, the tokens of the whole share as well."""
    model = small_model()
    run = SimpleNamespace(model=model, objectives=OBJECTIVES, batch=24)
    assert scale.memory(run, 2, 12) == sum(memory_estimate(model, 12, OBJECTIVES).values())
    assert scale.memory(run, 2, 4) == sum(memory_estimate(model, 4, OBJECTIVES, 12).values())


def test_a_sharded_language_model_takes_its_share_one_block_and_what_is_in_none():
    llm = stage2_model("opt").llm
    whole, block = (sum(p.nbytes for p in part.parameters()) for part in (llm, llm.blocks[0]))
    rest = whole - len(llm.blocks) * block
    assert whole - scale.saved_by_sharding(llm, 1) == whole + block + rest
    shares = [scale.saved_by_sharding(llm, 1) + part for part in (0, whole // 2)]
    assert scale.saved_by_sharding(llm, 2) == pytest.approx(shares[1], rel=0.02)  # rows are rounded up


def count_bytes(rank: int) -> None:
    sent, model = dict.fromkeys(bench.CALLS, 0), small_model()
    batch = random_batch(4, rank, list(range(4 * rank, 4 * rank + 4)))
    tokens = batch.text_ids.shape[1]
    with bench.counted_bytes(sent):
        sum(model.stage1_losses(batch, generator=torch.Generator().manual_seed(0)).values()).backward()
    _, features, images, _ = scale.sent(SimpleNamespace(model=model, batch=8), 2, tokens)
    assert features <= sent["all_gather"] + sent["all_reduce"] <= features + 100  # and denominators
    assert sent["all_to_all_single"] <= 2 * 2 * images  # fp32 here, and its backward pass


def test_the_bytes_that_are_sent_are_those_that_bench_counts(ranks):
    """With two ranks what goes around a ring is what a rank hands over."""
    ranks(2, count_bytes)


def test_the_tables_are_current(monkeypatch):
    """`python -m tools.scale` writes them anew; here two models of six, as counting takes seconds."""
    titles = [line.split(" | ")[0].strip("| ") for line in PAGE.splitlines() if line.startswith("| stage")]
    assert titles == [*scale.RUNS, *(title for title in scale.RUNS for _ in scale.GPUS)]
    few = {title: scale.RUNS[title] for title in ("stage 1, ViT-L", "stage 2, OPT-2.7B")}
    monkeypatch.setattr(scale, "RUNS", few)
    left_out = "".join(
        line for line in PAGE.splitlines(True) if not re.match(r"\| stage", line) or line[2:].startswith(tuple(few))
    )
    assert with_tables(PAGE, [scale.models, scale.runs]) == left_out


def test_the_counts_are_within_a_thousandth_of_those_on_the_h100():
    for line, name in (("stage 1, ViT-g", "bench-stage1-h100"), ("stage 2, OPT-2.7B", "bench-stage2-h100")):
        cells = next(row for row in PAGE.splitlines() if row.startswith(f"| {line}")).split(" | ")
        counted = scale.log(name)["numbers"]["GFLOPs per image"]
        assert float(cells[5].replace(",", "")) == pytest.approx(counted, rel=2e-3)


def test_the_tables_of_models_are_current(monkeypatch):
    """`python -m tools.models` writes them anew; here one pair of eight, as counting takes seconds."""
    page, (vit, llm) = models.PAGE.read_text(), models.PAIRS[0]
    found = re.findall(r"^\| `(\w[\w.-]+)`, `([\w.-]+)` \|", page, re.MULTILINE)
    assert found == list(models.PAIRS)
    monkeypatch.setattr(models, "PAIRS", [(vit, llm)])
    left_out = "".join(
        line for line in page.splitlines(True) if not re.match(r"\| `\w[\w.-]+`, ", line) or f"`{vit}`, `{llm}`" in line
    )
    assert with_tables(page, models.TABLES) == left_out


def test_the_estimate_of_models_is_near_what_the_h100_measured():
    """ViT-g and OPT-2.7B, by the page: FLOPs to a thousandth, memory 31 % above."""
    page, log = models.PAGE.read_text(), scale.log("bench-stage2-h100")
    cells = next(row for row in page.splitlines() if row.startswith("| `eva-g`, `opt-2.7b` |")).split(" | ")
    assert float(cells[-1].strip(" |").replace(",", "")) == pytest.approx(log["numbers"]["GFLOPs per image"], rel=2e-3)
    said = float(re.search(r"estimate that a training prints at its start: (\d+) % above", page)[1])
    estimated = float(re.search(r"(\d+\.\d)\s+and \d+\.\d in stage 2 with OPT-2.7B and 128", PAGE)[1])
    assert 100 * (estimated / log["numbers"]["peak memory, GB"] - 1) == pytest.approx(said, abs=1)


# --- the recipes -----------------------------------------------------------------------------------------------------


def test_the_flags_of_the_recipes_exist(tmp_path, monkeypatch):
    (tmp_path / "paper.json").write_text('{"stage": "1", "batch": 1696}')
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "train.py" in line]
    assert len(lines) == 3
    for words in map(shlex.split, lines):
        cfg, _ = config.parse_flags(words[words.index("train.py") + 1 :], "")
        assert (cfg.batch, cfg.resume) == (1696, "auto")


@pytest.mark.parametrize("batch", re.findall(r"take ([\d,]+), ([\d,]+) and ([\d,]+),", PAGE)[0])
def test_the_batches_for_32_gpus_divide(batch):
    assert int(batch.replace(",", "")) % 32 == 0


STUBS = {
    "srun": """
        args = [word for word in sys.argv[1:] if not word.startswith(("--kill-on", "--wait"))]
        nodes = [subprocess.Popen(args) for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
        signal.signal(signal.SIGTERM, lambda *_: [node.send_signal(signal.SIGTERM) for node in nodes])
        sys.exit(max(node.wait() for node in nodes))""",
    "scontrol": """
        print("localhost") if sys.argv[1] == "show" else open("requeued", "a").write(sys.argv[2] + "\\n")""",
    "torchrun": """
        words = [ROOT + "/train.py", *sys.argv[sys.argv.index("train.py") + 1:]]
        os.execv(sys.executable, [sys.executable, *words])""",
}


def stub(folder, name: str) -> None:
    """A stand-in for a command."""
    lines = [line.strip() for line in STUBS[name].splitlines()[1:]]
    head = [f"#!{sys.executable}", "import os, signal, subprocess, sys", f"ROOT = {str(ROOT)!r}"]
    (folder / name).write_text("\n".join([*head, *lines]) + "\n")
    (folder / name).chmod(0o755)


def test_the_batch_script_stopped_by_sigusr1_is_put_back_once_and_continues(tmp_path):
    """Its own text, with stand-ins for SLURM and torchrun, and a configuration of a run of seconds."""
    assert subprocess.run(["bash", "-n"], input=SCRIPT, text=True).returncode == 0
    for name in STUBS:
        stub(tmp_path, name)
    flags = [*TINY, "--steps", "40", "--batch", "4", "--queries", "2", "--eval-every", "0", "--log-every", "1"]
    flags += ["--test-images", "4", "--device", "cpu", "--precision", "fp32", "--workers", "0"]
    cfg, given = config.parse_flags(flags, "")
    saved = {name: getattr(cfg, name) for name in given}
    (tmp_path / "paper.json").write_text(json.dumps({"stage": "1"} | saved))
    (tmp_path / "job").write_text(SCRIPT)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]"}
    env |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1", "OMP_NUM_THREADS": "1"}

    def job() -> subprocess.Popen:
        return subprocess.Popen(["bash", "job"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)

    def steps() -> int:
        log = tmp_path / "runs/stage1/log.jsonl"
        return log.read_text().count('"images_per_s"') if log.exists() else 0

    first = job()
    while steps() < 3 and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    first.communicate(timeout=300)
    assert first.returncode == 143 and (tmp_path / "requeued").read_text() == "7\n"
    saved_at = int(next((tmp_path / "runs/stage1").glob("step-*")).name[5:])
    assert 3 <= saved_at < 40

    second = job()
    printed = second.communicate(timeout=300)[0]
    assert second.returncode == 0 and f"resuming runs/stage1 at step {saved_at}" in printed
    assert steps() == 40 and (tmp_path / "requeued").read_text() == "7\n"
