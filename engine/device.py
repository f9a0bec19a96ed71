"""The device of this process: precision, threads, memory."""

import ctypes
import os
import statistics
import sys
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from engine.distributed import gather_objects, local_rank, print0, rank
from engine.errors import expect

try:
    import resource
except ImportError:  # on Windows
    resource = None

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # name -> autocast dtype
DEVICES = ("auto", "cuda", "mps", "cpu")


def local_device(wanted: str = "auto") -> torch.device:
    """The device of this rank: "auto" is its CUDA GPU, else Apple's MPS, else the CPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted != "cuda":
        return torch.device(wanted)
    no_gpu = "--device cuda, but PyTorch sees no CUDA GPU here: pass --device cpu, or install a CUDA build"
    expect(torch.cuda.is_available(), no_gpu)
    count, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    got = f"got {os.environ.get('LOCAL_WORLD_SIZE')} processes for {count} CUDA GPUs"
    expect(local_rank < count, f"{got}: pass torchrun --nproc_per_node {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_precision(device: torch.device, wanted: str = "auto") -> tuple[str, str]:
    """Precision of the matrix products, "fp32", "bf16" or "fp16", and the reason for it, the same on all ranks."""
    no_fp16 = f"--precision fp16 needs a CUDA GPU, this is {device.type}: pass --precision auto"
    expect(wanted != "fp16" or device.type == "cuda", no_fp16)
    if wanted != "auto":
        return wanted, "as requested"
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "supported by this GPU") if has_bf16 else ("fp16", "this GPU has no bf16; with loss scaling")
    if device.type == "cpu":
        return gather_objects(cpu_precision() if rank() == 0 else None)[0]
    return "fp32", f"the safe choice on {device.type}"


def cpu_precision() -> tuple[str, str]:
    """bf16 where this CPU can multiply it and is clearly faster with it, so that a second measurement says the same."""
    cpuinfo = Path("/proc/cpuinfo")  # fp32 on other systems than Linux
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    times = bf16_speed() if flags & {"amx_bf16", "avx512_bf16"} else 0.0
    return ("bf16", f"{times:.1f} times as fast here") if times > 1.2 else ("fp32", "bf16 is no faster on this CPU")


@cache
def bf16_speed() -> float:
    """How many times as fast as in fp32 a wide layer of the Q-Former is under autocast, forward and backward: the
    median of five pairs, half a second. Flags do not tell: on Intel's AVX512-BF16 without AMX it is 0.6."""
    x, weight = torch.ones(256, 768, requires_grad=True), torch.ones(3072, 768, requires_grad=True)

    def seconds(half: bool) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.autograd.grad(F.linear(x, weight).sum(), (x, weight))
        return time.perf_counter() - start

    return statistics.median([seconds(False) / seconds(True) for _ in range(6)][1:])  # the first one prepares


def vit_dtype(precision: str, device: str | torch.device) -> torch.dtype:
    """Dtype of the frozen ViT's weights: half below fp32, on CUDA fp16 as in paper 3.4."""
    expect(precision in PRECISIONS, f"got precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    half = PRECISIONS[precision]
    if half is None:
        return torch.float32
    return torch.float16 if torch.device(device).type == "cuda" else half


def cores() -> int:
    """CPU cores of this machine per local process."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def prepare_cpu(processes: int) -> None:
    """Threads for this process, no page faults for memory that was used before, and a note if the cores are busy."""
    keep_freed_memory()
    if processes > 1:  # torchrun gives each process one thread; PyTorch or OMP_NUM_THREADS decides for a single one
        torch.set_num_threads(cores())
    settled = torch.get_num_threads() == 1 or os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    if not settled and (others := busy_neighbours()) >= (total := os.cpu_count() or 1):
        print0(f"note: {others} other threads are busy on {total} cores, and PyTorch's threads wait for each other by "
               "spinning: put GOMP_SPINCOUNT=1000 before the command, it may be several times as fast")  # fmt: skip


def busy_neighbours() -> int:
    """Threads beside this run's processes that run or want to: the median of a tenth of a second; 0 outside Linux."""
    loads, found = Path("/proc/loadavg"), [0]
    for _ in range(9 if loads.exists() else 0):
        found.append(int(loads.read_text().split()[3].partition("/")[0]) - local_rank()[1])
        time.sleep(0.01)
    return max(0, statistics.median_low(found))


def keep_freed_memory(most: int = 2**31 - 1) -> None:
    """Make glibc keep freed buffers of up to so many bytes. By default large ones go back to the system and return page
    by page: on a CPU a third of a training step. No effect outside Linux."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, most)  # M_MMAP_THRESHOLD: such buffers come from the heap
            libc.mallopt(-1, most)  # M_TRIM_THRESHOLD: whose top is kept


def peak_gigabytes(device: torch.device) -> float:
    """Peak memory of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
