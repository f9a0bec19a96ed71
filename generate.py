"""Decoding: greedy, sampling (temperature, nucleus) and beam search, for any model that can append one token to a row.

A decoder is an object with three methods (the Q-Former's is `qformer.CaptionDecoder`):

    start() -> logits (B, W)          run whatever comes before the new text, once per image
    step(tokens) -> logits (R, W)     append tokens (R,) to the R rows; what comes next
    select(rows, beams)               row i becomes a copy of old row rows[i]: beams split, swap and die, rows drop out;
                                      from now on every `beams` rows in turn are of one image

So the prompt runs once per image and is copied to the beams afterwards, and finished rows are not computed on; on a
card, where idle rows cost less than other shapes do, they leave when they are half of all.
Lengths count new tokens only, the end token among them. Beam scores, penalties and early stopping are those of
transformers, so that results agree token by token (tests/test_generate.py).
"""

from functools import cache, partial

import torch
from torch import Tensor

NEVER = -1e9  # a score that no text has


class KVCache:
    """Self-attention keys and values of all layers, allocated once: 2 x (layers, R, H, room, K).

    What is there when the rows multiply, the prompt, all beams of an image have in common: so when beams change places,
    only what follows moves.
    """

    def __init__(self, layers: int, rows: int, heads: int, max_length: int, width: int, like: Tensor):
        room = -(-max_length // 8) * 8  # attention's kernels like masks of such lengths
        self.k = like.new_zeros(layers, rows, heads, room, width)
        self.v = torch.zeros_like(self.k)
        self.length = 0  # positions that are filled in every layer
        self.place = torch.zeros(1, dtype=torch.long, device=like.device)  # the same, as the device knows it
        self.in_common = 0  # of these positions, the first that are equal in all beams of an image

    @property
    def room(self) -> int:
        """Positions that there are, filled or not."""
        return self.k.shape[3]

    def __iter__(self):
        """For each layer's block what it hands its new keys and values to, and gets all from."""
        return (partial(self.extend, layer) for layer in range(len(self.k)))

    def one_more(self):
        """The same for one more position, with nothing that a later step would do otherwise: the place is a number on
        the device, and all positions come back, so a mask has to hide those behind it."""
        return (partial(self.put, layer) for layer in range(len(self.k)))

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (R, H, 1, K) at `place`; returns all keys and values, also those that are not filled."""
        self.k[layer].index_copy_(2, self.place, k)
        self.v[layer].index_copy_(2, self.place, v)
        if layer == len(self.k) - 1:
            self.place += 1
        return self.k[layer], self.v[layer]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (R, H, n, K) behind what is there; returns all keys and values so far."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        if layer == len(self.k) - 1:
            self.length = end
            self.place.fill_(end)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def select(self, rows: Tensor) -> bool:
        """Row i becomes a copy of old row rows[i]; if there are as many as before, of one of the same image. Returns
        whether all has moved to another place in memory."""
        if self.in_common and len(rows) == self.k.shape[1]:
            for x in (self.k, self.v):
                own = x[:, :, :, self.in_common : self.length]
                own.copy_(own.index_select(1, rows))
            return False
        if len(rows) > self.k.shape[1] and not self.in_common:
            self.in_common = self.length
        self.k, self.v = self.k.index_select(1, rows), self.v.index_select(1, rows)
        self.place = self.place.clone()
        return True


@cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each card: PyTorch keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


class Recorded:
    """A function of a tensor that does the same at each call, to tensors that stay where they are. On a card the second
    call is recorded as a CUDA graph, and from then on replayed: a step of a language model is several hundred small
    kernels, which the host needs longer to launch than the card to run."""

    def __init__(self):
        self.calls, self.graph = 0, None

    def __call__(self, function, x: Tensor) -> Tensor:
        """function(x); on a card, what it returned before is overwritten."""
        self.calls += 1
        if not x.is_cuda or self.calls == 1:  # the first call makes what is made once
            return function(x)
        if self.graph is None:
            self.x, self.graph = x.clone(), torch.cuda.CUDAGraph()
            with (
                torch.cuda.device(x.device),
                torch.cuda.graph(
                    self.graph,
                    stream=recording_stream(x.device),
                    capture_error_mode="thread_local",  # other threads may be loading pictures
                ),
            ):
                self.out = function(self.x)
        self.x.copy_(x)
        self.graph.replay()
        return self.out


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
    early_stopping: bool | str = False,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    prompt_ids: Tensor | None = None,
) -> list[list[list[int]]]:
    """Texts for B images -> for each image `num_captions` lists of token ids, without the end token, best first.

    sample: draw from the distribution at `temperature`, cut to the likeliest tokens that hold `top_p` of it
    (nucleus); otherwise beam search, or greedy with one beam.
    length_penalty: a beam's score is its log-probability / length ** length_penalty; below 0 favours short texts.
    generator: of the draws, on the device of the logits.
    repetition_penalty: above 1 makes tokens unlikely that stand in the text, or in prompt_ids (B, n), where -1 is none.
    early_stopping: stop when as many texts are finished as there are beams (True), or when no running one is likely
    to get better (False), or when none can get better ("never").
    """
    for what, value, fine, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("num_beams", num_beams, num_beams >= 1, "at least 1"),
        ("num_captions", num_captions, sample or 1 <= num_captions <= num_beams, "1 to num_beams, or sample=True"),
        ("temperature", temperature, temperature > 0, "above 0"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("early_stopping", early_stopping, early_stopping in (True, False, "never"), 'True, False or "never"'),
    ):
        if not fine:
            raise ValueError(f"got {what}={value}, expected {wanted}")
    if sample and num_beams > 1:
        raise ValueError(f"got sample=True and num_beams={num_beams}, expected one of the two: pass num_beams=1")
    shared = dict(
        end_id=end_id,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        repetition_penalty=repetition_penalty,
        prompt_ids=prompt_ids,
    )
    if num_beams > 1:
        found = beam_search(
            decoder,
            num_beams=num_beams,
            num_captions=num_captions,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            **shared,
        )
        return [[text for text, _ in group] for group in found]

    def pick(logits: Tensor) -> Tensor:
        if not sample:
            return logits.argmax(dim=-1)
        probabilities = nucleus(logits / temperature, top_p)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    return one_by_one(decoder, pick, copies=num_captions, **shared)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """(R, W) logits -> probabilities of the fewest likeliest tokens that together hold top_p; zero elsewhere."""
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # the mass of all likelier tokens
    kept = probabilities.masked_fill(before >= top_p, 0)
    return torch.zeros_like(kept).scatter(1, order, kept)


def penalize(logits: Tensor, seen: Tensor, repetition_penalty: float) -> Tensor:
    """Positive scores of seen tokens divided, negative ones multiplied. seen: (R, n) ids, -1 for none."""
    if repetition_penalty == 1.0:
        return logits
    is_seen = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    is_seen.scatter_(1, torch.where(seen < 0, logits.shape[1], seen), True)  # -1 goes to a column of its own
    harder = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    return torch.where(is_seen[:, :-1], harder, logits)


def rows_to_keep(works: list, on_card: bool) -> list[int] | None:
    """The rows that still work on something, if those that do not (None) are to leave now; None if all are to stay."""
    going = [row for row, work in enumerate(works) if work is not None]
    leave = 2 * len(going) <= len(works) if on_card else len(going) < len(works)
    return going if leave else None


def one_by_one(
    decoder, pick, *, copies, end_id, max_new_tokens, min_new_tokens, repetition_penalty, prompt_ids
) -> list[list[list[int]]]:
    """Greedy or sampling: every row goes its own way until its end token."""
    logits = decoder.start().float()
    images, device = len(logits), logits.device
    seen = torch.full((images, 0), -1, device=device) if prompt_ids is None else prompt_ids
    rows = torch.arange(images, device=device).repeat_interleave(copies)
    if copies > 1:
        decoder.select(rows)
        logits, seen = logits[rows], seen[rows]
    texts: list[list[int]] = [[] for _ in range(images * copies)]
    writes: list[int | None] = list(range(images * copies))  # which text each row writes, None for a finished one
    for length in range(max_new_tokens):
        logits = penalize(logits, seen, repetition_penalty)
        if length < min_new_tokens:
            logits[:, end_id] = float("-inf")
        tokens = pick(logits)
        for row, token in enumerate(tokens.tolist()):
            if token == end_id:
                writes[row] = None
            elif writes[row] is not None:
                texts[writes[row]].append(token)
        if length == max_new_tokens - 1 or not any(text is not None for text in writes):
            break
        if (going := rows_to_keep(writes, logits.is_cuda)) is not None:
            writes = [writes[row] for row in going]
            rows = torch.tensor(going, device=device)
            decoder.select(rows)
            tokens, seen = tokens[rows], seen[rows]
        seen = torch.cat((seen, tokens[:, None]), dim=1)
        logits = decoder.step(tokens).float()
    return [texts[i : i + copies] for i in range(0, len(texts), copies)]


def beam_search(
    decoder,
    *,
    num_beams,
    num_captions,
    length_penalty,
    early_stopping,
    end_id,
    max_new_tokens,
    min_new_tokens,
    repetition_penalty,
    prompt_ids,
) -> list[list[tuple[list[int], float]]]:
    """The `num_beams` likeliest running texts of each image, and as many finished ones -> texts with their scores.

    N images, K beams.
    """
    logits = decoder.start().float()
    device, K = logits.device, num_beams
    images: list[int | None] = list(range(len(logits)))  # whose rows are being computed, None for a finished one's
    best: list[list[tuple[list[int], float]]] = [[] for _ in images]
    seen = torch.full((len(images), 0), -1, device=device) if prompt_ids is None else prompt_ids
    prompt = seen.shape[1]
    seen, running = seen[:, None], torch.zeros(len(images), 1, device=device)  # (N, beams, n), (N, beams)
    done = torch.full((len(images), K, max_new_tokens), end_id, device=device)  # finished texts
    scores = torch.full((len(images), K), NEVER, device=device)  # and their scores; NEVER where there is none

    for length in range(1, max_new_tokens + 1):
        N, beams = running.shape
        log_probs = penalize(logits.log_softmax(dim=-1), seen.flatten(0, 1), repetition_penalty)
        if length <= min_new_tokens:
            log_probs[:, end_id] = float("-inf")
        words = log_probs.shape[1]
        total = running[:, :, None] + log_probs.view(N, beams, words)
        # Twice as many candidates as beams: at most half of them end, so K can go on.
        candidates, places = total.flatten(1).topk(min(2 * K, beams * words), dim=1)  # (N, 2K), best first
        parents, tokens = places // words, places % words
        parent_texts = seen.gather(1, parents[:, :, None].expand(-1, -1, seen.shape[2]))
        texts = torch.cat((parent_texts, tokens[:, :, None]), dim=2)  # (N, 2K, n + 1)

        ends = (tokens == end_id) | (length == max_new_tokens)
        # A text may finish only while it is among the best K.
        finished = torch.where(ends, candidates / length**length_penalty, NEVER)[:, :K]
        if early_stopping is True:
            finished = torch.where((scores > NEVER).all(dim=1, keepdim=True), NEVER, finished)
        padded = torch.full((N, finished.shape[1], max_new_tokens), end_id, device=device)
        padded[:, :, :length] = texts[:, :K, prompt:]
        scores, order = torch.cat((scores, finished), dim=1).topk(K, dim=1)
        done = torch.cat((done, padded), dim=1).gather(1, order[:, :, None].expand(-1, -1, max_new_tokens))

        running, order = torch.where(ends, NEVER, candidates).topk(min(K, candidates.shape[1]), dim=1)
        tokens, parents = tokens.gather(1, order), parents.gather(1, order)
        seen = texts.gather(1, order[:, :, None].expand(-1, -1, texts.shape[2]))

        # Which images can still improve?
        longest = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
        hope = running[:, :1] / longest**length_penalty
        open_ = (hope > scores).any(dim=1)
        if early_stopping is True:
            open_ &= ~(scores > NEVER).all(dim=1)
        if length == max_new_tokens:
            open_ &= False
        for row, goes_on in enumerate(open_.tolist()):
            if not goes_on and images[row] is not None:
                texts_of_row, scores_of_row = done[row, :num_captions].tolist(), scores[row].tolist()
                best[images[row]] = [(text_before(end_id, t), s) for t, s in zip(texts_of_row, scores_of_row)]
                images[row] = None
        if not any(image is not None for image in images):
            break
        rows = torch.arange(N, device=device)[:, None] * beams + parents
        if (going := rows_to_keep(images, logits.is_cuda)) is not None:
            images = [images[row] for row in going]
            kept = torch.tensor(going, device=device)
            rows, tokens, running, seen, done, scores = (x[kept] for x in (rows, tokens, running, seen, done, scores))
        decoder.select(rows.flatten(), tokens.shape[1])
        logits = decoder.step(tokens.flatten()).float()
    return best


def text_before(end_id: int, tokens: list[int]) -> list[int]:
    """The tokens before the end token."""
    return tokens[: tokens.index(end_id)] if end_id in tokens else tokens
