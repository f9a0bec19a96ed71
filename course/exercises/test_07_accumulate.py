"""Exercise 7, the loop: the gradient of a contrastive loss over a batch that does not fit into memory.

The mean of the losses of four micro-batches is another loss: each row sees a quarter of the negatives. But the loss
needs features only, and these do fit. First pass: the features of all micro-batches, without a graph; the loss; its
gradient at each feature. Second pass: each micro-batch again, with a graph, into which its part of that gradient goes.

Where to look: `engine/gradcache.py`; `tensor.backward(gradient)`; `torch.get_rng_state` for the dropout.
"""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course.adapters import accumulate

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_7]


class Encoder(nn.Module):
    """Two layers; remembers what it returned, and how many of its graphs were alive at once."""

    def __init__(self, drop: float = 0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(drop), nn.Linear(12, 4))
        self.returned, self.graphs, self.most_graphs = [], [], 0

    def forward(self, x):
        out = self.layers(x)
        self.returned.append(out.detach().clone())
        if out.requires_grad:
            self.graphs.append(weakref.ref(out))
            self.most_graphs = max(self.most_graphs, sum(graph() is not None for graph in self.graphs))
        return out


class Contrast(nn.Module):
    """ITC of pairs in the rows 0 and 1, 2 and 3, ..., with a learned temperature."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.2))

    def forward(self, feats):
        feats = F.normalize(feats, dim=1)
        similarity = feats[::2] @ feats[1::2].T / self.temperature
        return F.cross_entropy(similarity, torch.arange(len(similarity)))


def gradients(*modules) -> list[torch.Tensor]:
    return [parameter.grad.clone() for module in modules for parameter in module.parameters()]


@pytest.mark.parametrize("seed, sizes", [(0, [4, 4, 4]), (1, [2, 6]), (2, [8]), (3, [2] * 10)])
def test_loss_and_gradients_are_those_of_the_big_batch(seed, sizes):
    torch.manual_seed(seed)
    encoder, loss, batches = Encoder(), Contrast(), [torch.randn(size, 6) for size in sizes]
    expected = loss(encoder(torch.cat(batches)))
    expected.backward()
    wanted = gradients(encoder, loss)
    encoder.zero_grad(), loss.zero_grad()
    got = accumulate(encoder, batches, loss)
    torch.testing.assert_close(got, expected.detach())
    assert not got.requires_grad, "the loss that is returned still holds a graph"
    assert all(p.grad is not None for p in (*encoder.parameters(), *loss.parameters())), "a parameter has no gradient"
    for mine, right in zip(gradients(encoder, loss), wanted):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)


def test_one_graph_at_a_time():
    """That is the whole point: the activations of one micro-batch are in memory, not those of all."""
    encoder = Encoder()
    accumulate(encoder, [torch.randn(4, 6) for _ in range(5)], Contrast())
    assert all(len(out) == 4 for out in encoder.returned), "the encoder got more than one micro-batch at a time"
    assert encoder.most_graphs == 1, f"{encoder.most_graphs} graphs of the encoder were alive at once"


def test_gradients_add_up():
    """As those of `backward` do: zeroing them is the optimizer's task."""
    encoder, loss, batches = Encoder(), Contrast(), [torch.randn(4, 6) for _ in range(2)]
    accumulate(encoder, batches, loss)
    once = gradients(encoder, loss)
    accumulate(encoder, batches, loss)
    for twice, mine in zip(gradients(encoder, loss), once):
        torch.testing.assert_close(twice, 2 * mine)


def test_both_passes_drop_the_same():
    """Else the gradient at a feature is sent into another feature; and the batches do not all drop the same."""
    torch.manual_seed(0)
    encoder = Encoder(drop=0.5)
    accumulate(encoder, [torch.ones(4, 6) for _ in range(3)], Contrast())
    first, second = encoder.returned[:3], encoder.returned[3:]
    assert all(torch.equal(a, b) for a, b in zip(first, second)), "the second pass returns other features"
    assert not torch.equal(first[0], first[1]), "two micro-batches have the same dropout mask"


def test_the_next_step_drops_something_else():
    torch.manual_seed(0)
    encoder = Encoder(drop=0.5)
    for _ in range(2):
        accumulate(encoder, [torch.ones(4, 6)], Contrast())
    assert not torch.equal(encoder.returned[0], encoder.returned[2]), "every step has the same dropout mask"
