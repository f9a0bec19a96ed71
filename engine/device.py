"""The device of this process: precision, threads, memory."""

import ctypes
import os
import sys
from pathlib import Path

import torch

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
    """Precision of the matrix products, "fp32", "bf16" or "fp16", and the reason for it."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        best = ("bf16", "supported by this GPU") if has_bf16 else ("fp16", "this GPU has no bf16; with loss scaling")
    elif device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")  # fp32 on other systems than Linux
        flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
        # Intel's AVX512-BF16 without AMX multiplies bf16 more slowly than fp32: steps take 1.4 to 1.6 times as long.
        fast = "AMX" if "amx_bf16" in flags else "AVX512-BF16" if {"avx512_bf16", "AuthenticAMD"} <= flags else ""
        best = ("bf16", f"this CPU has {fast}") if fast else ("fp32", "bf16 is no faster on this CPU")
    else:
        best = ("fp32", f"the safe choice on {device.type}")
    no_fp16 = f"--precision fp16 needs a CUDA GPU, this is {device.type}: pass --precision {best[0]}"
    expect(wanted != "fp16" or device.type == "cuda", no_fp16)
    return best if wanted == "auto" else (wanted, "as requested")


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
    """Threads for this process, and no page faults for memory that was used before."""
    keep_freed_memory()
    if processes > 1:  # torchrun gives each process one thread; PyTorch or OMP_NUM_THREADS decides for a single one
        torch.set_num_threads(cores())


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
