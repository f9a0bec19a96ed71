"""Checkpoints: written whole or not at all, verified before an older one is deleted, checked when they are read."""

import os
import shutil
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.distributed import barrier, gather_objects, local_rank, print0, rank, take_from_0, world_size
from engine.errors import UserError, expect
from engine.files import check_room, free_bytes, megabytes, read_json, read_text, remove, sha256, whole, writing
from engine.stop import uninterrupted

SUMS = "SHA256SUMS"  # of all files but train_state.pt, which has checksums inside; sha256sum -c reads it
BLOCK = 1 << 26  # bytes that are sent at a time
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
STATE = {"optimizer": dict, "scaler": dict, "rng": list, "step": int, "best": float, "trained_s": float}

# Where a thread writes a checkpoint while the training goes on. Of the paper's Q-Former (187 M parameters, 2.2 GB)
# the loop then stands still for the copy, 0.5 to 2.5 s, instead of 8 to 10 s. On a CPU nothing is won: the thread takes
# the cores that train (both together take 21.5 s, one after the other 20 s).
BESIDE = ("cuda",)
_now_written: list[Future] = []

# --- write -----------------------------------------------------------------------------------------------------------


def save_checkpoint(run: Path, step: int, model, optimizer, state: dict, cfg, is_best: bool = False) -> None:
    """Write run/step-NNNNNN/ whole or not at all, link it as the run's latest, delete those beyond --keep. A checkpoint
    that exists already, of the same step before its validation, gets a new state only.

    Called on all ranks, because each adds the state of its random numbers; rank 0 writes, on a GPU beside the training
    (see `finish_writing`). Raises UserError, with the older checkpoints as they were, if the model is not finite, the
    disk is full, or it does not hold what was written.
    """
    finish_writing()
    rng = {"cpu": torch.get_rng_state()}
    if model.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state()
    rngs = gather_objects(rng)
    if rank() > 0:
        return
    check_finite(model, optimizer, step)
    state = {**state, "optimizer": optimizer.state_dict(), "step": step, "rng": rngs}
    if model.device.type in BESIDE:
        writer = ThreadPoolExecutor(1)
        _now_written.append(writer.submit(write, run, step, snapshot(model), on_host(state), cfg, is_best))
        writer.shutdown(wait=False)
    else:
        with uninterrupted():
            write(run, step, model, state, cfg, is_best)


def finish_writing(wait: bool = True) -> None:
    """Wait for the checkpoint that is being written, or only look whether it is done. Raises what its writer has."""
    while _now_written and (wait or _now_written[0].done()):
        with uninterrupted():
            _now_written.pop().result()


def on_host(thing):
    """A copy in the host's memory of all tensors in it."""
    if isinstance(thing, Tensor):
        return thing.detach().to("cpu", copy=True)
    return {name: on_host(each) for name, each in thing.items()} if isinstance(thing, dict) else thing


def snapshot(model):
    """What `write` needs of the model, as it is now."""
    weights, still = on_host(model.trained_state()), copy(model)
    still.trained_state = lambda: weights
    return still


def write(run: Path, step: int, model, state: dict, cfg, is_best: bool) -> None:
    """The files of `save_checkpoint`."""
    folder = run / f"step-{step:06d}"
    weights = ["model.safetensors"] + ["tokenizer.json"] * (model.tokenizer is not None)
    if not folder.exists():
        with whole(folder, checkpoint_bytes(model)) as partial:
            model.save_pretrained(partial, relative_to=folder, train=asdict(cfg), step=step)
            verify_weights(partial, model)
            sums = [f"{sha256([partial / name])}  {name}\n" for name in ("config.json", *weights)]
            (partial / SUMS).write_text("".join(sums))
            write_state(partial, state, checkpoint_bytes(model))
    if is_best:  # before the state says so
        with writing(run):
            (run / "best").mkdir(exist_ok=True)
            for name in ("config.json", *weights):  # config: both folders are equally deep
                link(folder / name, run / "best" / name)
        write_state(folder, state, checkpoint_bytes(model))
    with writing(run):
        for name in ("train_state.pt", SUMS, *weights):
            link(folder / name, run / name)
        model.write_config(run, train=asdict(cfg), step=step)
        for old in checkpoints(run)[: -cfg.keep]:
            shutil.rmtree(old)


def advice(run: Path) -> str:
    """What is saved, and the command that continues."""
    launch = "python" if world_size() == 1 else f"torchrun --nproc_per_node {world_size()}"
    saved, go_on = checkpoints(run), f"continue with: {launch} train.py --resume --out {run}"
    return f"step {int(saved[-1].name[5:])} is saved; {go_on}" if saved else ""


def write_state(folder: Path, state: dict, needs: int) -> None:
    """train_state.pt, verified."""
    with whole(folder / "train_state.pt", needs) as partial:
        torch.save(state, partial)
        expect(not broken_state(partial), f"{folder}: the disk has not kept what was written: check it")


def broken_state(path: Path) -> str | None:
    """Name of the first entry that differs from its checksum, which torch.load does not check."""
    with zipfile.ZipFile(path) as file:
        return file.testzip()


def verify_weights(folder: Path, model) -> None:
    """Compare the weights in a folder with those of the model."""
    written, kept = load_file(folder / "model.safetensors"), model.trained_state()
    same = written.keys() == kept.keys() and all(torch.equal(written[name], kept[name].cpu()) for name in kept)
    expect(same, f"{folder}: the disk has not kept what was written: check it")


def check_finite(model, optimizer, step: int) -> None:
    """Refuse to save weights or moments that are not finite."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{moment} of {name}": moments[moment] for moment in MOMENTS if moment in moments}
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()  # one wait for the device
    bad = [name for name, fine in zip(tensors, finite) if not fine]
    how = "nothing was saved: start again, or --resume from the last checkpoint, with a lower --lr or --precision fp32"
    expect(not bad, f"{len(bad)} of {len(tensors)} tensors are not finite after step {step}, {bad[:1]}; {how}")


def checkpoint_bytes(model) -> int:
    """Size of a checkpoint: weights, and two moments of what is trained."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return sum(tensor.nbytes for tensor in model.trained_state().values()) + 2 * trained


def tell_room(run: Path, model, keep: int) -> None:
    """Print what a checkpoint takes, and refuse to begin if the kept ones, the best and the next will not fit."""
    size = checkpoint_bytes(model)
    print0(f"a checkpoint takes {megabytes(size)}; {megabytes(free_bytes(run))} are free for {run}")
    if rank() > 0:  # it may be on a machine that has another disk
        return
    more = max(1, keep + 2 - len(checkpoints(run)))  # the kept ones, the best, and the one that is being written
    check_room(run, more * size, f"a run that keeps {keep} checkpoints and the best one")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    steps = {int(folder.name[5:]): folder for folder in run.glob("step-*") if folder.name[5:].isdigit()}
    return [steps[step] for step in sorted(steps)]


def clear(run: Path, overwrite: bool) -> None:
    """Remove what a killed command has left half written, or the old run, but not the lock."""
    with writing(run):
        for path in list(run.iterdir() if overwrite and checkpoints(run) else run.glob(".*.partial")):
            if path.name != ".lock":
                remove(path)


def link(source: Path, target: Path) -> None:
    """Replace target by a link to source (or a copy, where the disk has no links), atomically."""
    temporary = target.with_name(f".{target.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copy2(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # it stays if both are one file already


# --- read ------------------------------------------------------------------------------------------------------------


def everywhere(folder: Path) -> Path:
    """A checkpoint of rank 0 -> where this rank reads it: there too, or, on a machine that has another disk, in a copy
    that rank 0 sends, .RUN.copy/ beside the run (as deep, so that paths in it stay valid)."""
    state = folder / "train_state.pt"
    seen = gather_objects(state.exists() and state.stat().st_mtime_ns)
    if len(set(seen)) == 1:
        return folder
    print0(f"{folder} is sent to the machines that do not see it")
    lacks, copied = seen[rank()] != seen[0], folder.parent.with_name(f".{folder.parent.name}.copy") / folder.name
    receives = lacks and local_rank()[0] == 0
    files = gather_objects([(path.name, path.stat().st_size) for path in folder.glob("*")] if rank() == 0 else [])[0]
    with writing(copied):
        if receives:
            remove(copied.parent)
            copied.mkdir(parents=True)
        for name, size in files:
            place = folder / name if rank() == 0 else copied / name if receives else os.devnull
            with open(place, "rb" if rank() == 0 else "wb") as file:
                for start in range(0, size, BLOCK):
                    block = torch.empty(min(BLOCK, size - start), dtype=torch.uint8)
                    if rank() == 0:
                        file.readinto(block.numpy())
                    take_from_0([block])
                    if rank() > 0:
                        file.write(block.numpy())
    barrier()
    return copied if lacks else folder


def read_state(folder: Path) -> dict:
    """train_state.pt of a checkpoint, whose files are compared with their checksums. UserError if it is damaged."""
    try:
        sums = read_text(folder / SUMS) if (folder / SUMS).exists() else ""  # older runs have none
        for known, name in (line.split("  ", 1) for line in sums.splitlines()):
            expect(sha256([folder / Path(name).name]) == known, f"{name} is not what was written")
        expect(not broken_state(folder / "train_state.pt"), "train_state.pt is not what was written")
        state = torch.load(folder / "train_state.pt", map_location="cpu", weights_only=True)
        wrong = [key for key, kind in STATE.items() if not isinstance(state.get(key), kind)]
        expect(not wrong and state["rng"], f"train_state.pt has no {', '.join(wrong) or 'rng'}")
        expect(folder.name == f"step-{state['step']:06d}", f"train_state.pt is of step {state['step']}")
        return state
    except Exception as error:  # missing, cut, or no pickle at all
        raise damaged(folder, error) from None


def damaged(folder: Path, error: Exception) -> UserError:
    """The error that names a damaged checkpoint, and the one before it."""
    why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    older = [other for other in checkpoints(folder.parent) if other.name < folder.name][-1:]
    how = f"{older[0]} is the one before it" if older else "there is none before it (--keep 2 keeps one)"
    return UserError(f"--resume: {folder} is damaged ({why}): remove it to continue without; {how}")


def restore(
    folder: Path, state: dict, model, optimizer, scaler, data: dict[str, str], data_changed: bool
) -> tuple[float, float]:
    """Restore weights, optimizer, scaler and random numbers of a checkpoint -> best score, seconds trained so far.

    data: what the run is trained on now -> its hash; compared with those in the state unless `data_changed`.
    """
    config, saved = read_json(folder / "config.json"), state.get("data", {})
    how = "put the old ones back, or start another run with --out"
    saved = saved if isinstance(saved, dict) else {"records of --data": saved}  # of older runs
    changed = [what for what, known in saved.items() if data.get(what) != known]
    anyway = f"{how}; --data-changed continues with the new ones"
    expect(data_changed or not changed, f"--resume: the {' and the '.join(changed)} differ from before: {anyway}")
    for part, source in model.sources.items():
        other = f"--resume: {source.spec} has other weights than the run was trained over: {how}"
        expect(part == "bert" or config.get(f"{part}_sha256") == source.sha256, other)
    model.load_trained(folder)
    try:
        own = optimizer.state_dict()  # whose groups follow from the flags
        check_moments(state["optimizer"]["state"], [p for group in optimizer.param_groups for p in group["params"]])
        optimizer.load_state_dict({**own, "state": state["optimizer"]["state"]})
        if state["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) != world_size():  # numbers that neither another rank nor another step has drawn
            torch.manual_seed(hash((torch.initial_seed(), state["step"])))
        else:
            torch.set_rng_state(state["rng"][rank()]["cpu"])
            if model.device.type == "cuda" and "cuda" in state["rng"][rank()]:
                torch.cuda.set_rng_state(state["rng"][rank()]["cuda"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise damaged(folder, error) from None
    return state["best"], state["trained_s"]


def check_moments(saved: dict, parameters: list[Tensor]) -> None:
    """Raise ValueError unless the optimizer's state fits the parameters: its kernels trust the shapes."""
    if not saved.keys() <= set(range(len(parameters))):
        raise ValueError("the optimizer's state is of other parameters")
    for number, entry in saved.items():
        moments = [entry[name] for name in MOMENTS]
        fits = all(m.shape == parameters[number].shape and m.dtype == torch.float32 for m in moments)
        finite = fits and all(t.isfinite().all() for t in (*moments, entry["step"])) and bool((moments[1] >= 0).all())
        if not (finite and entry["step"].shape == ()):
            raise ValueError(f"the optimizer's state of parameter {number} does not fit it, or is not finite")
