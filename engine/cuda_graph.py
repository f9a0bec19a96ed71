"""Capture a decoding step as a CUDA graph and replay it."""

from functools import cache

import torch
from torch import Tensor


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per GPU: PyTorch keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


class CUDAGraphed:
    """Call a function of one tensor; on a GPU, capture it as a CUDA graph at the second call, then replay it.

    The function must do the same work on the same memory at each call. A step of a language model is several hundred
    small kernels, which the host takes longer to launch than the GPU to run. On other devices the function is called.
    """

    def __init__(self):
        self.calls, self.graph = 0, None

    def __call__(self, function, x: Tensor) -> Tensor:
        """function(x); on a GPU the tensor that was returned before is overwritten."""
        self.calls += 1
        if not x.is_cuda or self.calls == 1:  # the first call makes what is made once
            return function(x)
        if self.graph is None:
            self.x, self.graph = x.clone(), torch.cuda.CUDAGraph()
            # Other threads may be loading images.
            how = dict(stream=capture_stream(x.device), capture_error_mode="thread_local")
            with torch.cuda.device(x.device), torch.cuda.graph(self.graph, **how):
                self.out = function(self.x)
        self.x.copy_(x)
        self.graph.replay()
        return self.out
