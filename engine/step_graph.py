"""The losses and gradients of a training step as a CUDA graph, so that a small batch does not wait for the host.

A step of stage 1 is 3,700 kernels; with 64 images over ViT-g the host takes longer to launch them than the GPU to run
them, with 384 it does not. A graph launches all at once, but repeats the same work on the same memory: one is captured
for each shape of a batch. They are few, because texts are padded to multiples of 8 tokens.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.cuda_graph import capture_stream
from engine.distributed import world_size
from losses import random_numbers

EAGER = 2  # batches of a shape before it is captured: what is made once is made by then
MOST = 6  # graphs, which have gradients of their own; batches of further shapes run eagerly
ROOM = 0.4  # of the GPU's memory: above, an eager step and the graphs do not fit together, nor does the host hold it up


def tensors(thing) -> list[Tensor]:
    """The tensors in a dictionary, and in the dictionaries in it."""
    if isinstance(thing, dict):
        return sum(map(tensors, thing.values()), [])
    return [thing] if isinstance(thing, Tensor) else []


class Known(torch.autograd.Function):
    """Losses whose gradients have been computed: the backward pass hands them to the parameters."""

    @staticmethod
    def forward(ctx, anchor: Tensor, losses: Tensor, gradients: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
        ctx.gradients = gradients
        return losses.clone()

    @staticmethod
    def backward(ctx, _):
        for parameter, gradient in ctx.gradients:
            parameter.grad = gradient
        return None, None, None


class StepGraph:
    """Stands in the place of DistributedDataParallel: one process, one micro-batch a step, a CUDA GPU, no loss scaling
    (the gradients are those of the sum of the losses)."""

    def __init__(self, module: nn.Module):
        self.module, self.seen, self.graphs, self.pool = module, Counter(), {}, None
        self.anchor = torch.zeros((), requires_grad=True)

    def __call__(self, losses_of: partial, batch) -> dict[str, Tensor]:
        """losses_of(module, batch); its keywords: tensors, dictionaries of them, a generator with a hardness."""
        key = losses_of.func, *(x.shape for x in tensors(vars(batch)))
        self.seen[key] += 1
        if key not in self.graphs:
            device = self.module.device
            fits = torch.cuda.max_memory_allocated(device) < ROOM * torch.cuda.mem_get_info(device)[1]
            if self.seen[key] <= EAGER or len(self.graphs) == MOST or not fits:
                return losses_of(self.module, batch)
        keywords = self.as_tensors(losses_of.keywords, len(batch))
        if key not in self.graphs:
            self.graphs[key] = self.capture(losses_of.func, batch, keywords)
        graph, held, names, losses, gradients = self.graphs[key]
        for old, new in zip(held, tensors(vars(batch)) + tensors(keywords), strict=True):
            old.copy_(new)
        graph.replay()
        return dict(zip(names, Known.apply(self.anchor, losses, gradients)))

    def as_tensors(self, keywords: dict, rows: int) -> dict:
        """The keywords of the losses, with tensors for what changes from step to step."""
        if "generator" not in keywords:
            return keywords
        uniform = random_numbers(rows, keywords["generator"], self.module.device)
        return keywords | {
            "generator": uniform,
            "hardness": torch.full((), keywords["hardness"], device=uniform.device),
        }

    def capture(self, losses_of: Callable, batch, keywords: dict) -> tuple:
        """-> the graph, its input tensors, the names of the losses, their values, parameters with their gradients."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        batch, graph = batch.map(Tensor.clone), torch.cuda.CUDAGraph()
        how = dict(pool=self.pool, stream=capture_stream(self.module.device), capture_error_mode="thread_local")
        with torch.cuda.graph(graph, **how):  # other threads may be loading images
            losses = losses_of(self.module, batch, **keywords)
            sum(losses.values()).backward()
            values = torch.stack([loss.detach() for loss in losses.values()])
        gradients = [(p, p.grad) for p in self.module.parameters() if p.grad is not None]
        for parameter, _ in gradients:
            parameter.grad = None
        return graph, tensors(vars(batch)) + tensors(keywords), tuple(losses), values, gradients


def for_training(model: nn.Module, graphs: bool) -> nn.Module | StepGraph:
    """The model as a training step calls it: with several ranks, whose gradients are averaged, by
    DistributedDataParallel; on a single GPU by `StepGraph`, unless graphs=False; else as it is."""
    if world_size() > 1:  # all ranks have the same weights already
        return DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    return StepGraph(model) if graphs and model.device.type == "cuda" else model
