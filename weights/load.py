"""The strict weight loader and its inverse; checkpoint files and their hashes.

Loading accounts for everything: each key of a file is used, or ignored for a stated reason; each parameter is filled,
or newly initialized for a stated reason; all shapes agree and all values are finite. Otherwise one error lists every
problem and nothing has been changed. Tensors are copied one at a time from the mapped file; no pickle runs code.
"""

import os
import re
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.errors import UserError, expect, shorten
from engine.files import MAX_CONFIG, expect_file, read_json
from engine.progress import progress
from engine.sharding import is_sharded, own_rows, with_rows
from weights.tables import IDENTITY, JOIN, Row, Table

warnings.filterwarnings("ignore", "Detected pickle protocol")  # it is refused or read, in our words
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which Lightning, others and LAVIS put the tensors
PREFIXES = ("module.", "base_model.model.", "model.")  # that DDP, PEFT and wrappers put before all keys

# --- the loader ------------------------------------------------------------------------------------------------------


def load(
    target: nn.Module, source: dict[str, Tensor], table: Table, what: str,
    dtype: torch.dtype | None = None, device: str | torch.device = "cpu",
) -> str:  # fmt: skip
    """Copy `source` into the tensors of `target` (see `tensors_of`) as `table` says. Returns the load report.

    Existing ones keep their dtype and device. Those on the meta device are created on `device`, in `dtype` or
    the file's, one at a time, so that at most one tensor exists twice; of a sharded one this rank's rows.
    Raises UserError with the full list of problems, before anything is changed.
    """
    plan, report = match(target, source, table, what)
    loaded, targets = [], tensors_of(target)
    for ours, (row, keys) in progress(plan.items(), f"loading {what}"):
        parameter = targets[ours]
        tensor = read(row, [source[key] for key in keys], parameter)
        if parameter.is_meta:  # a copy: a tensor mapped from a file would change with the file
            tensor = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
        if tensor.numel() and tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(
                f"{what} does not fit, nothing was loaded: {', '.join(keys)} holds values that are not finite in "
                f"{str(tensor.dtype)[6:]}: fetch it again, or take a wider dtype"
            )
        loaded.append((ours, parameter, tensor))
    with torch.no_grad():
        for ours, parameter, tensor in loaded:
            if parameter.is_meta:
                owner, _, name = ours.rpartition(".")
                is_parameter = isinstance(parameter, nn.Parameter)  # or a buffer
                tensor = with_rows(parameter, tensor) if is_sharded(parameter) else tensor
                new = nn.Parameter(tensor, parameter.requires_grad) if is_parameter else tensor
                setattr(target.get_submodule(owner), name, new)
            else:
                parameter.copy_(tensor)
    return report


def read(row: Row, parts: list[Tensor], parameter: Tensor) -> Tensor:
    """What fills a parameter; of a sharded one this rank's rows, beside which none are read if rows are only joined."""
    if is_sharded(parameter):
        return own_rows(parameter, parts if row.transform in (IDENTITY, JOIN) else [row.transform.read(*parts)])
    return row.transform.read(*parts)


def match(
    target: nn.Module, source: dict[str, Tensor], table: Table, what: str
) -> tuple[dict[str, tuple[Row, list[str]]], str]:
    """Which row and which of their keys fill each of our tensors, and the load report; by names and shapes only."""
    theirs = {}  # their key, renamed -> their key
    for key in source:
        renamed = key
        for pattern, replacement in table.renames.items():
            renamed = re.sub(pattern, replacement, renamed)
        theirs[renamed] = key

    packed = next((key for key in source if key.endswith(".qweight")), None)  # of GPTQ and AWQ
    got = f"{what} is quantized, it has {packed}"
    expect(packed is None, f"{got}: expected weights in fp32, bf16 or fp16, fetch those")
    plan, problems, fresh, used = {}, [], Counter(), set()
    for ours, parameter in tensors_of(target).items():
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
        for key in plan[ours][1] if parameter.is_floating_point() else ():
            kind = source[key].dtype
            expect(
                kind.is_floating_point and kind.itemsize > 1,
                f"{what} is quantized, {key} is {str(kind)[6:]}: expected weights in fp32, bf16 or fp16, fetch those",
            )
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
        raise UserError(refusal(what, problems, [] if used else list(source)))
    report = [f"{len(used)} used"]
    report += [f"{n} ignored ({why})" for why, n in ignored.items()]
    report += [f"{n} fresh ({why})" for why, n in fresh.items()]
    return plan, f"{what}: {', '.join(report)}"


def refusal(what: str, problems: list[str], unused: list[str]) -> str:
    """The first ten of each kind, "missing", "shape" or "unknown"; what all keys begin with, if all are unused."""
    lines = []
    for kind, count in Counter(problem.partition(":")[0] for problem in problems).items():
        lines += [problem for problem in problems if problem.startswith(kind)][:10]
        lines += [f"{kind}: {count - 10} more"] * (count > 10)
    prefix = os.path.commonprefix(unused).rpartition(".")[0]
    hint = f"; all its keys begin with {prefix}., which is none of {', '.join(PREFIXES)}" if prefix else ""
    return f"{what} does not fit, nothing was loaded; {len(problems)} problem(s){hint}:\n  " + "\n  ".join(lines)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of a module holds: parameters and persistent buffers; one that is tied has its first name."""
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (name, tensor))
    return dict(named.values())


def rows_for(table: Table, ours: str):
    """Every row for our key, and its keys with the block's number in them."""
    for row in table.rows:
        if match := re.fullmatch(re.escape(row.ours).replace(r"\{\}", r"(\d+)"), ours):
            yield row, [key.format(*match.groups()) for key in row.theirs]


def first_match(patterns: dict[str, str], key: str) -> str | None:
    """The reason of the first pattern that matches the whole key."""
    return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, key)), None)


def unload(source: nn.Module, table: Table, without: dict[str, str] | None = None) -> dict[str, Tensor]:
    """The inverse of `load`: our tensors under their keys; of several rows the first counts.

    without: regular expression of our keys to leave out -> why. Raises UserError for tensors that have neither a row
    nor a reason to be left out, here or in `Table.fresh`.
    """
    theirs: dict[str, Tensor] = {}
    lost, tensors = [], tensors_of(source)
    for ours, parameter in tensors.items():
        row, keys = next(rows_for(table, ours), (None, []))
        if row is None or first_match(without or {}, ours):
            lost += [ours] * (first_match(table.fresh | (without or {}), ours) is None)
            continue
        tensor = parameter.detach()
        if row.transform.third is not None:  # a missing third stays zero
            fused = theirs.setdefault(keys[0], tensor.new_zeros(3 * len(tensor)))
            fused.chunk(3)[row.transform.third].copy_(tensor)
        else:
            parts = row.transform.write(tensor, len(keys))
            theirs |= {key: part.contiguous() for key, part in zip(keys, parts, strict=True)}
    expect(
        not lost,
        f"this format has no place for {len(lost)} of the {len(tensors)} tensors of {type(source).__name__} "
        f"({', '.join(lost[:3])}{', ...' * (len(lost) > 3)}): keep the run, or give them rows in weights/tables.py",
    )
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
            content = read_json(index, MAX_CONFIG)
            mapped = content.get("weight_map") if isinstance(content, dict) else None
            named = isinstance(mapped, dict) and all(isinstance(name, str) for name in mapped.values())
            expect(named, f"{index} has no weight_map from keys to files: fetch it again")
            names = sorted(set(mapped.values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise UserError(f"{index} names a file outside of {folder}, {outside[0]}: fetch it again")
        if names:
            break
    missing = [name for name in names if not os.path.exists(folder / name)]
    got = f"{folder} lacks {', '.join(missing)}" if missing else f"{folder} has no weights"
    expect(names and not missing, f"{got}: expected model.safetensors, its shards and index, or pytorch_model.bin")
    return [folder / name for name in names]


def open_tensors(paths: list[Path]) -> dict[str, Tensor]:
    """Tensors by key, mapped from safetensors files or PyTorch pickles (weights_only=True): they are read when used.
    Without what wrappers add to the keys."""
    tensors = {}
    for path in paths:
        expect_file(path, "a file of weights", sys.maxsize)
        safe = path.suffix == ".safetensors"
        try:
            mapped = safe or zipfile.is_zipfile(path)  # older pickles are read whole
            content = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            what = "is not a whole safetensors file" if safe else "cannot be read as PyTorch weights"
            raise UserError(f"{path} {what} ({reason(error)}") from None
        for key in WRAPPERS:
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        named = content if isinstance(content, dict) else {}
        found = {str(key): tensor for key, tensor in named.items() if isinstance(tensor, Tensor)}
        only = f", only {', '.join(map(str, list(named)[:5]))}" * bool(named)
        expect(found, f"{path} holds no state dict{only}: expected tensors by name")
        odd = next((key for key, t in found.items() if not holds_values(t)), None)
        expect(odd is None, f"{path} has {odd} without all of its values: expected dense tensors, fetch it again")
        tensors |= {key.replace("_orig_mod.", ""): tensor for key, tensor in found.items()}  # by compile
    while prefix := next((p for p in PREFIXES if tensors and all(key.startswith(p) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def holds_values(tensor: Tensor) -> bool:
    """Is each value in the file? A strided view can be of any size, a sparse or a meta tensor too."""
    dense = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested)
    return dense and tensor.nbytes <= tensor.untyped_storage().nbytes()


def reason(error: Exception) -> str:
    """Why a file of weights cannot be read, without PyTorch's advice to run the code in it, and what to do."""
    text = str(error) or type(error).__name__
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds a {found[1]}, and no code in a file is run): save its state dict alone"
    lines = text.rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    why = lines[0] if lines and "weights_only" not in lines[0] else "it is not one that is read without running code"
    return f"{shorten(why)}): fetch it again"


# --- no initialization -----------------------------------------------------------------------------------------------


class no_init(TorchFunctionMode):
    """Skip random initialization inside: drawing values that a file replaces takes four times as long as reading the
    file; and on the meta device drawing makes PyTorch import its compiler."""

    DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if function in self.DRAWS else function(*args, **(kwargs or {}))
