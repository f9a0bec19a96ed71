"""Numbers from scores: at which rank the right answer stands, and how often it is among the first k."""

import torch
from torch import Tensor

RECALLS = (1, 5, 10)


def ranks(scores: Tensor, positives: Tensor) -> Tensor:
    """(n, m) scores of m candidates for n queries, positives (n, m) bool -> rank (n,) of the best positive, 0 = first.

    A wrong candidate with the same score goes first: a model that says the same about everything finds nothing, and so
    does one that says nan.
    """
    best = scores.masked_fill(~positives, float("-inf")).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~positives).sum(dim=1)


def reranked_ranks(first: Tensor, second: Tensor, positives: Tensor, k: int) -> Tensor:
    """Ranks after the k best candidates by `first` have been put in the order of `second`; all (n, m).

    Where no positive is among the k, re-ranking cannot help: the rank is the one by `first`.
    """
    chosen = torch.zeros_like(positives).scatter_(1, first.topk(min(k, first.shape[1]), dim=1).indices, True)
    among = ranks(second.masked_fill(~chosen, float("-inf")), positives & chosen)
    return torch.where((positives & chosen).any(dim=1), among, ranks(first, positives))


def recalls(rank: Tensor) -> dict[str, float]:
    """Ranks (n,) -> {"R@1": ..., "R@5": ..., "R@10": ...} in per cent."""
    return {f"R@{k}": 100 * (rank < k).double().mean().item() for k in RECALLS}


def chance(positives: Tensor) -> dict[str, float]:
    """What guessing gives: the expected recalls of a random order, in per cent; positives (n, m)."""
    m, found = positives.shape[1], positives.sum(dim=1).double()
    expected = {}
    for k in RECALLS:
        missed = torch.ones_like(found)
        for drawn in range(min(k, m)):  # none of the first k is a positive
            missed *= ((m - found - drawn) / (m - drawn)).clamp(min=0)
        expected[f"R@{k}"] = 100 * (1 - missed).mean().item()
    return expected
