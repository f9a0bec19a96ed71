"""A frozen part of the model spread over all ranks, where no single GPU holds it: --shard-llm and --shard-vit.

PyTorch's fully_shard (FSDP2): each rank keeps ceil(n / world) of the n rows of every tensor, and a unit (a block, an
embedding) is gathered before it runs, forwards and backwards, and dropped after it. What is trained stays whole on
every rank, under DistributedDataParallel.

A gathering needs all ranks. In a training step they run the same passes. Without gradients they do not: a text ends
sooner on one rank, another has no batch left, rank 0 alone draws the report. So there the ranks agree before each unit
which is the next, and who does not need it helps to gather it: `distributed.take_turns`. No rank computes for another.
"""

import re
import warnings
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from itertools import accumulate

import torch
from torch import Tensor, nn

from engine.device import keep_freed_memory
from engine.distributed import UNITS, take_turns, world_size

warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of views, which nothing here changes in place


def sharded_parts(flags) -> tuple[str, ...]:
    """The parts, "vit" and "llm", of which --shard-vit and --shard-llm were given."""
    return tuple(part for part in ("vit", "llm") if getattr(flags, f"shard_{part}", False))


def shard(part: nn.Module, device: str | torch.device) -> None:
    """Spread a frozen part, still on the meta device, over all ranks; `weights.load` or `draw` gives it its rows. What
    hangs on the part itself, as a ViT's position table, stays whole. Called in the same order on all ranks."""
    fsdp = import_module("torch.distributed.fsdp")  # takes a second, which others need not wait
    mesh = torch.distributed.device_mesh.init_device_mesh(torch.device(device).type, (world_size(),))
    if mesh.device_type == "cpu":
        keep_freed_memory(2**18)  # gathered blocks would leave holes in the heap, in all as large as what is spread
    own, units = set(part.requires_grad_(False).parameters(recurse=False)), units_of(part)
    for unit in reversed(units):  # inner ones first
        fsdp.fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    fsdp.fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=own)  # lets units overlap
    if hasattr(part, "embed"):  # a language model's other entrance, before all others
        fsdp.register_fsdp_forward_method(part, "embed")
    for number, unit in enumerate(units, start=len(UNITS)):
        unit.register_forward_pre_hook(partial(wait_for_turn, number), prepend=True)
    UNITS.extend(units)


def units_of(part: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: each block; keys and values of T5's cross-attention, computed apart from their block;
    and each module with weights outside of the blocks."""
    units = []
    for name, module in part.named_modules():
        in_block, has_weights = re.search(r"(^|\.)blocks\.", name), any(True for _ in module.parameters(recurse=False))
        if re.search(r"(^|\.)(blocks\.\d+|cross\.kv)$", name) or (name and has_weights and not in_block):
            units.append(module)
    return units


def wait_for_turn(number: int, *_) -> None:
    """Before a unit runs."""
    if not torch.is_grad_enabled():  # else all ranks run the same
        take_turns(number)


def is_sharded(tensor: Tensor) -> bool:
    """Does this rank hold only its rows?"""
    return hasattr(tensor, "placements")


def own_rows(parameter: Tensor, parts: list[Tensor]) -> Tensor:
    """This rank's rows of `parts`, joined: only these are read from a mapped file."""
    rows = -(-len(parameter) // world_size())
    start = torch.distributed.get_rank() * rows
    firsts = accumulate(map(len, parts), initial=0)
    found = [part[max(0, start - first) : max(0, start + rows - first)] for part, first in zip(parts, firsts)]
    return found[0] if len(found) == 1 else torch.cat(found)


def with_rows(parameter: Tensor, rows: Tensor) -> Tensor:
    """A tensor in the place of a sharded `parameter`, of which this rank holds these rows."""
    where = parameter.device_mesh, parameter.placements
    return parameter.from_local(rows, *where, run_check=False, shape=parameter.shape, stride=parameter.stride())


@torch.no_grad()
def draw(part: nn.Module, device: str | torch.device) -> None:
    """Random weights for a sharded part on the meta device, for dry runs and benchmarks: not those of one process."""
    part.to_empty(device=device)
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):  # as ranks draw
        for name, parameter in part.named_parameters():  # different numbers of rows
            if parameter.ndim == 1:
                parameter.fill_(name.endswith("weight"))  # of norms
        part.init_weights()
    for parameter in part.parameters(recurse=False):  # whole, so equal on all ranks
        parameter.zero_()


def bytes_per_rank(parameters: Iterable[Tensor], world: int = 0) -> int:
    """Bytes of parameters on each rank: sharded as they are, or as all would be over `world` ranks. They may be on the
    meta device."""
    total = 0
    for parameter in parameters:
        ranks = world or (world_size() if is_sharded(parameter) else 1)
        rows = len(parameter) if parameter.ndim else 1  # the temperature is a number
        total += parameter.nbytes // rows * -(-rows // ranks)
    return total
