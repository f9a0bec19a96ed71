"""Image-text retrieval (paper 4.4): equal to brute force; each image encoded once, each needed pair scored once; beside
chance and shuffled images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from samples import few, shapes_model

import eval as evaluation
from blip2 import Blip2
from losses import negative_probabilities
from sources.mixture import open_images
from tasks.batches import Gallery
from tasks.metrics import ranks, recalls, reranked
from tasks.retrieval import report, retrieval, retrieval_table


@torch.no_grad()
def brute_force(model, images):
    """(positives, ITC, ITM), each (N, M): every pair one at a time, joint pass and all."""
    gallery = Gallery(images)
    N, M = gallery.positives.shape
    itc, itm = torch.empty(N, M), torch.empty(N, M)
    for n in range(N):
        tokens = model.encode_image(images[gallery.rows[n]].open()).tokens
        for m, text in enumerate(gallery.texts):
            ids = torch.tensor(model.tokenizer.encode([text]))
            mask = torch.ones_like(ids, dtype=torch.bool)
            query_out, text_out = model.qformer("itc", ids, mask, model.image_kv(tokens))
            itc[n, m] = (model.image_feats(query_out)[0] @ model.text_feats(text_out[:, 0])[0]).max()
            query_out, _ = model.qformer("itm", ids, mask, model.image_kv(tokens))
            logits = model.itm_logits(query_out)[0]
            itm[n, m] = logits[1] - logits[0]
    return gallery.positives, itc, itm


@pytest.mark.parametrize("k", [3, 12])
def test_retrieval_equals_brute_force(k):
    model, images = shapes_model(), few()
    positives, itc, itm = brute_force(model, images)
    result = retrieval(model, images, k)
    assert result["itc"]["image_to_text"] == recalls(ranks(itc, positives))
    assert result["itc"]["text_to_image"] == recalls(ranks(itc.T, positives.T))
    for key, score in (("itm", itm), ("reranked", itm + itc / model.temperature.item())):
        assert result[key]["image_to_text"] == recalls(ranks(reranked(itc, score, k), positives))
        assert result[key]["text_to_image"] == recalls(ranks(reranked(itc.T, score.T, k), positives.T))
    by_itm = retrieval(model, images, k, "itm")
    assert by_itm["reranked"] == result["itm"] and "itm" not in by_itm


def test_each_image_is_encoded_once_and_each_needed_pair_scored_once():
    model, images, k = shapes_model(), few(), 3
    counts = {"vit": 0, "image_kv": 0, "pairs": 0}

    def count(name, rows):
        counts[name] += rows

    model.vit.blocks[0].register_forward_hook(lambda _, __, out: count("vit", len(out)))
    model.qformer.blocks[0].cross.kv.register_forward_hook(lambda _, x, __: count("image_kv", len(x[0])))
    forward = model.qformer.forward
    model.qformer.forward = lambda kind, ids, *rest: (count("pairs", len(ids)), forward(kind, ids, *rest))[1]
    _, itc, _ = brute_force(shapes_model(), images)
    wanted = torch.zeros(12, 12, dtype=torch.bool).scatter_(1, itc.topk(k, dim=1).indices, True)
    wanted |= torch.zeros(12, 12, dtype=torch.bool).scatter_(1, itc.T.topk(k, dim=1).indices, True).T
    retrieval(model, images, k)
    assert counts == {"vit": 12, "image_kv": 24, "pairs": int(wanted.sum())}  # keys once for ITC, once for ITM


def test_reranking_with_itm_and_itc_adds_raw_logit_and_raw_cosine():
    """As LAVIS does."""
    model, images = shapes_model(), few(6)
    gallery = Gallery(images)
    encoded = model.encode_image([images[row].open() for row in gallery.rows])
    texts = model.encode_text(gallery.texts)
    pairs = torch.arange(6).repeat_interleave(6), torch.arange(6).repeat(6)
    itc = model.itc_scores(encoded, texts)
    added = model.match_logits(encoded, texts, *pairs)[:, 1].view(6, 6) + itc
    expected = recalls(ranks(reranked(itc, added, 6), gallery.positives))
    assert retrieval(model, images, 6, "itm+itc")["reranked"]["image_to_text"] == expected


def test_what_itm_learns_ranks_by_the_true_pairing_only_with_itc_as_its_prior():
    """A world of known pointwise mutual information, and an ITC that errs. In closed form ITM learns log p / q: p draws
    pairs, q a text for an image and an image for a text by ITC's softmax. Alone it ranks by ITC's errors."""
    N, generator, nothing = 60, torch.Generator().manual_seed(0), torch.zeros(60, 60, dtype=torch.bool)

    def balanced(scores):  # rows and columns that sum to one: uniform marginals of p, an optimum of ITC's loss
        for _ in range(50):
            scores = scores.log_softmax(dim=0).log_softmax(dim=1)
        return scores

    def learned(itc):
        return pmi - (negative_probabilities(itc, nothing) + negative_probabilities(itc.T, nothing).T).log()

    signal, noise = torch.randn(2, N, N, generator=generator, dtype=torch.float64)
    pmi = balanced(1.5 * signal + 4 * torch.eye(N))
    right, itc = report(Gallery(few(N)), pmi, None, N)["itc"], balanced(pmi + noise)
    found = report(Gallery(few(N)), itc, learned(itc), N, prior=itc)
    assert found["reranked"] == right
    for way, best in right.items():
        assert found["itm"][way]["R@1"] < 5 and found["itc"][way]["R@1"] < best["R@1"] - 5
    itc = pmi + noise  # off the optimum the sums of the rows and columns of q remain, and hardly matter
    scores = torch.stack([score.flatten() for score in (pmi, learned(itc) + itc, learned(itc), itc)])
    posterior, alone, prior = scores.corrcoef()[0, 1:].tolist()
    assert posterior > 0.98 and alone < 0.1 and prior < 0.9


def test_without_a_trained_itc_there_is_no_prior():
    """ITM's negatives were uniform."""
    model, images = shapes_model(), few(6)
    model.untrained_heads = ("itc",)
    found, by_itm = retrieval(model, images, 3), retrieval(model, images, 3, "itm")
    assert found["rerank"] == "itm" and found["reranked"] == by_itm["reranked"]


def test_twins_are_scored_by_itm_however_far_apart_itc_ranks_them():
    """Own caption against that of the image with the swap: ITM's own verdict, also outside the k = 1 re-ranked."""
    model, images = shapes_model(), open_images(["shapes"], "test", 8)
    images.chosen = np.flatnonzero([name == "swapped" for name in images.parts[0].subsets])[:12]
    _, *scores = brute_force(model, images)
    found = retrieval(model, images, k=1)["twins"]
    for name, score in zip(("itc", "itm"), scores, strict=True):
        own = [score[i, i] > score[i, i ^ 1] for i in range(12)]  # 0 and 1, 2 and 3, ... are twins
        assert found[name] == pytest.approx(100 * sum(own).item() / 12)
    assert found["itm"] > 0


def test_several_captions_of_an_image_stand_in_one_record_or_in_several(tmp_path):
    """The same gallery, the same result."""
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    together = [{"image": f"{i}.png", "caption": [f"a {c} circle" for c in ("red", "blue")]} for i in range(3)]
    apart = [{"image": r["image"], "caption": c} for r in together for c in r["caption"]]
    results = []
    for records in (together, apart):
        (tmp_path / "a.json").write_text(json.dumps(records))
        images = open_images([str(tmp_path / "a.json")], "val", 8)
        expected = torch.eye(3, dtype=torch.bool).repeat_interleave(2, dim=1)
        assert torch.equal(Gallery(images).positives, expected)
        results.append(retrieval(shapes_model(), images))
    assert results[0]["reranked"] == results[1]["reranked"] and (results[0]["images"], results[0]["texts"]) == (3, 6)


def test_evaluation_leaves_training_mode_and_random_numbers_alone():
    model = shapes_model().train()
    before = torch.get_rng_state()
    retrieval(model, few(4), 2)
    assert model.training and torch.equal(before, torch.get_rng_state())


# --- the report ------------------------------------------------------------------------------------------------------


def test_shuffled_images_are_the_control():
    """Perfect scores find all pairs, and none when the captions belong to other images."""
    result = report(Gallery(few(12)), torch.eye(12), None, 4)
    assert result["itc"] == {way: {"R@1": 100, "R@5": 100, "R@10": 100} for way in result["itc"]}
    assert [way["R@1"] for way in result["shuffled images"].values()] == [0, 0]
    assert result["subsets"] == {"plain": result["itc"]} and result["mistakes"] == []
    twins = torch.eye(12) + 0.5 * torch.eye(12).view(6, 2, 12).flip(1).view(12, 12)  # neighbours look alike
    shuffled = report(Gallery(few(12)), twins, None, 4)["shuffled images"]
    assert [way["R@5"] for way in shuffled.values()] == [0, 0]  # no image gets the caption of its twin


def test_best_and_worst_are_of_the_whole_ranking():
    """By margin, and by the rank of the own caption. A pair outside the k best of its image does not count, though the
    other direction had it scored."""
    gallery = Gallery(few(4))
    itc = torch.tensor([[3.0, 2, 1, 0], [0, 2, 1, 0], [0, 0, 1, 0], [9, 8, 7, 6]])
    itm = torch.tensor([[0.0, 1, 9, 0], [0, 9, 8, 0], [-3, -3, 5, -3], [1, 2, 3, 4]])
    result, names = report(gallery, itc, itm, 2), [gallery[i].name for i in range(4)]
    assert [(row["image"], row["rank"]) for row in result["best"]] == [(names[2], 1), (names[1], 1)]
    assert [(row["image"], row["rank"]) for row in result["mistakes"]] == [(names[3], 4), (names[0], 2)]
    found = [(row["found"], row["its own"]) for row in result["mistakes"]]
    assert found == [(gallery.texts[1], gallery.texts[3]), (gallery.texts[1], gallery.texts[0])]


def test_the_table_has_all_rankings_the_controls_the_subsets_and_the_extremes():
    """Also that of a result from before there was a choice."""
    result = retrieval(shapes_model(), few(12), 4)
    rows = ("chance", "shuffled images", "ITC", "ITM re-ranks 4", "ITM+ITC re-ranks 4", "- plain", "best: ", "worst: ")
    assert not [row for row in rows if f"\n{row}" not in retrieval_table(result)]
    text = retrieval_table({key: value for key, value in result.items() if key not in ("itm", "rerank")})
    assert "\nITM re-ranks 4" in text and "ITM+ITC" not in text


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_json(stage1_run, tmp_path, capsys):
    few(1)[0].open().save(tmp_path / "0.png")
    data, out = tmp_path / "a.json", tmp_path / "r.json"
    data.write_text(json.dumps([{"image": "0.png", "caption": ["a red circle", "a blue square"]}]))
    evaluation.main(["retrieval", "--checkpoint", str(stage1_run), "--data", str(data), "--out", str(out)])
    assert "ITM re-ranks 128" in capsys.readouterr().out
    assert json.loads(out.read_text())["itc"]["image_to_text"]["R@1"] == 100


@pytest.mark.parametrize("untrained", [("itm",), ()])
def test_a_run_without_itm_is_not_reranked(untrained, tmp_path, monkeypatch, capsys):
    """Its ITM head is as random as at the start."""
    model = shapes_model()
    model.untrained_heads = untrained
    monkeypatch.setattr(evaluation, "open_images", lambda *_, **__: few(4))
    monkeypatch.setattr(Blip2, "from_pretrained", lambda *_, **__: model)
    model.save_pretrained(tmp_path)
    result = evaluation.main(["retrieval", "--checkpoint", str(tmp_path)])
    assert ("reranked" in result) == ("ITM re-ranks" in capsys.readouterr().out) == (not untrained)
