"""Checkpoints that are written whole or not at all, and a stop on a signal."""

import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import torch

from engine.distributed import gather_objects, rank
from engine.errors import UserError, expect, read_json


def save_checkpoint(run: Path, step: int, model, train_state: dict, cfg, is_best: bool = False) -> None:
    """Write run/step-NNNNNN/ whole or not at all, link it as the run's latest, delete those beyond --keep. A checkpoint
    that exists already, of the same step before its validation, gets a new state only.

    Called on all ranks, because each adds the state of its random numbers; rank 0 writes.
    """
    rng = {"cpu": torch.get_rng_state()}
    if model.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state()
    rngs = gather_objects(rng)
    if rank() > 0:
        return
    folder = run / f"step-{step:06d}"
    partial = run / f".{folder.name}.partial"
    source = folder if folder.exists() else partial
    if source == partial:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, relative_to=folder, train=asdict(cfg), step=step)
    weights = ["model.safetensors"] + ["tokenizer.json"] * (model.tokenizer is not None)
    if is_best:  # before the state says so
        (run / "best").mkdir(exist_ok=True)
        for name in ("config.json", *weights):  # config: both folders are equally deep
            link(source / name, run / "best" / name)
    torch.save({**train_state, "step": step, "rng": rngs}, source / ".train_state.partial")
    os.replace(source / ".train_state.partial", source / "train_state.pt")
    if source == partial:
        os.replace(partial, folder)
    for name in ("train_state.pt", *weights):
        link(folder / name, run / name)
    model.write_config(run, train=asdict(cfg), step=step)
    for old in checkpoints(run)[: -cfg.keep]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    steps = {int(folder.name[5:]): folder for folder in run.glob("step-*") if folder.name[5:].isdigit()}
    return [steps[step] for step in sorted(steps)]


def link(source: Path, target: Path) -> None:
    """Replace target by a link to source (or a copy, where the disk has no links), atomically."""
    temporary = target.with_name(f".{target.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copy2(source, temporary)
    os.replace(temporary, target)


def read_state(folder: Path) -> dict:
    """train_state.pt of a checkpoint."""
    try:
        return torch.load(folder / "train_state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # missing, cut, or no pickle at all
        why = (str(error) or type(error).__name__).splitlines()[0]
        how = "remove that folder, to continue from the checkpoint before it if there is one (--keep)"
        raise UserError(f"--resume: the state in {folder} cannot be read ({why}): {how}") from None


def restore(folder: Path, state: dict, model, optimizer, scaler, data_sha256: str) -> tuple[float, float]:
    """Restore weights, optimizer, scaler and random numbers of a checkpoint -> best score, seconds trained so far."""
    config = read_json(folder / "config.json")
    how = "put the old ones back, or start another run with --out"
    expect(state.get("data", data_sha256) == data_sha256, f"--resume: --data holds other records than before: {how}")
    for part, source in model.sources.items():
        other = f"--resume: {source.spec} has other weights than the run was trained over: {how}"
        expect(part == "bert" or config.get(f"{part}_sha256") == source.sha256, other)
    model.load_trained(folder)
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    rng = state["rng"][rank()]
    torch.set_rng_state(rng["cpu"])
    if model.device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"])
    return state["best"], state["trained_s"]


class GracefulStop:
    """Ctrl-C and SIGTERM end the run after the step, with a checkpoint; a second Ctrl-C ends it at once."""

    ANSWER = b"\nstopping after this step, or after the validation that runs, with a checkpoint; again: at once\n"

    def __enter__(self):
        self.requested = False
        self.previous = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def request(self, number, frame):
        """The signal handler."""
        self.requested = True
        if os.environ.get("RANK", "0") == "0":
            os.write(2, self.ANSWER)  # print is not safe in a signal handler
        signal.signal(number, self.previous[number])
