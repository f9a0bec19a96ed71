"""Exercise 4, ITC: write the contrastive loss of a batch from its matrix of similarities.

Each row asks "which text belongs to this image?", each column "which image belongs to this text?". Where an image has
several texts in the batch, all of them are right. The target is smoothed: a share of 0.1 is spread over all candidates.

Where to look: paper 3.2. The cross-entropy with a target t is -(t * log_softmax(similarity)).sum(); see what
`torch.nn.functional.cross_entropy` does with a target of probabilities.
"""

import math

import pytest
import torch
from torch import Tensor

import losses
from course.adapters import contrastive_loss
from course.exercises.helpers import check

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_4]

SIMILARITY = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 0.0], [2.0, 0.0, 1.0]])


def cross_entropy(row: list[float], target: list[float]) -> float:
    """Of one row, on paper."""
    log_total = math.log(sum(math.exp(x) for x in row))
    return sum(share * (log_total - x) for share, x in zip(target, row))


def mistake(got: float, similarity: Tensor, image_ids: Tensor, smoothing: float) -> str:
    """What is likely wrong: the mistake that gives this loss, or else what to look at."""
    N, right = len(image_ids), (image_ids[:, None] == image_ids).double()
    evenly, wrong = right / right.sum(dim=1, keepdim=True), 1 - right

    def rows(target: Tensor) -> Tensor:
        """(2, N): the loss of each row, then of each column."""
        return torch.stack([-(target * s.double().log_softmax(dim=1)).sum(dim=1) for s in (similarity, similarity.T)])

    good = rows((1 - smoothing) * evenly + smoothing / N)
    only_wrong = [
        (1 - smoothing) * evenly + smoothing * wrong / count
        for count in (wrong.sum(dim=1, keepdim=True), max(N - 1, 1))
    ]
    others, unshared = torch.where(right > 0, (1 - smoothing) * evenly, smoothing / N), right + smoothing / N
    sums = "the target of a row must add up to 1"
    found = {
        "take the mean over rows, not the sum": (good.sum(), good.sum() / 2),
        "take the mean of the two directions, not their sum": (2 * good.mean(),),
        "the loss is the mean over rows and columns, yours is that of one of them": (good[0].mean(), good[1].mean()),
        "smoothing is spread over all N, the right ones included": tuple(rows(target).mean() for target in only_wrong),
        f"{sums}: smoothing / N comes to the right ones too": (rows(others).mean(),),
        f"{sums}: 1 - smoothing for the right ones, not 1": (rows(evenly + smoothing / N).mean(),),
        "smooth the targets": (rows(evenly).mean(),),
        f"{sums}: the texts of an image share it": tuple(
            rows(target).mean() for target in (right, (1 - smoothing) * right + smoothing / N, unshared)
        ),
        "all texts of an image are right, not the one on the diagonal alone": (
            rows((1 - smoothing) * torch.eye(N) + smoothing / N).mean(),
        ),
        "the logarithm of a probability is negative, the loss is not": (-good.mean(),),
    }
    for sentence, values in found.items():
        if any(abs(got - value) < 1e-5 * abs(value) for value in values):
            return sentence
    return f"softmax over the row? {sums}: (1 - smoothing) / number of right ones + smoothing / N?"


def check_loss(image_ids: list[int], expected: float, similarity: Tensor = SIMILARITY, smoothing: float = 0.1) -> None:
    """The loss is as expected; if not, one sentence says what is likely wrong."""
    image_ids = torch.tensor(image_ids)
    got = loss_of(similarity, image_ids, smoothing).item()
    hint = "" if got == pytest.approx(expected, rel=1e-5) else mistake(got, similarity, image_ids, smoothing)
    check(not hint, f"got a loss of {got:.4f}, expected {expected:.4f}: {hint}")


def loss_of(similarity: Tensor, image_ids: Tensor, smoothing: float = 0.1) -> Tensor:
    """The solution's loss, a finite scalar."""
    try:
        got = contrastive_loss(similarity, image_ids, smoothing)
    except ZeroDivisionError:
        check(False, f"division by zero for N = {len(image_ids)}: smoothing is spread over all N, not over N - 1")
    check(got.shape == (), f"got shape {tuple(got.shape)}, expected a scalar, the mean over rows and columns")
    hint = "divide smoothing by N, not by the number of wrong ones, and use log_softmax, not exp and log"
    check(bool(got.isfinite()), f"got a loss of {got.item()} for N = {len(image_ids)}: {hint}")
    return got


def test_without_any_knowledge_it_is_log_n():
    """All similarities 0: whatever the target, if it adds up to 1."""
    check_loss([4, 7, 5], math.log(3), torch.zeros(3, 3))
    check_loss([8, 3, 8], math.log(3), torch.zeros(3, 3))


def test_three_images_with_a_text_each_and_no_smoothing():
    """The right text of row i, and the right image of column i, is number i."""
    first, second, third = [1, 0, 0], [0, 1, 0], [0, 0, 1]
    i2t = cross_entropy([3, 0, 1], first) + cross_entropy([0, 2, 0], second) + cross_entropy([2, 0, 1], third)
    t2i = cross_entropy([3, 0, 2], first) + cross_entropy([0, 2, 0], second) + cross_entropy([1, 0, 1], third)
    check_loss([4, 7, 5], (i2t / 3 + t2i / 3) / 2, smoothing=0.0)


def test_smoothing_gives_a_share_to_all_three():
    """Of the target of each row, 0.1 is spread over all three candidates, the right one included."""
    right, rest = 0.9 + 0.1 / 3, 0.1 / 3
    targets = [right, rest, rest], [rest, right, rest], [rest, rest, right]
    pairs = [pair for matrix in (SIMILARITY, SIMILARITY.T) for pair in zip(matrix.tolist(), targets)]
    check_loss([4, 7, 5], sum(cross_entropy(*pair) for pair in pairs) / 6)


def test_two_texts_of_the_same_image_are_both_right():
    """Rows 0 and 2 are the same image: texts 0 and 2 share the target of either."""
    targets = [0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]
    pairs = [pair for matrix in (SIMILARITY, SIMILARITY.T) for pair in zip(matrix.tolist(), targets)]
    check_loss([8, 3, 8], sum(cross_entropy(*pair) for pair in pairs) / 6, smoothing=0.0)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [6, 6, 1, 6, 2, 1], [9] * 6, [3]])
def test_any_batch_has_the_loss_and_the_gradient_of_the_product(ids):
    torch.manual_seed(len(set(ids)))
    similarity = (5 * torch.randn(len(ids), len(ids))).requires_grad_()
    image_ids = torch.tensor(ids)
    expected = losses.itc_loss(similarity, similarity.T, image_ids[:, None] == image_ids)
    check_loss(ids, expected.item(), similarity)
    got = loss_of(similarity, image_ids)
    check(
        got.requires_grad, "the loss has no gradient: use torch's functions throughout, no `.item()` or `torch.tensor`"
    )
    mine, right = (torch.autograd.grad(loss, similarity)[0] for loss in (got, expected))
    hint = "is a part of it detached? The product's gradient goes through rows and columns"
    check(torch.allclose(mine, right, rtol=1e-4, atol=1e-6), f"the loss is right, its gradient is not: {hint}")


def test_large_similarities_overflow_nothing():
    """A temperature of 0.001 gives similarities up to 1,000, whose exponential is infinite."""
    loss_of(1000 * torch.eye(4), torch.arange(4))
