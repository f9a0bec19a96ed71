"""Paper 3.2: the three losses, by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_batch, small_model

import blip2
from blip2 import stage1_totals
from losses import (
    ITM_PRIOR,
    itc_loss,
    itc_similarity,
    itg_loss,
    itm_loss,
    negative_probabilities,
    sample_hard_negatives,
    smoothing_floor,
)


def unit(*rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float), dim=-1)


# --- ITC


def test_similarity_is_the_highest_cosine_over_the_queries_divided_by_the_temperature():
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
    assert itc_loss(i2t, t2i, torch.eye(3, dtype=torch.bool)).item() == pytest.approx(expected, rel=1e-5)


def test_itc_without_duplicates_is_cross_entropy_with_label_smoothing():
    i2t, t2i = torch.randn(5, 5), torch.randn(5, 5)
    right = torch.arange(5)
    expected = sum(F.cross_entropy(sim, right, label_smoothing=0.1) for sim in (i2t, t2i)) / 2
    torch.testing.assert_close(itc_loss(i2t, t2i, torch.eye(5, dtype=torch.bool)), expected)


def test_pairs_of_one_photo_share_the_target():
    """0.9 spread over the positives, 0.1 / N over all: the best logits for that give its entropy."""
    ids = torch.tensor([7, 7, 8])
    positives = ids[:, None] == ids
    target = positives / positives.sum(1, keepdim=True) * 0.9 + 0.1 / 3
    best = target.log()
    entropy = -(target * best).sum() / 3
    torch.testing.assert_close(itc_loss(best, best, positives), entropy)
    assert itc_loss(best + torch.randn(3, 3), best, positives) > entropy


@pytest.mark.parametrize("n, floor", [(16, 0.565), (100, 0.778), (1600, 1.062), (30523, 1.358)])
def test_a_perfect_match_reaches_the_smoothing_floor_and_ignorance_ln_n(n, floor):
    """The floors of the README's table. ITC at N = 16, 100, 1600; ITG over BERT's vocabulary."""
    assert smoothing_floor(n) == pytest.approx(floor, abs=1e-3)
    if n < 30523:
        eye = torch.eye(n, dtype=torch.bool)
        best = torch.where(eye, math.log(0.9 + 0.1 / n), math.log(0.1 / n))
        assert itc_loss(best, best, eye).item() == pytest.approx(smoothing_floor(n), rel=1e-4)
        assert itc_loss(torch.zeros(n, n), torch.zeros(n, n), eye).item() == pytest.approx(math.log(n), rel=1e-5)


# --- hard negatives


@pytest.mark.parametrize("seed", range(5))
def test_a_negative_never_shares_the_photo(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 4, (12,), generator=generator)
    sim, uniform = 5 * torch.randn(12, 12, generator=generator), torch.rand(12, generator=generator)
    negative, found = sample_hard_negatives(sim, ids[:, None] == ids, uniform)
    assert found.all() and (ids[negative] != ids).all()


def test_negatives_are_drawn_with_the_probability_of_the_softmax():
    sim = torch.tensor([[9.0, 1.0, 0.0, 2.0]]).repeat(200, 1)
    own = torch.tensor([[True, False, False, False]]).repeat(200, 1)
    expected = torch.tensor([1.0, 0.0, 2.0]).softmax(dim=0)
    torch.testing.assert_close(negative_probabilities(sim, own)[0, 1:], expected)
    drawn = torch.cat([sample_hard_negatives(sim, own, torch.rand(200))[0] for _ in range(100)])
    share = torch.bincount(drawn, minlength=4)[:4] / len(drawn)
    torch.testing.assert_close(share[1:], expected, rtol=0, atol=0.01)


def test_a_batch_of_one_photo_has_no_negatives_and_no_itm_row_for_them():
    for count in (1, 3):
        batch = random_batch(count, image_ids=[5] * count)
        sim, positives = torch.randn(count, count), torch.ones(count, count, dtype=torch.bool)
        negative, found = sample_hard_negatives(sim, positives, torch.rand(count))
        assert not found.any() and (negative == 0).all()
        assert stage1_totals([batch])["itm"] == count  # the matching pairs only
        losses = small_model().stage1_losses(batch)
        assert all(loss.isfinite() and loss.shape == () for loss in losses.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_sampling_survives_a_bad_similarity(bad):
    sim = torch.randn(4, 4)
    sim[1, 2] = bad
    negative, found = sample_hard_negatives(sim, torch.eye(4, dtype=torch.bool), torch.rand(4))
    assert found.all() and (negative != torch.arange(4)).all() and (negative < 4).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_rarest_random_numbers_draw_a_candidate_too(uniform):
    """0 and almost 1 are numbers that the generator may give."""
    negative, _ = sample_hard_negatives(torch.zeros(2, 2), torch.eye(2, dtype=torch.bool), torch.full((2,), uniform))
    assert negative.tolist() == [1, 0]


# --- ITM


def test_itm_of_one_pair_in_three_costs_the_priors_entropy():
    """A model that knows only how frequent matches are is at 0.6365: "stuck at 0.63" means that."""
    is_match, valid = torch.tensor([True, False, False]), torch.ones(3, dtype=torch.bool)
    logits = torch.tensor([[math.log(2), 0.0]] * 3)
    assert itm_loss(logits, is_match, valid).item() == pytest.approx(ITM_PRIOR, rel=1e-6)
    assert ITM_PRIOR == pytest.approx(0.6365, abs=1e-4)


def test_itm_leaves_out_rows_without_a_negative():
    logits, is_match = torch.randn(3, 2), torch.tensor([True, False, False])
    expected = F.cross_entropy(logits[:2], is_match[:2].long())
    torch.testing.assert_close(itm_loss(logits, is_match, torch.tensor([True, True, False])), expected)


def test_itm_asks_about_the_pairs_that_the_table_says(monkeypatch):
    """3B rows: of each image the own pair, then its hard negative text; then hard negative images with own texts."""
    model, batch = small_model(), random_batch(3)
    seen = {}

    def spy(text_ids, text_mask, image_kv):
        seen.update(ids=text_ids, mask=text_mask, own=image_kv[0][0], others=image_kv[0][2])
        return original(text_ids, text_mask, image_kv)

    original = model.qformer.encode_pairs
    monkeypatch.setattr(model.qformer, "encode_pairs", spy)
    image_neg, text_neg, found = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]), torch.ones(6, dtype=torch.bool)
    monkeypatch.setattr(blip2, "draw_negatives", lambda *_: blip2.Negatives(image_neg, text_neg, found))
    image_kv = model.image_kv(model.image_tokens(batch.images))
    model.stage1_losses(batch)
    assert torch.equal(seen["ids"], batch.text_ids[[0, 2, 1, 0, 2, 1, 0, 1, 2]])
    assert torch.equal(seen["mask"], batch.text_mask[[0, 2, 1, 0, 2, 1, 0, 1, 2]])
    torch.testing.assert_close(seen["own"], image_kv[0][0])
    torch.testing.assert_close(seen["others"], image_kv[0][0][[1, 2, 0]])


def test_itm_is_the_mean_over_the_pairs_one_by_one(monkeypatch):
    """Each with its own photo's keys and its own label; without those whose negative was not found."""
    model, batch = small_model(), random_batch(3)
    found = torch.tensor([True, False, True, True, True, False])
    negatives = blip2.Negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]), found)
    monkeypatch.setattr(blip2, "draw_negatives", lambda *_: negatives)
    pairs = [(i, i, 1) for i in range(3)]
    pairs += [(negatives.images[i], i, 0) for i in (0, 2)] + [(i, negatives.texts[i], 0) for i in (0, 1)]
    image_kv, costs = model.image_kv(model.image_tokens(batch.images)), []
    for image, text, label in pairs:
        kv = [(k[image][None], v[image][None]) for k, v in image_kv]
        query_out = model.qformer.encode_pairs(batch.text_ids[text][None], batch.text_mask[text][None], kv)
        costs.append(F.cross_entropy(model.itm_logits(query_out), torch.tensor([label])))
    totals = {"itc": 3, "itm": len(costs), "itg": len(batch.label_rows)}
    torch.testing.assert_close(model.stage1_losses(batch, totals=totals)["itm"], sum(costs) / len(costs))


# --- ITG


def test_itg_predicts_the_next_word_from_dec_on_and_no_padding(monkeypatch):
    """[DEC] w1 w2 predict w1 w2 [SEP]; [CLS] and padding are neither read nor predicted."""
    model, batch = small_model(), random_batch(2)
    seen = {}

    def spy(ids, mask, cache):
        seen["ids"] = ids
        return original(ids, mask, cache)

    original = model.qformer.decode_text
    monkeypatch.setattr(model.qformer, "decode_text", spy)
    loss = model.stage1_losses(batch)["itg"]
    assert (seen["ids"][:, 0] == 29).all() and torch.equal(seen["ids"][:, 1:], batch.text_ids[:, 1:])

    # The same, token by token, through the joint pass.
    costs = []
    for row in range(2):
        n = int(batch.text_mask[row].sum())
        ids, mask = seen["ids"][row : row + 1, :n], torch.ones(1, n, dtype=torch.bool)
        _, text = model.qformer("itg", ids, mask, model.image_kv(model.image_tokens(batch.images[row : row + 1])))
        logits = model.qformer.lm_logits(text[0, :-1])
        costs.append(F.cross_entropy(logits, batch.text_ids[row, 1:n], label_smoothing=0.1, reduction="none"))
    torch.testing.assert_close(loss, torch.cat(costs).mean())


def test_itg_by_hand():
    logits = torch.tensor([[1.0, 0.0, 0.0]])
    log_probs = [1 - math.log(math.e + 2), -math.log(math.e + 2), -math.log(math.e + 2)]
    expected = -(0.9 * log_probs[0] + 0.1 / 3 * sum(log_probs))
    assert itg_loss(logits, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-6)


# --- precision


def test_losses_are_computed_in_fp32_whatever_comes_in():
    feats = F.normalize(torch.randn(4, 3, 8), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        i2t, t2i = itc_similarity(feats, feats[:, 0], feats, feats[:, 0], torch.tensor(0.07))
        assert i2t.dtype == t2i.dtype == torch.float32
    expected = torch.einsum("bqe,ne->bnq", feats, feats[:, 0]).amax(-1) / 0.07
    torch.testing.assert_close(i2t, expected)
    own = torch.eye(4, dtype=torch.bool)
    assert itc_loss(i2t.bfloat16(), t2i.bfloat16(), own).dtype == torch.float32
    assert itm_loss(torch.randn(3, 2).bfloat16(), own[0, :3], own[0, :3]).dtype == torch.float32
    assert itg_loss(torch.randn(3, 5).bfloat16(), torch.tensor([0, 1, 2])).dtype == torch.float32
