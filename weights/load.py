"""The strict weight loader and its inverse; checkpoint files and their hashes.

Loading accounts for everything: each key of a file is used, or ignored for a stated reason; each parameter is filled,
or newly initialized for a stated reason; all shapes agree and all values are finite. Otherwise one error lists every
problem and nothing has been changed. Tensors are copied one at a time from the mapped file; no pickle runs code.
"""

import hashlib
import re
import zipfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.errors import UserError, expect, read_json
from weights.tables import Row, Table

# --- the loader ------------------------------------------------------------------------------------------------------


def load(
    target: nn.Module, source: dict[str, Tensor], table: Table, what: str,
    dtype: torch.dtype | None = None, device: str | torch.device = "cpu",
) -> str:  # fmt: skip
    """Copy `source` into the parameters of `target` as `table` says. Returns the load report, one sentence.

    Existing parameters keep their dtype and device. Those on the meta device are created on `device`, in `dtype` or
    the file's, one at a time, so that at most one tensor exists twice.
    Raises UserError with the full list of problems, before anything is changed.
    """
    plan, report = match(target, source, table, what)
    loaded = []
    for ours, (row, keys) in plan.items():
        parameter = target.get_parameter(ours)
        tensor = row.transform.read(*(source[key] for key in keys))
        if parameter.is_meta:  # a copy: a tensor mapped from a file would change with the file
            tensor = tensor.to(device, dtype, copy=True)
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(
                f"{what} does not fit, nothing was loaded: {', '.join(keys)} holds values that are not finite in "
                f"{str(tensor.dtype)[6:]}: fetch it again, or take a wider dtype"
            )
        loaded.append((ours, parameter, tensor))
    with torch.no_grad():
        for ours, parameter, tensor in loaded:
            if parameter.is_meta:
                owner, _, name = ours.rpartition(".")
                setattr(target.get_submodule(owner), name, nn.Parameter(tensor, parameter.requires_grad))
            else:
                parameter.copy_(tensor)
    return report


def match(
    target: nn.Module, source: dict[str, Tensor], table: Table, what: str
) -> tuple[dict[str, tuple[Row, list[str]]], str]:
    """Which row and which of their keys fill each of our parameters, and the load report; by names and shapes only."""
    theirs = {}  # their key, renamed -> their key
    for key in source:
        renamed = key
        for pattern, replacement in table.renames.items():
            renamed = re.sub(pattern, replacement, renamed)
        theirs[renamed] = key

    plan, problems, fresh, used = {}, [], Counter(), set()
    for ours, parameter in target.named_parameters():
        found = ((row, keys) for row, keys in rows_for(table, ours) if theirs.keys() >= set(keys))
        row, keys = next(found, (None, []))
        if row is None:
            why = first_match(table.fresh, ours)
            fresh[why] += 1
            if why is None:
                wanted = " or ".join(" + ".join(keys) for _, keys in rows_for(table, ours))
                expected = f", expected {wanted}" if wanted else ""
                problems.append(f"missing: no source for {ours} {tuple(parameter.shape)}{expected}")
            continue
        used.update(keys)
        plan[ours] = row, [theirs[key] for key in keys]
        shapes = [tuple(source[key].shape) for key in plan[ours][1]]
        # One-byte tensors, expanded, say the shape after the transform. On the meta device adding or joining would make
        # PyTorch import its compiler, which takes longer than loading a model.
        outlines = [torch.empty((), dtype=torch.uint8).expand(shape) for shape in shapes]
        try:
            with no_init():
                shape = row.transform.read(*outlines).shape
        except RuntimeError:  # they do not even fit each other
            shape = shapes
        if shape != parameter.shape:
            problems.append(f"shape: {', '.join(keys)} gives {tuple(shape)}, {ours} is {tuple(parameter.shape)}")

    ignored = Counter()
    for key in sorted(theirs.keys() - used):
        why = first_match(table.ignored, key)
        ignored[why] += 1
        if why is None:
            problems.append(f"unknown: {key} {tuple(source[theirs[key]].shape)} has no target")
    if problems:
        raise UserError(
            f"{what} does not fit, nothing was loaded; {len(problems)} problem(s):\n  " + "\n  ".join(problems)
        )
    report = [f"{len(used)} used"]
    report += [f"{n} ignored ({why})" for why, n in ignored.items()]
    report += [f"{n} fresh ({why})" for why, n in fresh.items()]
    return plan, f"{what}: {', '.join(report)}"


def rows_for(table: Table, ours: str):
    """Every row for our key, and its keys with the block's number in them."""
    for row in table.rows:
        if match := re.fullmatch(re.escape(row.ours).replace(r"\{\}", r"(\d+)"), ours):
            yield row, [key.format(*match.groups()) for key in row.theirs]


def first_match(patterns: dict[str, str], key: str) -> str | None:
    """The reason of the first pattern that matches the whole key."""
    return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, key)), None)


def unload(source: nn.Module, table: Table, without: dict[str, str] | None = None) -> dict[str, Tensor]:
    """The inverse of `load`: our parameters under their keys, as far as the table has a row; the first row counts.

    without: regular expression of our keys to leave out -> why.
    """
    theirs: dict[str, Tensor] = {}
    for ours, parameter in source.named_parameters():
        row, keys = next(rows_for(table, ours), (None, []))
        if row is None or first_match(without or {}, ours):
            continue
        tensor = parameter.detach()
        if row.transform.third is not None:  # a missing third stays zero
            fused = theirs.setdefault(keys[0], tensor.new_zeros(3 * len(tensor)))
            fused.chunk(3)[row.transform.third].copy_(tensor)
        else:
            parts = row.transform.write(tensor, len(keys))
            theirs |= {key: part.contiguous() for key, part in zip(keys, parts, strict=True)}
    return theirs


# --- files -----------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder: one, or the shards that the index names; no pickle if there is a safer
    format."""
    names = []
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            names = [single]
        elif index.exists():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise UserError(f"{index} names a file outside of {folder}, {outside[0]}: fetch it again")
        if names:
            break
    missing = [name for name in names if not (folder / name).exists()]
    got = f"{folder} lacks {', '.join(missing)}" if missing else f"{folder} has no weights"
    expect(names and not missing, f"{got}: expected model.safetensors, its shards and index, or pytorch_model.bin")
    return [folder / name for name in names]


def open_tensors(paths: list[Path]) -> dict[str, Tensor]:
    """Tensors by key, mapped from safetensors files or PyTorch pickles (weights_only=True): they are read when used."""
    tensors = {}
    for path in paths:
        safe = path.suffix == ".safetensors"
        try:
            mapped = safe or zipfile.is_zipfile(path)  # older pickles are read whole
            content = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            what = "is not a whole safetensors file" if safe else "cannot be read as PyTorch weights"
            raise UserError(f"{path} {what} ({why}): fetch it again") from None
        if isinstance(content, dict) and not safe:
            content = content.get("model", content)  # LAVIS wraps its state dict
        expect(isinstance(content, dict), f"{path} holds no state dict: expected tensors by name")
        tensors |= {key: tensor for key, tensor in content.items() if isinstance(tensor, Tensor)}
    return tensors


def sha256(paths: list[Path]) -> str:
    """One hash of the contents of the files; identifies a frozen part."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --- no initialization -----------------------------------------------------------------------------------------------


class no_init(TorchFunctionMode):
    """Skip random initialization inside: drawing values that a file replaces takes four times as long as reading the
    file; and on the meta device drawing makes PyTorch import its compiler."""

    DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if function in self.DRAWS else function(*args, **(kwargs or {}))
