"""Several ranks compute what one process computes: the losses, gradients and hard negatives of one big batch, the same
runs, the same evaluation files."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import LLMS, ROOT, TINY, part_of, random_batch, small_model, stage2_model
from safetensors.torch import load_file
from samples import TINY_RUN, batches_of, caption_file, few, question_file, shapes_model
from test_train import retrieval_result
from torch.nn.parallel import DistributedDataParallel

import losses
import train
from blip2 import Blip2
from data import collate_lm
from engine import device, stop
from engine.distributed import all_gather, all_sum, fetch_rows, flights, rank, record_flight, world_size
from engine.errors import run_command, unexpected
from engine.gradcache import two_pass_losses
from engine.log import rows_of
from model import OBJECTIVES, Blip2Model
from sources.mixture import open_images
from tasks import batches as shares
from tasks import validation
from tasks.captions import captioning
from tasks.features import cache_tokens, write_features
from tasks.presets import write_result
from tasks.retrieval import retrieval
from tasks.shapes_qa import shapes_captioning, shapes_vqa
from tasks.vqa import vqa

IDS = [1, 2, 3, 4, 5, 6, 7, 2]  # one image twice
CAPTIONS = [
    "a small red circle above a large blue square",
    "three shapes",
    "a picture of a small green cross",
    "a star",
]


# --- one step --------------------------------------------------------------------------------------------------------


def step(model: Blip2, micro_batches: list, losses_of, learned: str = "") -> tuple[dict, dict]:
    """(losses, gradients) of losses_of(model, batch), summed over the micro-batches and the ranks. learned: the loss
    that the gradients are of, if not all."""
    sums = {}
    for batch in micro_batches:
        found = losses_of(model, batch)
        sum(loss for name, loss in found.items() if learned in ("", name)).backward()
        for name, loss in found.items():
            sums[name] = sums.get(name, 0) + loss.detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return tuple({name: all_sum(x) for name, x in found.items()} for found in (sums, gradients))


def stage1(model: Blip2, micro_batches: list, objectives: tuple[str, ...], learned: str = "") -> tuple[dict, dict]:
    """A step of stage 1."""
    totals, generator = Blip2.stage1_totals(micro_batches), torch.Generator().manual_seed(0)
    draw = dict(objectives=objectives, totals=totals, generator=generator)
    return step(model, micro_batches, partial(Blip2Model.stage1_losses, **draw), learned)


def gradcache(model: Blip2, micro_batches: list) -> tuple[dict, dict]:
    """A step of stage 1 with --gradcache."""
    generator = torch.Generator().manual_seed(0)
    return step(model, micro_batches, two_pass_losses(model, micro_batches, OBJECTIVES, generator, 1.0))


def assert_equal(found: tuple[dict, dict], expected: tuple[dict, dict], rtol: float = 1e-4) -> None:
    """The same losses and gradients, of the same parameters."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(
                tensor, theirs[name], rtol=rtol, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def own_rows(batch, rows: int) -> list:
    """This rank's micro-batches of so many rows, as `StepSampler` spreads them."""
    return [part_of(batch, range(n, n + rows)) for n in range(rank() * rows, len(batch), rows * world_size())]


def stage1_on_ranks(_, objectives, expected):
    model, batch = small_model(), random_batch(8, image_ids=IDS)
    model.train_heads(objectives)
    assert_equal(stage1(model, own_rows(batch, 8 // world_size()), objectives), expected)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("objectives", [OBJECTIVES, ("itc",), ("itm",), ("itg",), ("itm", "itg")], ids=",".join)
def test_ranks_have_the_losses_and_gradients_of_one_big_batch(ranks, processes, objectives):
    """Gathered features carry gradient, hard negatives come from all ranks, every loss is a mean over all rows. Every
    trained parameter has a gradient, for which DistributedDataParallel waits."""
    model, batch = small_model(), random_batch(8, image_ids=IDS)
    model.train_heads(objectives)
    expected = stage1(model, [batch], objectives)
    assert expected[1].keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    ranks(processes, stage1_on_ranks, objectives, expected)


def precision_on_ranks(_):
    found = "bf16" if rank() == 0 else "fp32"
    with mock.patch.object(device, "cpu_precision", lambda: (found, f"rank {rank()}")):
        assert device.choose_precision(torch.device("cpu")) == ("bf16", "rank 0")


def test_all_ranks_take_the_precision_that_the_first_has_measured(ranks):
    """Where cores are shared, two measurements may differ; so may two machines."""
    ranks(2, precision_on_ranks)


def test_accumulation_has_the_gradients_of_the_big_batch_for_itg_and_not_for_itc():
    """Tokens are tokens, but a text of another micro-batch is no negative: accumulation makes ITC easier."""
    batch = random_batch(8)
    parts = [part_of(batch, range(4)), part_of(batch, range(4, 8))]

    whole, expected = stage1(small_model(), [batch], OBJECTIVES, learned="itg")
    accumulated, gradients = stage1(small_model(), parts, OBJECTIVES, learned="itg")
    assert_equal(({"itg": accumulated["itg"]}, gradients), ({"itg": whole["itg"]}, expected))
    assert accumulated["itc"] < whole["itc"] - 0.3  # ln 4 against ln 8
    totals = {name: int(count) for name, count in Blip2.stage1_totals(parts).items()}
    assert totals == {"itc": 8, "itm": 24, "itg": sum(int((part.labels != losses.IGNORE).sum()) for part in parts)}


# --- GradCache -------------------------------------------------------------------------------------------------------


def gradcache_on_ranks(_, rows, expected):
    assert_equal(gradcache(small_model(), own_rows(random_batch(8, image_ids=IDS), rows)), expected)


@pytest.mark.parametrize(("processes", "rows"), [(1, 1), (1, 4), (2, 2)])
def test_gradcache_has_the_losses_and_gradients_of_the_big_batch(ranks, processes, rows):
    """All three losses, for hard negatives come from all micro-batches too; and the temperature's gradient."""
    expected = stage1(small_model(), [random_batch(8, image_ids=IDS)], OBJECTIVES)
    assert "temperature" in expected[1]
    if processes == 1:
        gradcache_on_ranks(0, rows, expected)
    else:
        ranks(processes, gradcache_on_ranks, rows, expected)


def test_both_passes_of_gradcache_have_the_same_dropout():
    """Else the gradient would be of other features than those that ITC compared."""
    model, micro_batches, seen = small_model(dropout=0.3).train(), [random_batch(3, 0), random_batch(3, 1)], []
    encode = model.encode
    model.encode = lambda *args: seen.append(encode(*args)) or seen[-1]
    gradcache(model, micro_batches)
    first, second, first_again, second_again = [torch.cat((*images, texts)) for images, texts, _ in seen]
    assert torch.equal(first, first_again) and torch.equal(second, second_again)
    images, texts, _ = encode(model.image_kv(model.batch_tokens(micro_batches[0])), micro_batches[0])
    assert not torch.allclose(first, torch.cat((*images, texts)))


# --- stage 2 and the ViT ---------------------------------------------------------------------------------------------


def stage2(kind: str, rows: slice) -> tuple[dict, dict]:
    """A step of stage 2 on some of four captions."""
    model, pixels = stage2_model(kind), torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    seeds, targets = [[0, row] for row in range(4)], [("", caption) for caption in CAPTIONS]
    batch = collate_lm(model.llm_tokenizer, targets, seeds, list(range(4)), images=pixels).map(lambda x: x[rows])
    return step(model, [batch], partial(Blip2Model.stage2_losses, totals=Blip2.stage2_totals([batch])))


def stage2_on_ranks(rank, kind, expected):
    assert_equal(stage2(kind, slice(2 * rank, 2 * rank + 2)), expected, rtol=1e-3)


@pytest.mark.parametrize("kind", LLMS)
def test_ranks_have_the_stage_2_gradient_of_one_big_batch(ranks, kind):
    """Though their captions have different lengths: the loss is a mean over the tokens of all ranks."""
    ranks(2, stage2_on_ranks, kind, stage2(kind, slice(4)))


@contextmanager
def negatives(*rows: int):
    """These rows are the hard negatives, of images and of texts."""
    with pytest.MonkeyPatch.context() as patch:
        found = torch.tensor(rows), torch.ones(len(rows), dtype=torch.bool)
        patch.setattr(losses, "sample_hard_negatives", lambda *_: found)
        yield


def vit_on_ranks(rank, expected):
    model, batch = small_model(), part_of(random_batch(4), range(2 * rank, 2 * rank + 2))
    model.unfreeze_vit()
    ddp = DistributedDataParallel(model)
    with negatives(1, 0):
        found = ddp(partial(Blip2Model.stage1_losses, totals=Blip2.stage1_totals([batch])), batch)
    (sum(found.values()) * 2).backward()  # DDP takes the mean over the ranks
    assert_equal(({}, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}), ({}, expected))


def test_a_trained_vit_has_the_gradient_of_one_big_batch_also_where_a_rank_fetches_no_image(ranks):
    """The negatives of rank 0 are its own images, those of rank 1 are rank 0's: the gradients of fetched images travel
    back all the same."""
    model = small_model()
    model.unfreeze_vit()
    with negatives(1, 0, 1, 0):
        _, expected = stage1(model, [random_batch(4)], OBJECTIVES)
    assert "vit.blocks.0.fc1.weight" in expected
    ranks(2, vit_on_ranks, expected)


# --- collectives -----------------------------------------------------------------------------------------------------


def fetch(rank):
    torch.manual_seed(rank)
    x = torch.arange(4.0)[:, None] + 100 * rank + torch.zeros(4, 3)
    x.requires_grad_()
    wanted = torch.tensor([[0, 5, 4, 5], [3, 3, 7, 0]])[rank]
    fetched, index = fetch_rows(x, wanted)
    assert len(fetched) == (2, 2)[rank]  # each row of another rank once
    rows = torch.cat((x, fetched))[index]
    assert torch.equal(rows, all_gather(x.detach())[wanted])
    rows.sum().backward()
    wanted_by_anyone = all_gather(wanted).bincount(minlength=8)[4 * rank : 4 * rank + 4]
    assert torch.equal(x.grad, wanted_by_anyone[:, None].expand(4, 3).float())


def test_only_wanted_rows_travel_and_their_gradients_travel_back(ranks):
    ranks(2, fetch)


def gather_and_add(rank):
    x, bias = torch.randn(2, requires_grad=True), torch.zeros(4, requires_grad=True)
    added = bias * 1
    ((all_gather(x) + added) * (rank + 1)).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 3.0)), x.grad  # of all ranks
    assert torch.equal(bias.grad, torch.full((4,), rank + 1.0)), bias.grad  # of this rank


def test_what_is_added_to_gathered_rows_keeps_its_own_gradient(ranks):
    ranks(2, gather_and_add)


def test_one_process_needs_no_group():
    assert (rank(), world_size()) == (0, 1) and not torch.distributed.is_initialized()
    x = torch.randn(3, requires_grad=True)
    assert all_gather(x) is x
    small_model().stage1_losses(random_batch(3))


# --- runs ------------------------------------------------------------------------------------------------------------

STAGE1 = [*TINY, *"--queries 4 --image-size 64 --embed-dim 16 --batch 8 --lr 1e-3 --warmup 1".split()]
SAME = "--steps 4 --dropout 0 --eval-every 0 --precision fp32 --workers 0".split()
GRADCACHE = ["--micro-batch", "2", "--gradcache"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Captions, and a run of one process on them."""
    folder = tmp_path_factory.mktemp("one")
    flags = [*STAGE1, *SAME, "--data", caption_file(folder, 24)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train.main([*flags, "--out", str(folder / "run")])
    return flags, folder / "run"


def same_run(one, two) -> None:
    """Equal losses, gradient norms and temperatures at each step, equal weights."""
    logs = [[json.loads(line) for line in open(run / "log.jsonl")][1:] for run in (one, two)]
    assert len(logs[0]) == 4
    for a, b in zip(*logs, strict=True):
        for key in a.keys() - {"images_per_s", "waited", "gigabytes", "trained_s"}:
            assert a[key] == pytest.approx(b[key], rel=2e-3 if key == "norm" else 2e-4), (a["step"], key)
    weights = [load_file(run / "model.safetensors") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:  # where a gradient is 0, AdamW's step is decided by rounding
        difference = (weights[0][name] - weights[1][name]).abs().mean().item()
        assert difference < 5e-5, f"{name} differs by {difference:.1e}"


def test_torchrun_trains_two_processes_like_one(tmp_path, one):
    """With dropout off: the same images, captions and negatives, the same losses, the same weights."""
    flags, run = one
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "train.py"]
    done = subprocess.run(
        [*command, *flags, "--out", str(tmp_path / "run")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    same_run(run, tmp_path / "run")


def train_on_ranks(_, flags):
    train.main(flags)


def test_two_ranks_with_gradcache_train_like_one_process_without(ranks, tmp_path, one):
    """Two micro-batches of two images on each rank are one batch of eight."""
    flags, run = one
    ranks(2, train_on_ranks, [*flags, *GRADCACHE, "--out", str(tmp_path / "run")])
    same_run(run, tmp_path / "run")


def test_two_ranks_fine_tune_like_one(ranks, tmp_path):
    """VQA: the ViT is trained, the Q-Former reads the question, two micro-batches are accumulated."""
    flags = ["--stage", "vqa", "--init", TINY_RUN, "--data", question_file(tmp_path, 8), *SAME]
    flags += "--batch 4 --micro-batch 1 --image-size 48 --lr 1e-3 --warmup 0 --no-freeze-vit".split()
    train.main([*flags, "--out", str(tmp_path / "one")])
    ranks(2, train_on_ranks, [*flags, "--out", str(tmp_path / "two")])
    assert "vit.blocks.0.fc1.weight" in load_file(tmp_path / "two/model.safetensors")
    same_run(tmp_path / "one", tmp_path / "two")


def train_and_record(_, flags, seen, last=0):
    """A training that is asked to stop in step `last`; notes the images of its rank's micro-batches in the folder."""
    optimize = train.optimize

    def recorded(ddp, optimizer, scaler, micro_batches, cfg, objectives, step):
        for number, batch in enumerate(micro_batches):
            (seen / f"{step}-{number}-{rank()}").write_text(json.dumps(batch.image_ids.tolist()))
        if step == last:
            stop.request(signal.SIGTERM)
        return optimize(ddp, optimizer, scaler, micro_batches, cfg, objectives, step)

    with pytest.MonkeyPatch.context() as patch, stop.signals():
        patch.setattr(train, "optimize", recorded)
        patch.setattr(train, "final_evaluation", lambda *_: None)
        try:
            train.main(flags)
        except stop.Stopped:
            assert last


def images_of(seen) -> dict[int, list[int]]:
    """The images of each step, in the order of micro-batches and ranks."""
    files = sorted(tuple(map(int, file.name.split("-"))) for file in seen.iterdir())
    steps = {step: [] for step, _, _ in files}
    for file in files:
        steps[file[0]] += json.loads((seen / "-".join(map(str, file))).read_text())
    return steps


FEWER = {  # flags of the run, and the micro-batches with which 4, 2 and 1 processes take its batch of 8
    "ITC over all": ("", [2, 4, 8]),
    "ITC over half": ("--micro-batch 1", [1, 2, 4]),
    "GradCache": ("--micro-batch 1 --gradcache", [1, 1, 1]),
    "stage 2": (f"--stage 2 --init {TINY_RUN}", [2, 2, 2]),
}


@pytest.mark.parametrize("name", FEWER)
def test_a_run_goes_on_with_fewer_processes_over_the_same_samples_with_the_same_losses(ranks, tmp_path, name, capsys):
    """4, 2 and 1 process(es), two steps each, beside one process that is not interrupted. Where images are compared,
    as many are at a time; else a process takes no more at once than before."""
    more, sizes = FEWER[name]
    flags = [*more.split(), *SAME, "--data", caption_file(tmp_path, 24)]
    flags = [*(flags if "stage" in more else STAGE1 + flags), "--steps", "6", "--batch", "8", "--warmup", "0"]
    whole = ["--micro-batch", "4"] if name == "ITC over half" else []
    one, many, seen_by_one, seen = (tmp_path / folder for folder in ("one", "many", "seen by one", "seen"))
    seen.mkdir(), seen_by_one.mkdir()
    train_and_record(0, [*flags, *whole, "--out", str(one)], seen_by_one)
    for processes, last in ((4, 2), (2, 4)):
        ranks(processes, train_and_record, [*flags, "--resume", "auto", "--out", str(many)], seen, last)
    train_and_record(0, [*flags, "--resume", "auto", "--out", str(many)], seen)
    assert "resumed with 1 process(es) instead of 2: samples and losses go on; dropout" in capsys.readouterr().out
    assert [len(json.loads((seen / f"{step}-0-0").read_text())) for step in (2, 4, 6)] == sizes
    assert images_of(seen) == images_of(seen_by_one)
    logs = [[row for row in rows_of(run / "log.jsonl") if "loss" in row] for run in (one, many)]
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(*logs, strict=True):
        for key in {"itc", "itm", "itg", "lm", "loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)


# --- several machines ------------------------------------------------------------------------------------------------


def train_on_a_machine(number, flags, folder, last):
    """A training of a rank that is alone on its machine, with a disk of its own, which is asked to stop in step `last`;
    keeps the weights it has in the end."""
    set_lr, final, taken = train.set_lr, train.final_evaluation, []

    def asked_to_stop(*args):
        taken.append(1)
        if len(taken) == last:
            stop.request(signal.SIGTERM)
        set_lr(*args)

    def evaluated(model, *args):
        result = final(model, *args)
        torch.save(dict(model.trained_state()), "weights.pt")
        return result

    with pytest.MonkeyPatch.context() as patch, stop.signals():
        patch.chdir(folder / str(number))
        for name, value in {"GROUP_RANK": number, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
            patch.setenv(name, str(value))
        patch.setattr(
            train, "set_lr", lambda *a: taken.append(1) or len(taken) == last and stop.request(15) or set_lr(*a)
        )
        patch.setattr(train, "final_evaluation", evaluated)
        patch.setattr(validation, "evaluate", lambda *_, **__: retrieval_result(50.0))
        patch.setattr(validation, "validation_lines", lambda *_: "validated")
        patch.setattr(validation, "report", lambda *_, **__: None)
        try:
            train.main(flags)
        except stop.Stopped:
            assert last


def test_machines_need_no_shared_disk(ranks, tmp_path):
    """The run is on that of rank 0; a machine that does not see it gets the checkpoint to resume from, and the best
    model in the end, and has a feature cache of its own."""
    flags = f"--stage 2 --init {TINY_RUN} --steps 4 --save-every 2 --eval-every 4 --keep 2 --batch 4 --warmup 0".split()
    flags = [*SAME, *flags, "--cache-features", "--data", caption_file(tmp_path, 12), "--out", "runs/a"]
    for number in "01":
        (tmp_path / number).mkdir()
    ranks(2, train_on_a_machine, flags, tmp_path, 2)
    for cached in (tmp_path / "1/runs/features").iterdir():  # this machine has been replaced
        cached.unlink()
    ranks(2, train_on_a_machine, [*flags, "--resume"], tmp_path, 0)

    assert [row["step"] for row in rows_of(tmp_path / "0/runs/a/log.jsonl") if "lm" in row] == [1, 2, 3, 4]
    caches = [contents_of(tmp_path / f"{number}/runs/features") for number in (0, 1)]
    assert caches[0] == caches[1] and len(caches[0]) == 2
    assert {path.name for path in (tmp_path / "1/runs").iterdir()} == {"features", ".a.copy"}
    copied, sent = tmp_path / "1/runs/.a.copy/step-000002", tmp_path / "0/runs/a/step-000002"
    assert contents_of(copied) == contents_of(sent) and "train_state.pt" in contents_of(sent)
    best = load_file(tmp_path / "0/runs/a/best/model.safetensors")
    for number in (0, 1):
        weights = torch.load(tmp_path / f"{number}/weights.pt")
        assert all(torch.equal(weights[name], tensor) for name, tensor in best.items())


def contents_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_nccl_is_asked_to_write_its_last_collectives_beside_the_log(tmp_path, monkeypatch):
    """Of those of this start the last sentence speaks. (NCCL itself needs GPUs.)"""
    names = "TORCH_FR_BUFFER_SIZE TORCH_FR_DUMP_TEMP_FILE TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_NCCL_ASYNC_ERROR_HANDLING"
    names, old = names.split(), "TORCH_NCCL_TRACE_BUFFER_SIZE"
    for name in (*names, old):  # set, so that they are restored
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv(old, "50")  # the user's
    monkeypatch.setenv(names[-1], "1")  # torchrun's
    record_flight(tmp_path)
    assert [os.environ.get(name) for name in names] == [None, f"{tmp_path}/flight-rank", "1", "3"]
    assert flights() == ""
    for number, age in ((0, 0), (1, 1e6), (10, 0)):
        file = tmp_path / f"flight-rank{number}"
        file.touch()
        os.utime(file, (time.time() + 1 - age,) * 2)
    monkeypatch.setattr("engine.errors.world_size", lambda: 2)
    said = unexpected(RuntimeError("[gloo] Connection closed by peer"))
    files = f"{tmp_path}/flight-rank0, {tmp_path}/flight-rank10"
    how = f"read them with torchfrtrace -p flight-rank {tmp_path}"
    assert said.endswith(f"; the last collectives of each rank: {files}; {how}")


def test_a_command_leaves_the_process_group(tmp_path):
    """Threads of gloo that outlive the interpreter may abort the process, after all was done."""

    def main():
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        assert dist.is_initialized()

    assert run_command(main) == 0 and not dist.is_initialized()


# --- evaluations -----------------------------------------------------------------------------------------------------


def evaluate_all(_, folder, data, count):
    """Each task on some images in batches of 8; rank 0 writes."""
    model, captioner, images = shapes_model(), Blip2.from_pretrained(TINY_RUN), few(count)
    captions = open_images([str(data / "captions.json")], "val", 64)
    questions = open_images([str(data / "questions.json")], "val", 64, questions=True)
    with batches_of(8):
        results = {
            "retrieval": retrieval(model, images, k=4),
            "captions": captioning(captioner, captions),
            "answers": vqa(captioner, questions),
            "shapes captions": shapes_captioning(stage2_model("opt"), images),
            "shapes answers, opt": shapes_vqa(stage2_model("opt"), images, controls=False),
            "shapes answers, t5": shapes_vqa(stage2_model("t5"), images),
        }
        paths, texts = [data / f"{i}.png" for i in range(count)], ["a red star", "two circles"]
        write_features(model, paths, texts, str(folder / "features.safetensors"), workers=0)
        cache_tokens(model, images, folder / "cache", workers=0)
    for name, result in results.items():
        if rank() == 0:
            write_result(folder / f"{name}.json", result)


@pytest.mark.parametrize(("processes", "count"), [(2, 20), (3, 10)])
def test_ranks_write_the_files_of_one_process(ranks, tmp_path, few_test_images, processes, count):
    """Batches are formed before they are spread over the ranks, in fp32: the same bytes. Two ranks have one and two
    batches, three have none, one and one."""
    caption_file(tmp_path, count)
    question_file(tmp_path, count)
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    evaluate_all(0, tmp_path / "one", tmp_path, count)
    ranks(processes, evaluate_all, tmp_path / "many", tmp_path, count)
    one, many = map(contents, (tmp_path / "one", tmp_path / "many"))
    assert one.keys() == many.keys() and len(one) == 11
    for name, content in one.items():
        assert many[name] == content, name


def contents(folder) -> dict[str, bytes]:
    """The files of a folder, of .safetensors each tensor: the order of its metadata is random."""
    found = {file.name: file.read_bytes() for file in folder.rglob("*.*") if file.suffix != ".safetensors"}
    return found | {
        name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "features.safetensors").items()
    }


def test_shares_of_the_ranks_are_whole_batches_and_cover_all(monkeypatch):
    for count, processes in ((0, 1), (1, 3), (130, 2), (640, 4), (5000, 8)):
        monkeypatch.setattr(shares, "world_size", lambda n=processes: n)
        parts = shares.shard_slices(count)
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
        assert all(part.start % 64 == 0 for part in parts if part.stop > part.start)
