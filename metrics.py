"""Numbers: at which rank the right answer stands, how often it is among the first k; BLEU and CIDEr of captions."""

import math
import re
from collections import Counter

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


# --- captions --------------------------------------------------------------------------------------------------------

PUNCTUATION = re.compile(r"^(''|'|\"|``|`|-LRB-|-RRB-|-LCB-|-RCB-|\.|\?|!|,|:|-|--|\.\.\.|;)$")  # COCO's list
WORD = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|[\w&$%/#@*+=-]+?(?=n't\b)|[\w&$%/#@*+=.-]*[\w&$%/#@*+=]|[^\w\s]")


def caption_words(caption: str) -> list[str]:
    """A caption as the COCO evaluation counts it: lower case, clitics apart ("dog 's", "do n't"), no punctuation."""
    return [word for word in WORD.findall(caption.lower()) if not PUNCTUATION.match(word)]


def ngrams(words: list[str], most: int = 4) -> list[Counter]:
    """How often each n-gram occurs, for n = 1 to `most`."""
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, most + 1)]


def bleu(captions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """BLEU-1 to 4 of a corpus (Papineni et al., 2002), between 0 and 1: words of N captions, and for each of its
    references. The brevity penalty takes the reference of the closest length, the shorter of two."""
    right, said, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for words, texts in zip(captions, references, strict=True):
        counts, most = ngrams(words), [Counter() for _ in range(4)]
        for text in texts:
            for n, found in enumerate(ngrams(text)):
                most[n] |= found  # the highest count in any reference
        for n in range(4):
            said[n] += max(0, len(words) - n)
            right[n] += (counts[n] & most[n]).total()
        length += len(words)
        reference_length += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
    penalty = min(1.0, math.exp(1 - reference_length / length)) if length else 0.0
    # The tiny numbers are those of the COCO evaluation, where nothing matches.
    precisions = [(hits + 1e-15) / (total + 1e-9) for hits, total in zip(right, said)]
    return [penalty * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]


def cider(captions: list[list[str]], references: list[list[list[str]]]) -> float:
    """CIDEr-D of a corpus (Vedantam et al., 2015), between 0 and 10: see `bleu`. The references of the corpus are also
    what tells how rare an n-gram is."""
    spread = 6.0  # of the penalty on another length, in the original's words sigma
    counts = [[ngrams(text) for text in texts] for texts in references]
    seen_in = Counter(ngram for group in counts for ngram in {g for text in group for found in text for g in found})
    log_n = math.log(len(references))

    def vector(found: list[Counter]) -> tuple[list[dict], list[float]]:
        weighted = [{g: count * (log_n - math.log(max(1, seen_in[g]))) for g, count in part.items()} for part in found]
        return weighted, [math.sqrt(sum(value**2 for value in part.values())) for part in weighted]

    scores = []
    for words, group in zip(captions, counts, strict=True):
        said, said_norms = vector(found := ngrams(words))
        total = 0.0
        for text in group:
            told, told_norms = vector(text)
            longer = found[1].total() - text[1].total()  # counted in pairs of words, as in the original
            for n in range(4):
                product = sum(min(value, told[n].get(g, 0.0)) * told[n].get(g, 0.0) for g, value in said[n].items())
                norms = said_norms[n] * told_norms[n]
                total += (product / norms if norms else 0.0) * math.exp(-(longer**2) / (2 * spread**2))
        scores.append(10 * total / 4 / len(group))
    return sum(scores) / len(scores)
