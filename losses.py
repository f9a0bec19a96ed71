"""The losses of both stages (paper 3.2 and 3.3) as pure functions of tensors.

    ITC  image-text contrastive learning        which text of the batch belongs to this image, and vice versa
    ITM  image-text matching                    does this pair match? one positive, two hard negatives per row
    ITG  image-grounded text generation         next-token prediction, given the image through the queries
    LM   language modelling (stage 2)           next-token prediction by the frozen language model, given the same

Every loss is a sum over the rows (or tokens) of this rank divided by `total`, their number in the whole step: over all
ranks and all micro-batches. So the ranks' losses and gradients add up to those of one big batch. Without `total` a
loss is the mean over the rows given. Similarities, softmax and cross-entropy are computed in fp32.
Letters: B rows of this rank, N rows of all ranks, Q queries, E shared embedding, T text tokens, W vocabulary.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LABEL_SMOOTHING = 0.1  # of ITC and ITG, as in LAVIS; ITM has none
ITM_PRIOR = math.log(3) - 2 / 3 * math.log(2)  # 0.6365: ITM loss of a model that predicts the class prior, 1/3
IGNORE = -100  # label of a position where nothing is predicted


def smoothing_floor(classes: int) -> float:
    """Minimum of a label-smoothed cross-entropy over `classes`: the entropy of its target."""
    rest = LABEL_SMOOTHING / classes
    right = 1 - LABEL_SMOOTHING + rest
    return -right * math.log(right) - (classes - 1) * rest * math.log(rest)


# --- ITC -------------------------------------------------------------------------------------------------------------


def itc_similarity(
    image_feats: Tensor, text_feats: Tensor, image_feats_all: Tensor, text_feats_all: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Paper 3.2: highest cosine of a text with any query of an image, divided by the temperature.

    image_feats (B, Q, E) and text_feats (B, E) of this rank, *_all (N, Q, E) and (N, E) of all ranks, unit length.
    Returns sim_i2t (B, N), each image with all texts, and sim_t2i (B, N), each text with all images; fp32.
    """
    with torch.autocast(image_feats.device.type, enabled=False):
        sim_i2t = torch.einsum("bqe,ne->bnq", image_feats.float(), text_feats_all.float()).amax(dim=-1)
        sim_t2i = torch.einsum("be,nqe->bnq", text_feats.float(), image_feats_all.float()).amax(dim=-1)
    return sim_i2t / temperature, sim_t2i / temperature


def itc_loss(sim_i2t: Tensor, sim_t2i: Tensor, same_image: Tensor, total: Tensor | int | None = None) -> Tensor:
    """Mean of the image-to-text and the text-to-image cross-entropy over the N candidates.

    same_image: (B, N) bool, the positives. A row's target is 0.9 spread evenly over its positives + 0.1 / N over all
    candidates: with one positive, ordinary label smoothing.
    """
    positives = same_image / same_image.sum(dim=1, keepdim=True)
    targets = (1 - LABEL_SMOOTHING) * positives + LABEL_SMOOTHING / same_image.shape[1]
    i2t = -(targets * sim_i2t.float().log_softmax(dim=1)).sum()
    t2i = -(targets * sim_t2i.float().log_softmax(dim=1)).sum()
    return (i2t + t2i) / 2 / (len(same_image) if total is None else total)


# --- ITM -------------------------------------------------------------------------------------------------------------


class Negatives(NamedTuple):
    """Hard negatives of B pairs, as row numbers among the N rows of all ranks."""

    images: Tensor  # (B,), one for each text
    texts: Tensor  # (B,), one for each image
    has_negative_image: Tensor  # (B,) bool, False where every candidate is of the same image
    has_negative_text: Tensor  # (B,) bool


def random_numbers(rows: int, generator: torch.Generator | Tensor | None, device: torch.device) -> Tensor:
    """Uniform random numbers (2, N), for the negative image and the negative text of each global row, so that the draw
    does not depend on how the rows are spread over ranks. generator: on the CPU, or the numbers themselves."""
    drawn = generator if isinstance(generator, Tensor) else torch.rand(2, rows, generator=generator)
    return drawn.to(device, non_blocking=device.type == "cuda")


def draw_negatives(sim_i2t: Tensor, sim_t2i: Tensor, same_image: Tensor, uniform: Tensor, hardness: float) -> Negatives:
    """A negative image for each text and a negative text for each image, drawn by similarity (ALBEF, BLIP).

    sim_*, same_image: (B, N); uniform: (2, B). hardness: 1 draws by the softmax of the similarity (the paper), 0 draws
    uniformly, values between interpolate.
    """
    images, has_negative_image = sample_hard_negatives(hardness * sim_t2i, same_image, uniform[0])
    texts, has_negative_text = sample_hard_negatives(hardness * sim_i2t, same_image, uniform[1])
    return Negatives(images, texts, has_negative_image, has_negative_text)


def negative_probabilities(sim: Tensor, same_image: Tensor) -> Tensor:
    """Sampling probability of each candidate: softmax of `sim` (B, N) over the negatives, all 0 if there are none."""
    sim = torch.nan_to_num(sim.detach().float())  # an overflow must not break the draw; the loss will report it
    return torch.nan_to_num(sim.masked_fill(same_image, float("-inf")).softmax(dim=1))


def sample_hard_negatives(sim: Tensor, same_image: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling of one negative per row, without host synchronisation.

    sim, same_image: (B, N); uniform: (B,) in [0, 1). Returns negative (B,) row numbers and found (B,) bool.
    """
    cumulative = negative_probabilities(sim, same_image).cumsum(dim=1)
    mass = cumulative[:, -1:]
    # Strictly below the mass, so that rounding cannot select a candidate after the last one of non-zero probability.
    negative = torch.searchsorted(cumulative, uniform[:, None] * mass * (1 - 1e-6), right=True).squeeze(1)
    found = mass.squeeze(1) > 0
    return torch.where(found, negative, 0), found


def itm_loss(logits: Tensor, is_match: Tensor, valid: Tensor, total: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of (R, 2) logits (column 1 = match) with (R,) bool labels, over the rows with valid (R,) True."""
    losses = F.cross_entropy(logits.float(), is_match.long(), reduction="none")
    return (losses * valid).sum() / (valid.sum().clamp(min=1) if total is None else total)


# --- ITG and LM ------------------------------------------------------------------------------------------------------


def itg_loss(logits: Tensor, labels: Tensor, total: Tensor | int | None = None) -> Tensor:
    """Label-smoothed cross-entropy of (B, T, W) logits with (B, T) labels, -100 where nothing is predicted."""
    return token_loss(logits, labels, total, LABEL_SMOOTHING)


def lm_loss(logits: Tensor, labels: Tensor, total: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of (B, T, W) logits with (B, T) labels, -100 where nothing is predicted; no smoothing."""
    return token_loss(logits, labels, total, 0.0)


def token_loss(logits: Tensor, labels: Tensor, total: Tensor | int | None, smoothing: float) -> Tensor:
    """Cross-entropy summed over the labelled positions, divided by `total` (by default their number)."""
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum"
    )
    return loss / ((labels != IGNORE).sum().clamp(min=1) if total is None else total)
