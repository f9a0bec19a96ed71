"""Full, read-only and missing disks under every command that writes, for `tests.faults`."""

import os
import random
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from tests.fault_commands import (
    MODEL,
    TINY,
    Command,
    Found,
    captioning,
    finish,
    last_line,
    leftovers,
    newest,
    short_training,
)  # fmt: skip

WRITERS = {  # what writes: (the name of its output, its command line with OUT and what `completed` replaces)
    "train": ("run", ["TRAINING"]),
    "train --cache-features": ("run", ["TRAINING", "--cache-features"]),
    "train --resume": ("run", ["TRAINING", "--resume"]),
    "train, second checkpoint": ("run", ["TRAINING"]),
    "write-config": ("a.json", ["train.py", "--write-config", "OUT"]),
    "eval --out": ("a.json", ["EVALUATION", "--out", "OUT"]),
    "eval --predictions": ("a.json", ["EVALUATION", "--predictions", "OUT"]),
    "ask --out": ("a.json", ["eval.py", "ask", "--beams", 1, *MODEL, "--out", "OUT"]),
    "ask --attention": ("a.png", ["eval.py", "ask", "--beams", 1, *MODEL, "--attention", "OUT"]),
    "features": ("a.safetensors", ["eval.py", "features", "STAGE1", *MODEL, "--out", "OUT"]),
    "convert": ("a.json", ["-m", "tools.data", "convert", "ANNOTATIONS", "--out", "OUT"]),
    "export hf": ("hf", ["-m", "tools.weights", "export", TINY / "blip2", "--format", "hf", "OUT"]),
    "export lavis": ("a.pth", ["-m", "tools.weights", "export", "LAVIS", "--format", "lavis", "OUT"]),
    "export run": ("run", ["-m", "tools.weights", "export", TINY / "blip2", "--format", "run", "OUT"]),
}
MOUNTED = ("full", "read-only", "2 MB")
DISKS = (*MOUNTED, "through a file", "/dev/full", "long name", "no folder", "too large")
MAY_WORK = ("2 MB", "/dev/full", "no folder", "too large")  # small files fit, folders are made, a link is replaced


def plan_disks(count: int, seed: int) -> list[dict]:
    """Every pair of a writer and a disk that makes sense, in random order, as often as needed."""
    here = DISKS if can_mount() else DISKS[3:]
    pairs = [(writer, disk) for writer in WRITERS for disk in here if "resume" not in writer or disk in MOUNTED]
    pairs = [pair for pair in pairs if "second" not in pair[0] or pair[1] == "2 MB"]
    random.Random(f"disks {seed}").shuffle(pairs)
    pairs = (pairs * (count // len(pairs) + 1))[:count]
    return [{"writer": w, "disk": disk, "seed": f"disks {seed} {i}"} for i, (w, disk) in enumerate(pairs)]


def can_mount() -> bool:
    """May this user mount a tmpfs?"""
    with tempfile.TemporaryDirectory() as folder, mounted(Path(folder), 1) as is_mounted:
        return is_mounted


@contextmanager
def mounted(folder: Path, megabytes: int):
    """A small disk; gives False where that is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    allowed = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", "-l", folder])


def remount(folder: Path, options: str) -> None:
    """Change a disk of `mounted`."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder])


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        for size in (2**20, 2**12):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def completed(words: list, work: Path, out: Path) -> list:
    """The command line of a writer."""
    known = {"TRAINING": short_training(work, out), "EVALUATION": captioning(work, out, data="photos.json")[:-2]}
    known["STAGE1"] = ["--checkpoint", work / "finished/run", "--images", work / "photos"]
    known["LAVIS"] = [work / "lavis.pth", "--vit", "eva-g", "--bert", TINY / "bert"]
    known |= {"ANNOTATIONS": [work / "photos.json"], "OUT": [out]}
    return [part for word in words for part in known.get(word, [word])]


def try_disks(work: Path, folder: Path, plan: dict) -> Found:
    """A command that cannot write -> what is wrong with how it says so, and with what it leaves."""
    writer, kind, disk, rng = plan["writer"], plan["disk"], folder / "disk", random.Random(plan["seed"])
    (name, words), resumes = WRITERS[writer], writer == "train --resume"
    disk.mkdir()
    second = "second" in writer
    size = 160 if resumes or second else 2  # MB; a run that keeps 5 checkpoints of 18 is not begun with less than 126
    with mounted(disk, size) if kind in MOUNTED else nullcontext():
        (disk / "file").touch()
        out = {"through a file": disk / "file" / name, "no folder": disk / "no/such" / name}.get(kind, disk / name)
        out = disk / ("x" * 300) / name if kind == "long name" else out
        is_file = "." in name
        old = is_file and writer != "export lavis" and kind in (*MOUNTED, "too large") and rng.random() < 0.5
        if resumes:
            shutil.copytree(work / "state/run", out)
        elif old:
            out.write_text("old")
        if kind == "/dev/full":
            out.symlink_to("/dev/full")
        if kind == "full" or resumes and kind == "2 MB":
            fill(disk / "filler")
        if kind == "read-only":
            remount(disk, "ro")
        command = Command(completed(words, work, out), folder, file_limit=100_000 if kind == "too large" else 0)
        while second and command.running() and newest(out) < 1:
            time.sleep(0.002)
        if second:
            fill(disk / "filler")
        if not command.wait():
            return [("hang", last_line(command.printed()))]
        works = kind in MAY_WORK and (not writer.startswith("train") or kind == "no folder")
        works = works or second or (old and kind == "full")  # it was faster; in the place of the old file
        found = command.faults((0, 2) if works else (2,))
        if command.status == 2:
            found += said(command, disk)
            kept = old or resumes or kind == "/dev/full" or writer.startswith("train")
            found += [("left over", str(out))] * (os.path.exists(out) and not kept)
        if command.status and old and not (out.exists() and out.read_text() == "old"):
            found.append(("lost", f"{out}, which was whole before"))
        found += [("left over", path) for path in leftovers(disk)]
        if second or resumes:
            found += [("lost", "the checkpoint before")] * (newest(out) < (2 if resumes else 1))
            remount(disk, "rw,size=300m")
            (disk / "filler").unlink(missing_ok=True)
            found += finish([*short_training(work, out), "--resume"], out, folder, work / "finished/run")
    return found


def said(command: Command, disk: Path) -> Found:
    """What is wrong with the sentence of a refusal."""
    errors = command.err.read_text().strip().split("\n")
    if len(errors) != 1 or not errors[0].startswith("error: "):
        return [("sentence", f"not one sentence: {errors[:3]}")]
    return [("sentence", f"does not name the path: {errors[0]}")] * (str(disk) not in errors[0])
