"""Decoding: greedy, sampling (temperature, nucleus) and beam search, for any model that can append a token.

A decoder is an object with three methods (`llm.CausalDecoder`, `llm.T5Decoder`, `blip2.CaptionDecoder`):

    start() -> logits (B, W)          run whatever precedes the new text, once per image
    step(tokens) -> logits (R, W)     append tokens (R,) to the R rows; logits of the next token
    select(rows, beams)               row i becomes a copy of old row rows[i]: reorders beams, drops finished rows;
                                      from now on every `beams` consecutive rows belong to one image

So the prompt runs once per image and is copied to the beams afterwards, and finished rows are dropped: at once on a
CPU, on a GPU when they are half of all rows, because a new shape costs more than idle rows.
Lengths count new tokens only, the end token included. Beam scores, penalties and the stopping rule are those of
transformers, so that results agree token by token (tests/test_generate.py).
"""

from types import SimpleNamespace

import torch
from torch import Tensor

NEVER = -1e9  # stands for -inf: below the score of any text


class KVCache:
    """Self-attention keys and values of all layers, allocated once: 2 x (layers, R, H, capacity, K).

    The prompt's entries are equal in all beams of an image, so reordering beams moves only later entries.
    """

    def __init__(self, layers: int, rows: int, heads: int, max_length: int, width: int, like: Tensor):
        capacity = -(-max_length // 8) * 8  # attention kernels prefer such mask lengths
        self.k = like.new_zeros(layers, rows, heads, capacity, width)
        self.v = torch.zeros_like(self.k)
        self.length = 0  # filled positions, in every layer
        self.position = torch.zeros(1, dtype=torch.long, device=like.device)  # the same, on the device
        self.shared_length = 0  # leading positions that are equal in all beams of an image

    @property
    def capacity(self) -> int:
        """Positions, filled or not."""
        return self.k.shape[3]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (R, H, n, K) to a layer and return all its keys and values."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        if layer == len(self.k) - 1:
            self.length = end
            self.position.fill_(end)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def static_view(self) -> SimpleNamespace:
        """A cache whose `update` appends one position with fixed shapes, so that a CUDA graph can replay it: the
        position is a tensor, and all of the capacity is returned, so a mask has to hide what is not filled."""
        return SimpleNamespace(update=self.write_at_position)

    def write_at_position(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (R, H, 1, K) at `position`; returns the whole layer."""
        self.k[layer].index_copy_(2, self.position, k)
        self.v[layer].index_copy_(2, self.position, v)
        if layer == len(self.k) - 1:
            self.position += 1
        return self.k[layer], self.v[layer]

    def select(self, rows: Tensor) -> bool:
        """Row i becomes a copy of old row rows[i]. With beams, if the number of rows stays, both are of the same
        image. Returns whether the cache has been reallocated."""
        if self.shared_length and len(rows) == self.k.shape[1]:
            for x in (self.k, self.v):
                own = x[:, :, :, self.shared_length : self.length]
                own.copy_(own.index_select(1, rows))
            return False
        if len(rows) > self.k.shape[1] and not self.shared_length:
            self.shared_length = self.length
        self.k, self.v = self.k.index_select(1, rows), self.v.index_select(1, rows)
        self.position = self.position.clone()
        return True


@torch.no_grad()
def generate(
    decoder,
    *,
    end_id: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    num_captions: int = 1,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[list[int]]]:
    """Texts for B images -> for each image `num_captions` lists of token ids without the end token, best first.

    sample: draw from the distribution at `temperature`, cut to the most probable tokens that hold `top_p` of it
    (nucleus); otherwise beam search, or greedy with one beam. generator: of the draws, on the logits' device.
    length_penalty: a beam's score is its log-probability / length ** length_penalty; below 0 favours short texts.
    repetition_penalty: above 1 makes tokens that are already in the text less probable.
    """
    for what, value, fine, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("num_beams", num_beams, num_beams >= 1, "at least 1"),
        ("num_captions", num_captions, 1 <= num_captions <= (num_captions if sample else num_beams), "1 to num_beams"),
        ("temperature", temperature, temperature > 0, "above 0"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("sample", sample, not sample or num_beams == 1, "num_beams=1 with it"),
    ):
        if not fine:
            raise ValueError(f"got {what}={value}, expected {wanted}")
    limits = end_id, max_new_tokens, min_new_tokens, repetition_penalty
    if num_beams > 1:
        return beam_search(decoder, num_beams, num_captions, length_penalty, *limits)

    def pick(logits: Tensor) -> Tensor:
        if not sample:
            return logits.argmax(dim=-1)
        return draw(logits / temperature, top_p, generator)

    return greedy_or_sample(decoder, pick, num_captions, *limits)


def nucleus(probabilities: Tensor, tokens: Tensor, top_p: float) -> Tensor:
    """Is a token of each row, (R,), in the smallest set that holds top_p? All more probable ones then hold less."""
    own = probabilities.gather(1, tokens[:, None])
    return probabilities.masked_fill(probabilities <= own, 0).sum(dim=-1) < top_p


def draw(logits: Tensor, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """(R, W) logits -> a token of the nucleus of each row (R,): drawn from all tokens, and again where it is outside,
    which takes a fraction of the time of sorting them."""
    probabilities = logits.softmax(dim=-1)
    below = probabilities.cumsum(dim=-1)
    tokens, rows = torch.empty_like(below[:, 0], dtype=torch.long), torch.arange(len(logits), device=logits.device)
    while len(rows):
        place = torch.rand(len(rows), 1, generator=generator, device=logits.device) * below[rows, -1:]
        drawn = torch.searchsorted(below[rows], place, right=True).clamp(max=logits.shape[1] - 1).squeeze(1)
        inside = nucleus(probabilities[rows], drawn, top_p)
        tokens[rows[inside]] = drawn[inside]
        rows = rows[~inside]
    return tokens


def penalize(logits: Tensor, seen: Tensor, repetition_penalty: float) -> Tensor:
    """Repetition penalty on the tokens `seen` (R, n): positive scores are divided by it, negative ones multiplied."""
    if repetition_penalty == 1.0:
        return logits
    is_seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, seen, True)
    harder = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    return torch.where(is_seen, harder, logits)


def rows_to_keep(owners: list, on_gpu: bool) -> list[int] | None:
    """The unfinished rows, if the finished ones (owner None) are to be dropped now; None if all stay."""
    active = [row for row, owner in enumerate(owners) if owner is not None]
    leave = 2 * len(active) <= len(owners) if on_gpu else len(active) < len(owners)
    return active if leave else None


def greedy_or_sample(
    decoder, pick, copies: int, end_id: int, max_new_tokens: int, min_new_tokens: int, repetition_penalty: float
) -> list[list[list[int]]]:
    """Greedy search or sampling: each row is decoded independently; `copies` rows of each image."""
    logits = decoder.start().float()
    images, device = len(logits), logits.device
    seen = torch.empty(images, 0, dtype=torch.long, device=device)
    if copies > 1:
        rows = torch.arange(images, device=device).repeat_interleave(copies)
        decoder.select(rows)
        logits, seen = logits[rows], seen[rows]
    texts: list[list[int]] = [[] for _ in range(images * copies)]
    owners: list[int | None] = list(range(images * copies))  # the text that each row writes, None if finished
    for length in range(max_new_tokens):
        logits = penalize(logits, seen, repetition_penalty)
        if length < min_new_tokens:
            logits[:, end_id] = float("-inf")
        tokens = pick(logits)
        for row, token in enumerate(tokens.tolist()):
            if token == end_id:
                owners[row] = None
            elif owners[row] is not None:
                texts[owners[row]].append(token)
        if length == max_new_tokens - 1 or not any(owner is not None for owner in owners):
            break
        if (active := rows_to_keep(owners, logits.is_cuda)) is not None:
            owners = [owners[row] for row in active]
            rows = torch.tensor(active, device=device)
            decoder.select(rows)
            tokens, seen = tokens[rows], seen[rows]
        seen = torch.cat((seen, tokens[:, None]), dim=1)
        logits = decoder.step(tokens).float()
    return [texts[i : i + copies] for i in range(0, len(texts), copies)]


def beam_search(
    decoder,
    num_beams: int,
    num_captions: int,
    length_penalty: float,
    end_id: int,
    max_new_tokens: int,
    min_new_tokens: int,
    repetition_penalty: float,
) -> list[list[list[int]]]:
    """Beam search: for each image the `num_beams` best running texts, and as many finished ones.

    An image is finished when no running text is better than its worst finished one, at the length so far.
    N images, K beams, n tokens so far.
    """
    logits = decoder.start().float()
    device, K = logits.device, num_beams
    owners: list[int | None] = list(range(len(logits)))  # the image that each row of N computes, None if finished
    best: list[list[list[int]]] = [[] for _ in owners]
    seen = torch.empty(len(owners), 1, 0, dtype=torch.long, device=device)  # (N, beams, n)
    running = torch.zeros(len(owners), 1, device=device)  # (N, beams) log-probabilities
    done = torch.full((len(owners), K, max_new_tokens), end_id, device=device)  # finished texts
    scores = torch.full((len(owners), K), NEVER, device=device)  # and their scores; NEVER where there is none

    for length in range(1, max_new_tokens + 1):
        N, beams = running.shape
        log_probs = penalize(logits.log_softmax(dim=-1), seen.flatten(0, 1), repetition_penalty)
        if length <= min_new_tokens:
            log_probs[:, end_id] = float("-inf")
        W = log_probs.shape[1]
        total = running[:, :, None] + log_probs.view(N, beams, W)
        # Twice as many candidates as beams: at most half of them end, so K can go on.
        candidates, places = total.flatten(1).topk(min(2 * K, beams * W), dim=1)  # (N, 2K), best first
        parents, tokens = places // W, places % W
        parent_texts = seen.gather(1, parents[:, :, None].expand(-1, -1, seen.shape[2]))
        texts = torch.cat((parent_texts, tokens[:, :, None]), dim=2)  # (N, 2K, n + 1)

        ends = (tokens == end_id) | (length == max_new_tokens)
        # A text may finish only while it is among the best K.
        finished = torch.where(ends, candidates / length**length_penalty, NEVER)[:, :K]
        padded = torch.full((N, finished.shape[1], max_new_tokens), end_id, device=device)
        padded[:, :, :length] = texts[:, :K]
        scores, order = torch.cat((scores, finished), dim=1).topk(K, dim=1)
        done = torch.cat((done, padded), dim=1).gather(1, order[:, :, None].expand(-1, -1, max_new_tokens))

        running, order = torch.where(ends, NEVER, candidates).topk(min(K, candidates.shape[1]), dim=1)
        tokens, parents = tokens.gather(1, order), parents.gather(1, order)
        seen = texts.gather(1, order[:, :, None].expand(-1, -1, texts.shape[2]))

        best_possible = running[:, :1] / length**length_penalty
        unfinished = (best_possible > scores).any(dim=1) & (length < max_new_tokens)
        for row, goes_on in enumerate(unfinished.tolist()):
            if not goes_on and owners[row] is not None:
                best[owners[row]] = [text_before(end_id, text) for text in done[row, :num_captions].tolist()]
                owners[row] = None
        if not any(owner is not None for owner in owners):
            break
        rows = torch.arange(N, device=device)[:, None] * beams + parents
        if (active := rows_to_keep(owners, logits.is_cuda)) is not None:
            owners = [owners[row] for row in active]
            kept = torch.tensor(active, device=device)
            rows, tokens, running, seen, done, scores = (x[kept] for x in (rows, tokens, running, seen, done, scores))
        decoder.select(rows.flatten(), tokens.shape[1])
        logits = decoder.step(tokens.flatten()).float()
    return best


def text_before(end_id: int, tokens: list[int]) -> list[int]:
    """The tokens before the end token."""
    return tokens[: tokens.index(end_id)] if end_id in tokens else tokens
