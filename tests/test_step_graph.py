"""A training step as a CUDA graph: the same losses and gradients as without. On a CPU the graph is a recording."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from conftest import random_batch, small_model, stage2_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blip2 import Blip2
from data import llm_batch
from engine.step_graph import EAGER, MOST, StepGraph
from model import OBJECTIVES, Blip2Model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


class Recording(TorchDispatchMode):
    """What a CUDA graph is: the same kernels with the same Python values on the same memory, again."""

    calls, replays = None, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        Recording.replays += 1
        with torch.no_grad():
            for function, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextmanager
def recording(graph, **_):
    graph.calls = []
    with graph:
        yield


@pytest.fixture
def recorder(monkeypatch):
    Recording.replays = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 100))
    monkeypatch.setattr("engine.step_graph.capture_stream", lambda _: None)
    return Recording


def stage1_step(model, number: int) -> tuple[partial, object]:
    """Batches of many lengths; another hardness and other negatives each time."""
    batch = random_batch(5, seed=number, image_ids=[0, 1, 1, 2, number % 4]).to(model.device)
    totals, draw = Blip2Model.stage1_totals([batch]), torch.Generator().manual_seed(number)
    how = dict(objectives=OBJECTIVES, totals=totals, generator=draw, hardness=number / 10)
    return partial(Blip2Model.stage1_losses, **how), batch


def stage2_step(model: Blip2, number: int) -> tuple[partial, object]:
    """Targets of many lengths."""
    words = torch.randint(5, 300, (3, 4 + 5 * number % 17), generator=torch.Generator().manual_seed(number)).tolist()
    images = random_batch(3, seed=number).images
    batch = llm_batch([[2]] * 3, words, model.llm_tokenizer, [0, 1, 2], images=images).to(model.device)
    return partial(Blip2Model.stage2_losses, totals=Blip2Model.stage2_totals([batch])), batch


def losses_and_gradients(called, model, losses_of, batch) -> list[torch.Tensor]:
    losses = called(losses_of, batch)
    sum(losses.values()).backward()
    found = [loss.detach().clone() for loss in losses.values()]
    found += [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)  # as clipping does
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["1", "opt", "t5"])
def test_a_replayed_step_has_the_losses_and_gradients_of_its_batch(kind, recorder):
    model, step = (small_model(), stage1_step) if kind == "1" else (stage2_model(kind), stage2_step)
    graph, lengths = StepGraph(model), set()
    for number in range(12):
        losses_of, batch = step(model, number)
        lengths.add(batch.labels.shape[1])
        expected = losses_and_gradients(model, model, *step(model, number))
        for found, right in zip(losses_and_gradients(graph, model, losses_of, batch), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    assert len(lengths) > 1
    assert recorder.replays == 12 - EAGER * len(lengths)


def test_rare_shapes_and_large_batches_run_eagerly(recorder, monkeypatch):
    model = small_model()
    graph = StepGraph(model)
    for rows in range(2, 2 * MOST):
        for _ in range(EAGER + 1):
            batch = random_batch(rows)
            graph(partial(Blip2Model.stage1_losses, **stage1_step(model, 0)[0].keywords), batch)
    assert len(graph.graphs) == MOST
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 50)
    graph = StepGraph(model)
    for number in range(5):
        graph(*stage1_step(model, number))
    assert not graph.graphs


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_a_graph_computes_what_single_kernels_do(precision):
    model = small_model().set_precision(precision, "cuda")
    graph = StepGraph(model)
    for number in range(10):
        expected = losses_and_gradients(model, model, *stage1_step(model, number))
        for found, right in zip(losses_and_gradients(graph, model, *stage1_step(model, number)), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-3 if precision == "fp32" else 0.1, atol=1e-3)
    assert graph.graphs
