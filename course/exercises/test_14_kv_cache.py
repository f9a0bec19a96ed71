"""Exercise 14, a KV cache: attend to earlier positions without computing them again.

In a causal model the keys and values of a position depend on nothing that comes later. So a text of n tokens is written
with n small steps instead of n passes over all of it. A step may also bring several positions at once: a prompt.

Where to look: `generate.KVCache`; `llm.causal_mask`. Beware of `is_causal=True` where there are fewer rows than keys.
"""

import pytest
import torch
from torch import nn

from course.adapters import cached_attention

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_14]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """All positions at once, without a cache."""
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v


@pytest.mark.parametrize("chunks", [[1] * 6, [6], [4, 1, 1], [1, 3, 2], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_any_way_to_cut_a_text_gives_what_the_whole_gives(chunks, seed):
    """Token by token, at once, a prompt and then tokens, chunks."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    cache, got = {}, []
    for parts in zip(*(x.split(chunks, dim=2) for x in (q, k, v))):
        got.append(cached_attention(*parts, cache))
        assert got[-1].shape == parts[0].shape, "one output for each new position"
    got, expected = torch.cat(got, dim=2), causal(q, k, v)
    for position in range(6):
        close = torch.allclose(got[:, :, position], expected[:, :, position], atol=1e-5)
        assert close, f"cut into {chunks}, position {position} has another output"


def test_the_cache_holds_the_keys_and_values_of_each_position_once():
    cache, (q, k, v) = {}, torch.randn(3, 1, 2, 5, 4)
    for i in range(5):
        cached_attention(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], cache)
    tensors = [x for x in cache.values() if torch.is_tensor(x) and x.numel() > 1]
    assert sum(x.numel() for x in tensors) == k.numel() + v.numel(), "expected five positions of k and of v"


class Decoder(nn.Module):
    """Two layers of causal self-attention over words, with or without caches."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))

    def forward(self, ids, caches=None):
        x = self.words(ids)
        for layer, qkv in enumerate(self.qkv):
            q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in qkv(x).chunk(3, dim=2))
            out = causal(q, k, v) if caches is None else cached_attention(q, k, v, caches[layer])
            x = x + out.transpose(1, 2).flatten(2)
        return x @ self.words.weight.T


def test_greedy_texts_are_the_same_with_the_cache_and_two_texts_do_not_mix():
    """Two layers with a cache each; the second text starts with caches of its own."""
    torch.manual_seed(0)
    model = Decoder()
    for prompt in ([[3, 4, 5]], [[7, 8]]):
        plain, caches = torch.tensor(prompt), [{}, {}]
        new = written = plain
        with torch.no_grad():
            for _ in range(6):
                plain = torch.cat((plain, model(plain)[:, -1:].argmax(dim=2)), dim=1)
                new = model(new, caches)[:, -1:].argmax(dim=2)
                written = torch.cat((written, new), dim=1)
        assert written.tolist() == plain.tolist()
