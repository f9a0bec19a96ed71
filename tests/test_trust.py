"""Nothing is lost: what is written is whole or absent, one command at a time writes into a folder, a damaged checkpoint
is told from a good one, changed data from the old. (What is done to the commands from outside: tests/faults.py.)"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, copy_of
from PIL import Image
from safetensors.torch import load_file, save_file
from samples import caption_file
from test_data import sampler, train_set
from test_sources import write_annotations

import train
from data import train_loader
from engine import checkpoint, files, lock, stop
from engine.errors import UserError, run_command
from engine.log import rows_of
from sources.mixture import open_images
from tasks import features, validation
from tests.fault_disks import fill, mounted

SMALL = [*TINY, *"--steps 4 --batch 4 --queries 2 --image-size 64 --eval-every 0 --save-every 2 --keep 2".split()]


@pytest.fixture
def train_in(monkeypatch):
    """train_in(folder, *flags): exit status of a training without its final evaluation."""
    monkeypatch.setattr(train, "final_evaluation", lambda *_: None)
    return lambda folder, *flags: run_command(lambda: train.main([*map(str, flags), "--out", str(folder)]))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space"), RuntimeError("[enforce fail at inline_container.cc:672]")])
def test_a_file_that_cannot_be_written_is_a_sentence_and_leaves_the_old_one(tmp_path, error):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(
        UserError, match=r"a.json cannot be written \(No space left on device, 9.0 MB are needed, .* free"
    ):
        with files.whole(tmp_path / "a.json", 9_000_000) as partial:
            partial.write_text("half")
            raise error
    assert content(tmp_path) == {"a.json": b"old"}


def test_an_error_of_the_program_is_none_of_the_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), files.whole(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("half")
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_what_is_written_has_the_permissions_of_a_new_file_and_follows_links(tmp_path):
    (tmp_path / "real").write_text("old")
    os.symlink(tmp_path / "real", tmp_path / "link")
    before = os.umask(0o027)
    try:
        with files.whole(tmp_path / "link") as partial:
            save_file({"x": torch.zeros(2)}, partial)  # safetensors lets only the owner read
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink() and load_file(tmp_path / "real")["x"].shape == (2,)
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    with files.whole("/dev/null") as partial:
        partial.write_text("a device stays one")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("out", ["/etc/passwd/a.json", "/proc/a.json", "{}/" + "x" * 300 + ".json"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, out, capsys):
    flags = ["--checkpoint", "assets/tiny/blip2", "--out", out.format(tmp_path)]
    from eval import main

    assert run_command(lambda: main(["captions", *flags])) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --out ") and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_run_is_not_begun_without_room_for_its_checkpoints(tmp_path, train_in, capsys, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda _: 20_000_000)
    assert train_in(tmp_path / "a/run", *SMALL) == 2
    said = capsys.readouterr()
    assert "a run that keeps 2 checkpoints and the best one needs 71." in said.err and not list(tmp_path.iterdir())
    assert "a checkpoint takes 18.0 MB" in said.out


# --- locks -----------------------------------------------------------------------------------------------------------


def in_another_process(function, *args) -> int:
    """Exit status of a fork that calls it."""
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    child.join()
    return child.exitcode


def lock_and(folder: Path, action) -> None:
    with lock.locked(folder):
        action()


def test_a_folder_that_is_in_use_is_refused_and_left_alone(tmp_path, capfd):
    with lock.locked(tmp_path / "new/run"):
        in_use = lambda: sys.exit(run_command(lambda: lock_and(tmp_path / "new/run", print)))  # noqa: E731
        assert in_another_process(in_use) == 2
        assert (tmp_path / "new/run/.lock").exists()
    assert f"run is in use: process {os.getpid()} on " in capfd.readouterr().err
    assert not list(tmp_path.iterdir())  # nothing was written


def test_the_lock_of_a_dead_process_is_told_apart(tmp_path, capsys):
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    assert in_another_process(lock_and, tmp_path, die) == -signal.SIGKILL
    assert lock.abandoned(tmp_path)
    with lock.locked(tmp_path):
        assert "has ended without a word; its lock is taken over" in capsys.readouterr().out
    assert not lock.abandoned(tmp_path) and not list(tmp_path.iterdir())


# --- checkpoints -----------------------------------------------------------------------------------------------------


def edit_state(change):
    """A damage: a train_state.pt that is whole but changed."""

    def damage(folder: Path) -> None:
        state = torch.load(folder / "train_state.pt", weights_only=True)
        torch.save(change(state) or state, folder / "train_state.pt")

    return damage


def flip(name: str, share: float):
    """A damage: another bit at so much of the file."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(share * len(data))] ^= 64
        (folder / name).unlink()  # not its hard links too
        (folder / name).write_bytes(data)

    return damage


def moments(state: dict) -> dict:
    return state["optimizer"]["state"][0]


DAMAGES = {
    "weights": flip("model.safetensors", 0.7),
    "moments": flip("train_state.pt", 0.5),
    "tokenizer": flip("tokenizer.json", 0.5),
    "no pickle": lambda folder: (folder / "train_state.pt").write_bytes(b"PK"),
    "empty": edit_state(lambda state: {1: 2}),
    "no rng": edit_state(lambda state: {key: value for key, value in state.items() if key != "rng"}),
    "rng": edit_state(lambda state: state | {"rng": [{"cpu": torch.zeros(3, dtype=torch.uint8)}]}),
    "step": edit_state(lambda state: state | {"step": 10**9}),
    "shape": edit_state(lambda state: moments(state).update(exp_avg=torch.ones(3))),  # it would corrupt the heap
    "dtype": edit_state(lambda state: moments(state).update(exp_avg=moments(state)["exp_avg"].double())),
    "nan": edit_state(lambda state: moments(state).update(exp_avg_sq=moments(state)["exp_avg_sq"] * float("nan"))),
    "other": edit_state(lambda state: state["optimizer"]["state"].update({999: moments(state)})),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(name, tmp_path, stage1_run, train_in, capsys):
    run = copy_of(stage1_run, tmp_path)
    shutil.copytree(run / "step-000004", run / "step-000002")
    DAMAGES[name](run / "step-000004")
    before = content(run)
    assert train_in(run, "--resume") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: --resume: {run}/step-000004 is damaged (")
    assert said.endswith(f"remove it to continue without; {run}/step-000002 is the one before it")
    after = content(run)
    assert before == {name: after[name] for name in before}


def test_weights_that_are_not_finite_are_not_saved(tmp_path, train_in, capsys, monkeypatch):
    """Not even where the loss is: it is that before the update."""
    monkeypatch.setattr(train, "lr_at", lambda *_: float("inf"))
    assert train_in(tmp_path / "run", *SMALL, "--steps", 1) == 2
    assert "tensors are not finite after step 1" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/step-*")) and not list(tmp_path.glob("run/*.safetensors"))


def test_what_the_disk_does_not_keep_is_not_kept_for_good(tmp_path, monkeypatch, train_in, capsys):
    run = tmp_path / "run"
    assert train_in(run, *SMALL, "--steps", 2, "--keep", 1) == 0
    before = (run / "model.safetensors").read_bytes()

    def forgetful(state, path, **_):
        save_file({name: torch.zeros_like(tensor) for name, tensor in state.items()}, path)

    monkeypatch.setattr("blip2.save_file", forgetful)
    assert train_in(run, "--resume", "--save-every", 1) == 0  # it is finished
    monkeypatch.setattr(files, "check_room", lambda *_: None)
    other = tmp_path / "other"
    assert train_in(other, *SMALL) == 2
    assert "has not kept what was written" in capsys.readouterr().err and not list(other.glob("step*"))
    assert (run / "model.safetensors").read_bytes() == before


# --- checkpoints that are written while the training goes on ---------------------------------------------------------


@pytest.fixture
def beside(monkeypatch):
    """They are, on the CPU too."""
    monkeypatch.setattr(checkpoint, "BESIDE", ("cpu",))


def test_a_checkpoint_written_beside_the_training_is_that_of_its_step(tmp_path, beside, train_in, monkeypatch):
    """Though the loop has gone on: its thread writes when the next step has been taken."""
    straight, run, taken, write = tmp_path / "straight", tmp_path / "run", [], checkpoint.write
    set_lr = train.set_lr

    def late(run, step, *args):
        while len(taken) <= step < 4:  # set_lr is called before each step
            time.sleep(0.01)
        write(run, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "BESIDE", ())
        assert train_in(straight, *SMALL) == 0
    monkeypatch.setattr(checkpoint, "write", late)
    monkeypatch.setattr(train, "set_lr", lambda *args: taken.append(1) or set_lr(*args))
    assert train_in(run, *SMALL) == 0
    for folder in ("step-000002", "step-000004"):
        one, two = (load_file(each / folder / "model.safetensors") for each in (straight, run))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        one, two = (checkpoint.read_state(each / folder) for each in (straight, run))
        assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*map(moments_of, (one, two)), strict=True))
        assert torch.equal(one["rng"][0]["cpu"], two["rng"][0]["cpu"])


def moments_of(state: dict) -> list[dict]:
    return list(state["optimizer"]["state"].values())


def test_a_command_ends_when_its_checkpoint_is_written(tmp_path, beside, train_in, monkeypatch, capsys):
    """After a stop, which is heard while the thread writes; and "is saved" is said of what is."""
    write, set_lr = checkpoint.write, train.set_lr
    monkeypatch.setattr(checkpoint, "write", lambda *args: time.sleep(1) or write(*args))
    monkeypatch.setattr(train, "set_lr", lambda *args: stop.request(15) or set_lr(*args))
    assert train_in(tmp_path / "run", *SMALL) == 143
    assert "stopped: step 1 is saved; continue with: " in capsys.readouterr().err
    assert checkpoint.read_state(tmp_path / "run/step-000001")["step"] == 1
    monkeypatch.setattr(checkpoint, "write", write)
    monkeypatch.setattr(
        train, "set_lr", lambda *args: 1 / 0 if len(list(tmp_path.glob("run/step*"))) else set_lr(*args)
    )
    assert train_in(tmp_path / "run", "--resume") == 1


def test_a_disk_that_is_full_while_the_training_goes_on_ends_it_with_the_sentence(
    tmp_path, beside, train_in, monkeypatch, capsys
):
    """And the checkpoint before is whole."""
    set_lr, disk = train.set_lr, tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, 160) as allowed:
        if not allowed:
            pytest.skip("may not mount a small disk")

        def fill_it(*args):
            if (disk / "run/step-000001").exists():
                fill(disk / "filler")
            set_lr(*args)

        monkeypatch.setattr(train, "set_lr", fill_it)
        assert train_in(disk / "run", *SMALL, "--steps", 40, "--save-every", 1, "--log-every", 1) == 2
        said = capsys.readouterr().err
        assert re.search(r"cannot be written \(No space left on device.*: make room there \(step \d is saved; ", said)
        assert checkpoint.read_state(checkpoint.checkpoints(disk / "run")[-1])
        assert not list((disk / "run").glob(".*"))


def test_of_ten_kills_amid_such_writes_none_loses_a_checkpoint(tmp_path, beside, train_in):
    """Each time the run goes on from a whole one, and in the end it is that of a run that was not killed."""
    flags, run, dice = [*SMALL, "--steps", 24, "--save-every", 1, "--log-every", 1], tmp_path / "run", random.Random(0)
    assert train_in(tmp_path / "straight", *flags) == 0
    go_on, saved = [*flags, "--resume", "auto"], 0
    for _ in range(10):
        child = multiprocessing.get_context("fork").Process(target=train_in, args=(run, *go_on))
        child.start()
        while child.is_alive() and not any(run.glob(".step-*.partial")):
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.1))
        child.kill()
        child.join()
        for folder in (found := checkpoint.checkpoints(run)):
            assert f"step-{checkpoint.read_state(folder)['step']:06d}" == folder.name
        newest = int(found[-1].name[5:]) if found else 0
        assert newest >= saved
        saved = newest
    assert train_in(run, *go_on) == 0
    one, two = ([row for row in rows_of(each / "log.jsonl") if "loss" in row] for each in (tmp_path / "straight", run))
    assert [row["loss"] for row in one] == [row["loss"] for row in two] and len(one) == 24


# --- the data --------------------------------------------------------------------------------------------------------


def another_caption(folder: Path) -> None:
    records = json.loads((folder / "captions.json").read_text())
    records[3]["caption"] = ["something else"]
    (folder / "captions.json").write_text(json.dumps(records))


def another_image(folder: Path) -> None:
    Image.new("RGB", (50, 60)).save(folder / "3.png")


@pytest.mark.parametrize(
    ("change", "what"), [(another_caption, "records of --data"), (another_image, "images of --data")]
)
def test_other_data_are_refused_or_taken_knowingly(change, what, tmp_path, train_in, capsys, monkeypatch):
    flags = [*SMALL, "--data", caption_file(tmp_path, 8), "--workers", "0", "--val-photos", "0", "--no-cache-features"]
    after_two = []
    monkeypatch.setattr(train, "set_lr", lambda *_: after_two.append(1) or len(after_two) == 2 and stop.request(15))
    assert train_in(tmp_path / "run", *flags) == 143
    monkeypatch.undo()
    change(tmp_path)
    assert train_in(tmp_path / "run", "--resume") == 2
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"--resume: the {what} differ from before: put the old ones back" in said
    assert train_in(tmp_path / "run", "--resume", "--data-changed", "--test-images", 8) == 0


# --- stops -----------------------------------------------------------------------------------------------------------


def test_a_stop_leaves_a_validation_at_once_and_loses_nothing(tmp_path, monkeypatch, train_in, capsys):
    """The step is saved although --save-every is far; the run that continues makes up for the validation."""
    asked = []

    def interrupted(*args, **kwargs):
        asked.append(1)
        if len(asked) == 1:
            signal.raise_signal(signal.SIGTERM)
        return {"task": "vqa", "accuracy": 1.0, "majority answer": "", "accuracy of the majority answer": 0.0}

    monkeypatch.setattr(validation, "evaluate", interrupted)
    monkeypatch.setattr(validation, "validation_lines", lambda *_: "")
    assert train_in(tmp_path / "run", *SMALL, "--save-every", 4, "--eval-every", 3) == 143
    assert "stopped: step 3 is saved; continue with: python train.py --resume --out" in capsys.readouterr().err
    assert train_in(tmp_path / "run", "--resume") == 0
    rows = rows_of(tmp_path / "run/log.jsonl")
    assert [row["step"] for row in rows if "validation" in row] == [3, 4]


def test_a_stop_ends_the_caching_of_features_and_nothing_is_left(tmp_path, monkeypatch, train_in, capsys):
    """Of the dead neither: what a killed process had begun is removed, what a living one has begun is not."""
    flags = [*SMALL, "--data", caption_file(tmp_path, 8), "--workers", "0", "--val-photos", "0", "--cache-features"]
    folder = tmp_path / "features"
    die = lambda: (folder / ".b.1.partial/b.npy").touch() or os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    in_another_process(lock_and, folder / ".b.1.partial", die)
    filling = features.fill_tokens
    monkeypatch.setattr(features, "fill_tokens", lambda *_: signal.raise_signal(signal.SIGINT))
    assert train_in(tmp_path / "run", *flags) == 130
    assert capsys.readouterr().err == "stopped\n" and not content(folder)
    monkeypatch.setattr(features, "fill_tokens", filling)
    assert train_in(tmp_path / "run", *flags) == 0
    assert sorted(Path(name).suffix for name in content(folder)) == [".json", ".npy"]


def test_a_killed_loader_worker_is_replaced(tmp_path, capsys):
    """And the batches are those of a run that lost none."""
    images = open_images([write_annotations(tmp_path, 8)], "train", 8)
    batches = lambda workers: train_loader(train_set(images), sampler(images, batch=2, steps=20), workers, pin=False)  # noqa: E731
    wanted, got, others = list(batches(0)), [], set(multiprocessing.active_children())
    for number, batch in enumerate(batches(1)):
        got.append(batch)
        if number == 3:
            ({*multiprocessing.active_children()} - others).pop().kill()
    assert len(got) == len(wanted) and all(torch.equal(a.images, b.images) for a, b in zip(got, wanted))
    assert "a loader worker was killed" in capsys.readouterr().out


def test_signals_are_not_for_loader_workers(tmp_path):
    images = open_images([write_annotations(tmp_path, 8)], "train", 8)
    batches = train_loader(train_set(images), sampler(images, batch=2, steps=60), 1, pin=False)
    others = set(multiprocessing.active_children())
    next(batches)
    worker = ({*multiprocessing.active_children()} - others).pop()
    for number in stop.REQUESTS:
        os.kill(worker.pid, number)
    assert len(list(batches)) == 59


def test_a_reader_that_has_gone_is_a_request_to_stop():
    """As `train.py | head` leaves."""
    code = "from engine.distributed import print0\nfrom engine.errors import run_command\nimport sys\n"
    code += "sys.exit(run_command(lambda: [print0(i) for i in range(10 ** 7)]))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b"stopped\n" and child.wait() == 141


# --- resume ----------------------------------------------------------------------------------------------------------


def test_resume_auto_starts_and_continues(tmp_path, train_in, capsys):
    for said in ("", "resuming "):
        assert train_in(tmp_path / "run", *SMALL, "--steps", 2, "--resume", "auto") == 0
        assert capsys.readouterr().out.startswith(said or "recipe ")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_after_a_restart_by_torchrun_the_run_continues(overwrite, tmp_path, train_in, monkeypatch, capsys):
    """But not a run that it has not begun: that is left alone, or replaced if the first start did not come to it."""
    run = tmp_path / "run"
    assert train_in(run, *SMALL, "--steps", 2) == 0
    for module in ("config", "engine.distributed"):
        monkeypatch.setattr(f"{module}.RESTARTS", 1)
    capsys.readouterr()
    assert train_in(run, *SMALL, "--steps", 2, *overwrite) == 0  # begun by this process, as torchrun's is
    assert capsys.readouterr().out.startswith("resuming ")
    (run / "log.jsonl").write_text((run / "log.jsonl").read_text().replace('"launch": "', '"launch": "another '))
    assert train_in(run, *SMALL, "--steps", 2, *overwrite) == (0 if overwrite else 2)
    said = capsys.readouterr()
    assert said.out.startswith("recipe ") if overwrite else "holds a run: pass --resume" in said.err


def test_files_beside_a_new_run_stay(tmp_path, train_in):
    (tmp_path / "mine.txt").write_text("mine")
    for flags in ([], ["--overwrite"]):
        shutil.rmtree(tmp_path / "step-000002", ignore_errors=True)
        assert train_in(tmp_path, *SMALL, "--steps", 2, *flags) == 0
        assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_log_that_a_power_cut_has_spoilt_is_read_without_its_bad_lines(tmp_path, capsys):
    lines = [
        b'{"step": 1}',
        b"\0" * 20,
        b'{"step": 2}',
        b"[1]",
        b"7",
        b"null",
        b'{"step": "x"}',
        b'"\xff"',
        b"[" * 9999,
    ]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 3')
    assert [row["step"] for row in rows_of(tmp_path / "log.jsonl")] == [1, 2]
    assert "log.jsonl: 7 lines are no rows of a log, and are left out" in capsys.readouterr().out


def test_gradients_are_summed_in_one_order_by_several_threads():
    """Else a resumed run differs in the last digits: rows that several pairs share are gathered by index_select."""
    from conftest import random_batch, small_model

    model, batch = small_model(), random_batch(24)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    found = []
    try:
        for _ in range(12):
            model.zero_grad()
            losses = model.stage1_losses(batch, generator=torch.Generator().manual_seed(1))
            sum(losses.values()).backward()
            found.append(model.qformer.blocks[0].cross.kv.weight.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, found[0]) for gradient in found)
