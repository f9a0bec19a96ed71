"""Ranks and collectives; every function works without a process group as it does with one process.

Letters: B rows of this rank, N rows of all ranks.
"""

import ctypes
import glob
import os
import signal
import sys
import time
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.stop import request

TIMEOUT = 10.0  # minutes that a rank waits for the others
LAUNCHER = os.getppid()  # torchrun, if it has started this process
BEGAN = time.time()
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by `torchrun --max-restarts`, so far
UNITS: list = []  # the modules that engine/sharding.py has spread over the ranks, in the same order on all of them


def started() -> tuple[int, int]:
    """Rank and number of processes as torchrun started them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes(timeout: float = TIMEOUT, run: Path | None = None) -> None:
    """Join the process group if torchrun started several processes. timeout: minutes that a rank waits in a collective
    for the others; then it fails, and torchrun ends all. run: where NCCL then writes what each rank did last."""
    number, size = started()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: if torchrun is killed, its ranks stop too
    if size > 1 and not dist.is_initialized():
        # NCCL for tensors on GPUs, gloo for the few numbers that stay on the host.
        kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if run is not None and torch.cuda.is_available():
            record_flight(run)
        group = dict(store=store(), rank=number, world_size=size)
        dist.init_process_group(kind, timeout=timedelta(minutes=timeout), **group)


def record_flight(run: Path) -> None:
    """Have NCCL's flight recorder write run/flight-rank0, ... when a collective times out, unless the user has set it
    up. (Names that PyTorch 2.11 and 2.13 read, with older ones.)"""
    for value, *names in (
        ("2000", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"),  # collectives
        (str(run / "flight-rank"), "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
        ("1", "TORCH_NCCL_DUMP_ON_TIMEOUT"),
    ):
        if not os.environ.keys() & set(names):
            os.environ[names[0]] = value
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"  # with torchrun's 1 the collectives end before they are written


def flights() -> str:
    """The files that the flight recorder has written since the start, and how to read them."""
    prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE", "")
    found = sorted(path for path in glob.glob(f"{glob.escape(prefix)}[0-9]*") if os.path.getmtime(path) > BEGAN)
    how = f"read them with torchfrtrace -p {os.path.basename(prefix)} {os.path.dirname(prefix)}"
    return f"; the last collectives of each rank: {', '.join(found)}; {how}" if prefix and found else ""


@cache
def store() -> dist.Store:
    """What the ranks of this start tell each other outside of collectives. In torchrun's store each restart has a
    prefix of its own, else it would read the addresses of those that have died (PyTorch's issue 135712). With
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 it has its own store: where machines come and go, they count differently."""
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = dist.TCPStore(*where, is_master=not hosted and started()[0] == 0)
    return dist.PrefixStore(f"start {RESTARTS}", server) if hosted else server


def first_to_fail() -> bool:
    """Is this the first rank that asks? The failures of the others follow from its."""
    if started()[1] == 1:
        return True
    try:
        return store().add("failed", 1) == 1
    except RuntimeError:  # the store has ended with the process that hosts it
        return started()[0] == 0


def leave_processes() -> None:
    """Leave the process group, if any: threads of gloo that outlive the interpreter may abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
        store.cache_clear()
        UNITS.clear()


def rank() -> int:
    """The rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> tuple[int, int]:
    """Number of this process among those of its machine, and how many these are."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def take_turns(mine: int) -> None:
    """Return when it is the turn of unit number `mine`; until then help to gather the units that others wait for, the
    first of them first, so that who is behind catches up. len(UNITS) stands for none, and is last."""
    while True:
        dist.all_reduce(turn := torch.tensor(mine), dist.ReduceOp.MIN)  # on the CPU: the host does not wait for the GPU
        if turn == mine:
            return
        UNITS[turn].unshard()
        UNITS[turn].reshard()


def together() -> bool:
    """Are there other processes? Then a collective follows, and those with passes left are helped through them."""
    if UNITS and world_size() > 1:
        take_turns(len(UNITS))
    return world_size() > 1


def print0(*lines: str) -> None:
    """Print on rank 0. If nobody reads it any more, as after `| head` or on a lost terminal, that is a request to
    stop."""
    if lines and rank() == 0:
        try:
            print(*lines, sep="\n", flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            request(13)  # SIGPIPE


class _AllGather(torch.autograd.Function):
    """Concatenation over the ranks; a row's gradient is summed over the ranks that used it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = all_sum(grad.contiguous())  # a copy: autograd may share `grad` with other consumers
        return grad.chunk(world_size())[rank()]


def all_gather(x: Tensor) -> Tensor:
    """(B, ...) of each rank -> (N, ...) in rank order, with gradient; x itself without a process group.

    LAVIS detaches the gathered rows, its own included, and so loses half of the contrastive gradient.
    """
    return _AllGather.apply(x) if together() else x


def all_gather_padded(*tensors: Tensor) -> list[Tensor]:
    """`all_gather` of tensors (B, T) whose T differs between ranks: zero-padded to the longest T."""
    if world_size() > 1:
        longest = all_max(torch.tensor(tensors[0].shape[1]))  # on the CPU: the host does not wait for the device
        tensors = tuple(F.pad(x, (0, int(longest) - x.shape[1])) for x in tensors)
    return [all_gather(x) for x in tensors]


def all_sum(x: Tensor) -> Tensor:
    """The sum of x over the ranks, without gradient; x itself without a process group."""
    if together():
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """The maximum of x over the ranks, without gradient; x itself without a process group."""
    if together():
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def barrier() -> None:
    """Wait for all ranks."""
    if together():
        dist.barrier()


def gather_objects(thing) -> list:
    """A small Python object of each rank -> the list of all, in rank order."""
    things = [thing] * world_size()
    if together():
        dist.all_gather_object(things, thing)
    return things


def same_disk(path: Path) -> list[int]:
    """The ranks that share a disk with this one: all if all see `path`, which rank 0 has made, else those of its
    machine."""
    seen = gather_objects((path.exists(), os.environ.get("GROUP_RANK")))
    everywhere = all(there for there, _ in seen)
    return [number for number, (_, machine) in enumerate(seen) if everywhere or machine == seen[rank()][1]]


def take_from_0(tensors) -> None:
    """Overwrite tensors by those of rank 0."""
    for tensor in tensors if world_size() > 1 else ():
        dist.broadcast(tensor, 0)


class _FetchRows(torch.autograd.Function):
    """Send rows to the ranks that want them; in the backward pass their gradients travel back."""

    @staticmethod
    def forward(ctx, x: Tensor, send_rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.save_for_backward(send_rows)
        ctx.shape, ctx.sent, ctx.received = x.shape, sent, received
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x[send_rows], received, sent)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (send_rows,) = ctx.saved_tensors
        returned = grad.new_empty(sum(ctx.sent), *ctx.shape[1:])
        dist.all_to_all_single(returned, grad.contiguous(), ctx.sent, ctx.received)
        return grad.new_zeros(ctx.shape).index_add_(0, send_rows, returned), None, None, None


def fetch_rows(x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Fetch the wanted rows that other ranks hold, each once; gradients travel back.

    x: (B, ...) of this rank; wanted: (m,) row numbers of the gathered x. Returns `fetched` (n, ...) and `index` (m,)
    such that torch.cat((x, fetched))[index] is all_gather(x)[wanted]. Only the n rows travel. With several ranks the
    host waits once for the device, because it has to know the message sizes.
    """
    if world_size() == 1:
        return x[:0], wanted
    B = len(x)
    foreign = []  # for each rank, the rows that it receives, in ascending order
    for receiver, rows in enumerate(all_gather(wanted).view(world_size(), -1).cpu()):
        rows = rows.unique()
        foreign.append(rows[rows // B != receiver])
    sent_rows = [rows[rows // B == rank()] - rank() * B for rows in foreign]
    received = torch.bincount(foreign[rank()] // B, minlength=world_size()).tolist()
    position = torch.searchsorted(foreign[rank()].to(x.device, non_blocking=True), wanted)
    send_rows = torch.cat(sent_rows).to(x.device, non_blocking=True)
    fetched = _FetchRows.apply(x, send_rows, [len(rows) for rows in sent_rows], received)
    return fetched, torch.where(wanted // B == rank(), wanted - rank() * B, B + position)
