"""Paper 3.2: the three losses by hand, their minima, and how hard negatives are drawn."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losses import (
    IGNORE,
    ITM_PRIOR,
    draw_negatives,
    itc_loss,
    itc_similarity,
    itg_loss,
    itm_loss,
    lm_loss,
    negative_probabilities,
    random_numbers,
    sample_hard_negatives,
    smoothing_floor,
)


def unit(*rows: list[float]) -> Tensor:
    """Rows of unit length."""
    return F.normalize(torch.tensor(rows, dtype=torch.float), dim=-1)


def eye(n: int) -> Tensor:
    """Each of n pairs is of another image."""
    return torch.eye(n, dtype=torch.bool)


# --- ITC -------------------------------------------------------------------------------------------------------------


def test_the_similarity_is_the_highest_cosine_over_the_queries_divided_by_the_temperature():
    image_feats = torch.stack((unit([1, 0], [0, 1]), unit([-1, 0], [-1, 0])))  # 2 images, 2 queries
    text_feats = unit([1, 1], [1, 0], [0, -1])
    i2t, t2i = itc_similarity(image_feats, text_feats[:2], image_feats, text_feats, torch.tensor(0.5))
    half = math.sqrt(0.5)
    expected = torch.tensor([[half, 1, 0], [-half, -1, 0]]) / 0.5
    torch.testing.assert_close(i2t, expected)
    torch.testing.assert_close(t2i, expected.T[:2])


def test_itc_of_three_pairs_by_hand():
    i2t = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
    t2i = i2t.T

    def row(logits, right):
        log_probs = [x - math.log(sum(math.exp(y) for y in logits)) for x in logits]
        return -sum((0.9 * (n == right) + 0.1 / 3) * lp for n, lp in enumerate(log_probs))

    expected = sum((row(i2t[n].tolist(), n) + row(t2i[n].tolist(), n)) / 2 for n in range(3)) / 3
    assert itc_loss(i2t, t2i, eye(3)).item() == pytest.approx(expected, rel=1e-5)


def test_itc_of_different_images_is_cross_entropy_with_label_smoothing():
    i2t, t2i = torch.randn(5, 5), torch.randn(5, 5)
    expected = sum(F.cross_entropy(sim, torch.arange(5), label_smoothing=0.1) for sim in (i2t, t2i)) / 2
    torch.testing.assert_close(itc_loss(i2t, t2i, eye(5)), expected)


def test_pairs_of_one_image_share_the_target():
    """0.9 is spread over the positives, 0.1 / N over all: the best logits for that target give its entropy."""
    ids = torch.tensor([7, 7, 8])
    positives = ids[:, None] == ids
    target = positives / positives.sum(1, keepdim=True) * 0.9 + 0.1 / 3
    best = target.log()
    entropy = -(target * best).sum() / 3
    torch.testing.assert_close(itc_loss(best, best, positives), entropy)
    assert itc_loss(best + torch.randn(3, 3), best, positives) > entropy


@pytest.mark.parametrize("n, floor", [(16, 0.565), (64, 0.729), (100, 0.778), (1600, 1.062), (30523, 1.358)])
def test_a_perfect_match_costs_the_smoothing_floor_and_a_uniform_guess_ln_n(n, floor):
    """The minima in the README's table: ITC over 16 to 1600 candidates, ITG over BERT's vocabulary."""
    assert smoothing_floor(n) == pytest.approx(floor, abs=1e-3)
    if n < 30523:
        best = torch.where(eye(n), math.log(0.9 + 0.1 / n), math.log(0.1 / n))
        assert itc_loss(best, best, eye(n)).item() == pytest.approx(smoothing_floor(n), rel=1e-4)
        assert itc_loss(torch.zeros(n, n), torch.zeros(n, n), eye(n)).item() == pytest.approx(math.log(n), rel=1e-5)
    else:
        best = torch.full((1, 1, n), math.log(0.1 / n))
        best[..., 5] = math.log(0.9 + 0.1 / n)
        assert itg_loss(best, torch.tensor([[5]])).item() == pytest.approx(smoothing_floor(n), rel=1e-4)


# --- hard negatives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_negative_is_never_of_the_same_image(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 4, (12,), generator=generator)
    sim, uniform = 5 * torch.randn(12, 12, generator=generator), torch.rand(12, generator=generator)
    negative, found = sample_hard_negatives(sim, ids[:, None] == ids, uniform)
    assert found.all() and (ids[negative] != ids).all()


def test_negatives_are_drawn_with_the_probability_of_the_softmax():
    sim = torch.tensor([[9.0, 1.0, 0.0, 2.0]]).repeat(20_000, 1)
    own = torch.tensor([[True, False, False, False]]).repeat(20_000, 1)
    expected = torch.tensor([1.0, 0.0, 2.0]).softmax(dim=0)
    torch.testing.assert_close(negative_probabilities(sim[:1], own[:1])[0, 1:], expected)
    drawn, _ = sample_hard_negatives(sim, own, torch.rand(20_000))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    assert share[0] == 0
    torch.testing.assert_close(share[1:], expected, rtol=0, atol=0.015)  # a standard deviation is 0.0035


def test_a_text_draws_its_image_by_t2i_and_an_image_its_text_by_i2t():
    """Each by its own random number; without hardness, neither similarity counts."""
    i2t, t2i = torch.full((4, 4), -50.0), torch.full((4, 4), -50.0)
    images, texts = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1])
    t2i[range(4), images], i2t[range(4), texts] = 50, 50
    uniform = torch.stack((torch.full((4,), 0.01), torch.full((4,), 0.99)))
    hard = draw_negatives(i2t, t2i, eye(4), uniform, hardness=1.0)
    assert torch.equal(hard.images, images) and torch.equal(hard.texts, texts)
    assert hard.has_negative_image.all() and hard.has_negative_text.all()
    easy = draw_negatives(i2t, t2i, eye(4), uniform, hardness=0.0)
    assert easy.images.tolist() == [1, 0, 0, 0] and easy.texts.tolist() == [3, 3, 3, 2]  # the first, the last other


def test_every_row_of_all_ranks_has_its_own_random_numbers():
    numbers = random_numbers(500, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert numbers.shape == (2, 500) and len(numbers.unique()) > 990 and 0 <= numbers.min() < numbers.max() < 1
    assert torch.equal(numbers, random_numbers(500, torch.Generator().manual_seed(0), torch.device("cpu")))


def test_where_all_candidates_are_of_one_image_no_negative_is_found():
    negative, found = sample_hard_negatives(torch.randn(3, 3), torch.ones(3, 3, dtype=torch.bool), torch.rand(3))
    assert not found.any() and (negative == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_draw_survives_a_similarity_that_is_not_finite(bad):
    sim = torch.randn(4, 4)
    sim[1, 2] = bad
    negative, found = sample_hard_negatives(sim, eye(4), torch.rand(4))
    assert found.all() and (negative != torch.arange(4)).all() and (negative < 4).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_extreme_random_numbers_draw_a_candidate_too(uniform):
    """The generator may give 0, and the number next to 1."""
    negative, _ = sample_hard_negatives(torch.zeros(2, 2), eye(2), torch.full((2,), uniform))
    assert negative.tolist() == [1, 0]


# --- ITM -------------------------------------------------------------------------------------------------------------


def test_itm_of_a_model_that_predicts_the_class_prior_is_0_6365():
    """One pair in three matches: a loss that stays at 0.63 means that only this is known."""
    is_match, valid = torch.tensor([True, False, False]), torch.ones(3, dtype=torch.bool)
    logits = torch.tensor([[math.log(2), 0.0]] * 3)
    assert itm_loss(logits, is_match, valid).item() == pytest.approx(ITM_PRIOR, rel=1e-6)
    assert ITM_PRIOR == pytest.approx(0.6365, abs=1e-4)


def test_itm_leaves_out_rows_without_a_negative():
    logits, is_match = torch.randn(3, 2), torch.tensor([True, False, False])
    expected = F.cross_entropy(logits[:2], is_match[:2].long())
    torch.testing.assert_close(itm_loss(logits, is_match, torch.tensor([True, True, False])), expected)


# --- ITG and LM ------------------------------------------------------------------------------------------------------


def test_itg_is_smoothed_and_lm_is_not_by_hand():
    logits = torch.tensor([[[1.0, 0.0, 0.0], [5.0, 5.0, 9.0]]])
    labels = torch.tensor([[0, IGNORE]])
    log_probs = [1 - math.log(math.e + 2), -math.log(math.e + 2), -math.log(math.e + 2)]
    expected = -(0.9 * log_probs[0] + 0.1 / 3 * sum(log_probs))
    assert itg_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    assert lm_loss(logits, labels).item() == pytest.approx(-log_probs[0], rel=1e-6)


def test_positions_without_a_label_cost_nothing_and_get_no_gradient():
    """Also where no position has one, as in a batch of empty texts."""
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[1, 4, IGNORE], [IGNORE] * 3])
    for loss in (itg_loss, lm_loss):
        (grad,) = torch.autograd.grad(loss(logits, labels), logits)
        assert torch.equal(grad.abs().amax(dim=2) > 0, labels != IGNORE)
        assert loss(logits, torch.full_like(labels, IGNORE)).item() == 0


# --- all losses ------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_batch_each_over_the_total_add_up_to_its_loss():
    """So the ranks' and micro-batches' losses and gradients add up to those of one big batch."""
    i2t, t2i, same = torch.randn(6, 6), torch.randn(6, 6), torch.arange(6)[:, None] // 2 == torch.arange(6) // 2
    matches, pairs, found = torch.randn(6, 2), torch.rand(6) > 0.5, torch.tensor([True, True, False, True, True, False])
    logits, labels = torch.randn(6, 4, 9), torch.randint(0, 9, (6, 4))
    labels[[0, 0, 4], [2, 3, 3]] = IGNORE
    for loss, inputs, total in (
        (itc_loss, (i2t, t2i, same), 6),
        (itm_loss, (matches, pairs, found), 4),
        (itg_loss, (logits, labels), 21),
        (lm_loss, (logits, labels), 21),
    ):
        parts = [loss(*(x[rows] for x in inputs), total=total) for rows in (slice(0, 2), slice(2, 6))]
        torch.testing.assert_close(sum(parts), loss(*inputs), msg=loss.__name__)


def test_losses_are_computed_in_fp32_under_autocast_and_from_half_precision():
    feats = F.normalize(torch.randn(4, 3, 8), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        i2t, t2i = itc_similarity(feats, feats[:, 0], feats, feats[:, 0], torch.tensor(0.07))
    expected = torch.einsum("bqe,ne->bnq", feats, feats[:, 0]).amax(-1) / 0.07
    torch.testing.assert_close(i2t, expected)
    torch.testing.assert_close(t2i, expected.T)
    i2t, t2i, match, logits = (x.bfloat16() for x in (i2t, t2i, torch.randn(4, 2), torch.randn(4, 3, 5)))
    labels = torch.randint(0, 5, (4, 3))
    for loss, inputs in (
        (itc_loss, (i2t, t2i, eye(4))),
        (itm_loss, (match, eye(4)[0], eye(4)[0])),
        (itg_loss, (logits, labels)),
        (lm_loss, (logits, labels)),
    ):
        assert loss(*inputs).dtype == torch.float32
        exact = [x.float() if x.is_floating_point() else x for x in inputs]
        torch.testing.assert_close(loss(*inputs), loss(*exact), rtol=1e-6, atol=0)
