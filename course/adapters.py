"""What the tests of the exercises call: one function or class each. Write a solution here, or anywhere and import it.

`python -m pytest -m exercise_3` grades exercise 3. The task is in its lesson and in course/exercises/test_03_mask.py,
a model answer in course/solutions/03-mask.patch (`git apply course/solutions/03-mask.patch`).
Letters: see the glossary of qformer.py.
"""
# ruff: noqa: F401 (the imports are for the solutions)

import math
from collections import Counter
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losses
import qformer
from losses import IGNORE
from tasks.metrics import ngrams


def embed_patches(images: Tensor, weight: Tensor, bias: Tensor, cls_token: Tensor, positions: Tensor) -> Tensor:
    """What enters the first block of a ViT: [CLS], then the patches row by row, each with its position.

    images (B, 3, h, w) fp32, normalised; weight (V, 3, p, p) and bias (V,) of the patch convolution; cls_token
    (1, 1, V); positions (1, P, V), P = 1 + h/p * w/p tokens. Returns (B, P, V). By a matrix product, without a
    convolution.
    """
    raise NotImplementedError("exercise 1: cut the images into patches, project them, add [CLS] and the positions")


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention of the queries to an image, without a mask: softmax(q k^T / sqrt(K)) v in each head.

    q (B, Q, D); k, v (B, P, D), already projected; head i owns the columns i * K to (i + 1) * K - 1, K = D / heads.
    Returns (B, Q, D), the heads side by side. Without `scaled_dot_product_attention`.
    """
    raise NotImplementedError("exercise 2: split the heads, attend, join the heads")


def attention_mask(kind: str, text_mask: Tensor, num_queries: int) -> Tensor:
    """Who may attend to whom, for kind "itc", "itm" and "itg", as drawn in course/exercises/test_03_mask.py.

    text_mask (B, T) bool, True = real token. Returns bool (B, 1, S, S), True = may attend, rows attend to columns;
    S = Q + T, the queries first.
    """
    raise NotImplementedError("exercise 3: turn the drawing of the three masks into code")


def contrastive_loss(similarity: Tensor, image_ids: Tensor, smoothing: float = 0.1) -> Tensor:
    """ITC of a batch: the mean of the image-to-text and the text-to-image cross-entropy, a scalar.

    similarity (N, N) fp32, cosine / temperature, row i = image i with every text; image_ids (N,) int64, equal for equal
    images: each text of an image is a positive of it. Target of a row: 1 - smoothing, spread evenly over its positives,
    plus smoothing, spread evenly over all N.
    """
    raise NotImplementedError("exercise 4: cross-entropy over the rows and over the columns, with smoothed targets")


def hard_negatives(similarity: Tensor, same_image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each row one candidate of another image, drawn with probability softmax(similarity) over those candidates.

    similarity (B, N) fp32; same_image (B, N) bool, True = of the row's own image. Returns negative (B,) int64 and found
    (B,) bool, False where every candidate is of the row's own image (its negative may then be any number below N).
    All rows at once, without a loop.
    """
    raise NotImplementedError("exercise 5: draw one negative for each row, never one of the row's own image")


def generation_batch(texts: list[list[int]], dec_id: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """ITG's inputs and labels: [DEC] in the place of [CLS], and each position predicts the next token.

    texts: token ids [CLS] w1 ... wn [SEP] of different lengths; a word may have the id `pad_id`. Returns ids (B, T)
    int64, mask (B, T) bool, True = real token, labels (B, T) int64, -100 where nothing is predicted; T = the longest.
    """
    raise NotImplementedError("exercise 6: pad the texts, start them with [DEC], shift the labels")


def accumulate(encoder: nn.Module, batches: list[Tensor], loss) -> Tensor:
    """Leave in `.grad` the gradient of loss(features of all batches), with the graph of one batch at a time in memory.

    encoder: (b, n) -> (b, E), may contain dropout; loss: (N, E), the features of all batches in order -> scalar, may
    have parameters of its own, e.g. a temperature. Returns the loss, without a graph. Gradients add to those there.
    """
    raise NotImplementedError("exercise 7: two passes, the first for the gradient of the features")


def caption_loss(lm, visual: Tensor, captions: Tensor, mask: Tensor, bos_id: int) -> Tensor:
    """Stage 2 with a decoder-only language model: mean cross-entropy of the captions' tokens, nothing else.

    lm.embed: (B, T) ids -> (B, T, L); lm: embeddings (B, S, L) -> logits (B, S, W), causal, position s predicts s + 1.
    visual (B, Q, L), the soft visual prompt; captions (B, T) ids, without BOS, padded on the right; mask (B, T) bool.
    The sequence is: visual prompt, BOS, caption.
    """
    raise NotImplementedError("exercise 8: put the visual prompt before the caption, and predict the caption alone")


def beam_search(log_probs, num_beams: int, end_id: int, max_tokens: int, length_penalty: float) -> list[int]:
    """The best text that a beam search finds, without its end token.

    log_probs: texts (R, n) int64 -> (R, W), log-probabilities of the next token of each; the search starts with one
    empty text, (1, 0). Each step keeps the `num_beams` most probable of all continuations of the running texts. Those
    that end, by `end_id` or with `max_tokens` tokens, are finished; the others run on, and when none is left, the best
    finished text is the answer. A finished text frees its place: the next step again keeps `num_beams`. The score of a
    text: the sum of its log-probabilities / length ** length_penalty; the length counts the end token, and a text that
    is cut has length `max_tokens`.
    """
    raise NotImplementedError("exercise 9: keep the best texts, put the finished ones aside")


def cider_d(captions: list[list[str]], references: list[list[list[str]]]) -> float:
    """CIDEr-D of a corpus, between 0 and 10: the words of N captions, and those of the references of each.

    For n = 1 to 4, a text is a vector with an entry for each n-gram: its count * log(N / number of images whose
    references contain it, at least 1). A caption against a reference: sum over the n-grams of min(caption's entry,
    reference's) * reference's, / (norm * norm), 0 if a norm is 0; * exp(-(difference of the lengths in words)^2 / 72).
    The mean over n, references and captions, times 10. `tasks.metrics.ngrams` counts n-grams.
    """
    raise NotImplementedError("exercise 10: tf-idf vectors of n-grams, their clipped cosine, the length penalty")


def save_run(run) -> dict:
    """All that `resume_run` needs, as tensors, numbers, lists and dicts of them; run: see test_11_resume.py."""
    raise NotImplementedError("exercise 11: save everything that the next steps depend on")


def resume_run(run, state: dict) -> None:
    """Make a new run go on bit by bit as the saved one would have; state: what `save_run` returned, from a file."""
    raise NotImplementedError("exercise 11: restore what save_run saved")


def queue_loss(
    image_feats: Tensor, text_feats: Tensor, image_ids: Tensor, queue: tuple, size: int, temperature: Tensor
) -> tuple[Tensor, tuple]:
    """ITC of a batch whose candidates are the batch itself and the queue, the features of earlier batches.

    image_feats (B, Q, E), text_feats (B, E), unit vectors; image_ids (B,). queue: the same three of M earlier rows, the
    newest last, M = 0 at first; a row of the queue with an equal id is a positive. Returns the loss and the next
    queue: the newest `size` rows, this batch included, without a graph.
    `losses.itc_similarity` and `losses.itc_loss` compute ITC of B rows against N candidates.
    """
    raise NotImplementedError("exercise 12: compare the batch with itself and the queue, then queue the batch")


def prefix_lm_mask(text_mask: Tensor, num_queries: int, prefix: Tensor) -> Tensor:
    """A fourth kind of mask: as "itg", but the first prefix[b] tokens of text b see each other, in both directions.

    text_mask (B, T) bool, True = real token; prefix (B,) int64, from 0 to T. Returns bool (B, 1, S, S), as
    `qformer.qformer_mask`. Padding stays masked as a key, even if it is in the prefix.
    """
    raise NotImplementedError("exercise 13: ITG's mask, and a prefix that is read in both directions")


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: dict) -> Tensor:
    """Causal attention of the n newest positions to themselves and to all earlier ones, which are in the cache.

    q, k, v (B, H, n, K) of the new positions, n >= 1; cache: this layer's own dict, empty at first, to be updated.
    Returns (B, H, n, K).
    """
    raise NotImplementedError("exercise 14: append to the cache, and attend causally to all of it")


class ConvEncoder(nn.Module):
    """An image encoder without attention, in the place of `vit.ViT`: 16 x 16 patches by strided convolutions.

    What `Blip2Model` asks of an encoder: `cfg.width` (V) and `cfg.image_size`; `pos_embed`, a parameter, by which it
    sees whether the encoder is trained; `forward`. There is no [CLS].
    """

    def __init__(self, width: int, image_size: int):
        super().__init__()
        raise NotImplementedError("exercise 15: the layers of the encoder, its cfg and its pos_embed")

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, h, w) with h = w = image_size, a multiple of 16 -> fp32 tokens (B, P, V), row by row."""
        raise NotImplementedError("exercise 15: from images to tokens")


class SmallLM(nn.Module):
    """The smallest language model that can stand behind the queries, in the place of `llm.OPT`: a causal block or two.

    What `Blip2Model` asks of a language model: `width` (L), `embed`, `forward`. The visual embeddings come first in
    every prompt and are never padding.
    """

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        raise NotImplementedError("exercise 16: the layers of the language model, and its width")

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, L)."""
        raise NotImplementedError("exercise 16: word embeddings")

    def forward(self, prompt: Tensor, prompt_mask: Tensor, target: Tensor) -> Tensor:
        """prompt (B, n, L), its mask (B, n) bool, target (B, T) -> logits (B, T, W), at t those for target[:, t].

        Padding is never the last position of a prompt; the target needs no mask.
        """
        raise NotImplementedError("exercise 16: read the prompt and the target, predict the target")
