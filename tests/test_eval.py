"""Recall by hand, re-ranking against brute force, each photo encoded once, the same on any number of processes."""

import json

import numpy as np
import pytest
import torch
from conftest import LLMS, ROOT, run_many, small_model, stage2_model

import eval
import shapes
import tasks
from blip2 import Blip2
from data import Texts, UserError, open_photos
from eval import main
from metrics import chance, ranks, recalls, reranked_ranks
from tasks import (
    Gallery,
    answer_table,
    answering,
    caption_table,
    captioning,
    gather_shards,
    report,
    retrieval,
    shard,
    table,
)

SIZES = dict(vocab_size=Texts(ROOT / "assets/tiny/bert").vocab_size, max_positions=40)


def shapes_model(seed=0):
    """A random model that reads the shapes world's captions; pictures of 8 x 8 pixels."""
    return small_model(seed, texts=Texts(ROOT / "assets/tiny/bert"), **SIZES)


def few(count=12, split="test"):
    photos = open_photos(["shapes"], split, 8)
    photos.chosen = photos.chosen[:count]
    return photos


# --- metrics


def test_recall_of_four_by_four():
    scores = torch.tensor([[4, 1, 2, 3], [4, 3, 2, 1], [1, 2, 3, 4], [1, 3, 4, 2.0]])
    rank = ranks(scores, torch.eye(4, dtype=torch.bool))
    assert rank.tolist() == [0, 1, 1, 2]
    assert recalls(rank) == {"R@1": 25, "R@5": 100, "R@10": 100}


def test_with_several_right_answers_the_best_counts():
    scores = torch.tensor([[5.0, 1.0, 4.0], [1.0, 2.0, 3.0]])
    positives = torch.tensor([[False, True, True], [True, True, False]])
    assert ranks(scores, positives).tolist() == [1, 1]


def test_a_model_that_says_nan_finds_nothing():
    assert ranks(torch.full((3, 3), float("nan")), torch.eye(3).bool()).tolist() == [2, 2, 2]


def test_a_model_that_says_the_same_about_everything_finds_nothing():
    assert ranks(torch.zeros(3, 3), torch.eye(3, dtype=torch.bool)).tolist() == [2, 2, 2]


def test_reranking_orders_the_first_k_and_nothing_else():
    first = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(4, 1)
    second = torch.tensor([[0.0, 9.0, 1.0, 99.0]]).repeat(4, 1)
    eye = torch.eye(4, dtype=torch.bool)
    assert reranked_ranks(first, second, eye, 2).tolist() == [1, 0, 2, 3]
    assert reranked_ranks(first, second, eye, 3).tolist() == [2, 0, 1, 3]
    assert reranked_ranks(first, second, eye, 4).tolist() == [3, 1, 2, 0]
    assert reranked_ranks(first, second, eye, 99).tolist() == [3, 1, 2, 0]


def test_chance_is_what_random_scores_give():
    positives = torch.zeros(50, 100, dtype=torch.bool)
    positives[torch.arange(50), torch.arange(50)] = True
    positives[:25, 60:64] = True
    drawn = [recalls(ranks(torch.rand(50, 100), positives)) for _ in range(400)]
    for name, expected in chance(positives).items():
        assert sum(d[name] for d in drawn) / 400 == pytest.approx(expected, abs=1.0)


# --- the evaluation


def brute_force(model, photos):
    """Every pair one at a time, joint pass and all."""
    gallery = Gallery(photos)
    N, M = gallery.positives.shape
    itc, itm = torch.empty(N, M), torch.empty(N, M)
    for n in range(N):
        tokens = model.encode_image(photos.picture(gallery.rows[n])).tokens
        for m, text in enumerate(gallery.texts):
            ids = torch.tensor(model.texts.encode([text]))
            mask = torch.ones_like(ids, dtype=torch.bool)
            query, words = model.qformer("itc", ids, mask, model.image_kv(tokens))
            itc[n, m] = (model.image_feats(query)[0] @ model.text_feats(words[:, 0])[0]).max()
            query, _ = model.qformer("itm", ids, mask, model.image_kv(tokens))
            logits = model.itm_logits(query)[0]
            itm[n, m] = logits[1] - logits[0]
    return gallery.positives, itc, itm


@pytest.mark.parametrize("k", [3, 12])
def test_retrieval_equals_brute_force(k):
    model, photos = shapes_model(), few()
    with torch.no_grad():
        positives, itc, itm = brute_force(model, photos)
    result = retrieval(model, photos, k)
    assert result["itc"]["image_to_text"] == recalls(ranks(itc, positives))
    assert result["itc"]["text_to_image"] == recalls(ranks(itc.T, positives.T))
    assert result["reranked"]["image_to_text"] == recalls(reranked_ranks(itc, itm, positives, k))
    assert result["reranked"]["text_to_image"] == recalls(reranked_ranks(itc.T, itm.T, positives.T, k))


def test_each_photo_is_encoded_once_and_each_needed_pair_judged_once():
    model, photos, k = shapes_model(), few(), 3
    seen = {"vit": 0, "image_kv": 0, "pairs": 0}
    model.vit.blocks[0].register_forward_hook(lambda _, __, out: seen.update(vit=seen["vit"] + len(out)))
    model.qformer.blocks[0].cross.kv.register_forward_hook(
        lambda _, inputs, __: seen.update(image_kv=seen["image_kv"] + len(inputs[0]))
    )
    original = model.qformer.forward
    model.qformer.forward = lambda kind, ids, *rest, **read: (
        seen.update(pairs=seen["pairs"] + len(ids)),
        original(kind, ids, *rest, **read),
    )[1]
    with torch.no_grad():
        _, itc, _ = brute_force(shapes_model(), photos)
    wanted = torch.zeros(12, 12, dtype=torch.bool).scatter_(1, itc.topk(k, dim=1).indices, True)
    wanted |= torch.zeros(12, 12, dtype=torch.bool).scatter_(1, itc.T.topk(k, dim=1).indices, True).T
    retrieval(model, photos, k)
    assert seen == {"vit": 12, "image_kv": 24, "pairs": int(wanted.sum())}  # keys once for ITC, once for ITM


def test_twins_are_judged_however_far_apart_itc_has_put_them():
    """Own caption against that of the picture with the swap: ITM's own verdict, not what re-ranking k = 1 left over."""
    model, photos = shapes_model(), open_photos(["shapes"], "test", 8)
    photos.chosen = np.flatnonzero([name == "swapped" for name in photos.parts[0].subsets])[:12]
    with torch.no_grad():
        _, *scores = brute_force(model, photos)
    found = retrieval(model, photos, k=1)["twins"]
    for name, score in zip(("itc", "itm"), scores, strict=True):
        own = [score[i, i] > score[i, i ^ 1] for i in range(12)]  # 0 and 1, 2 and 3, ... are twins
        assert found[name] == pytest.approx(100 * sum(own).item() / 12)
    assert found["itm"] > 0


def test_photos_with_several_captions_and_records(tmp_path):
    """Five captions a photo, in one record or in five: the same gallery."""
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    together = [{"image": f"{i}.png", "caption": [f"a {c} circle" for c in ("red", "blue")]} for i in range(3)]
    apart = [{"image": r["image"], "caption": c} for r in together for c in r["caption"]]
    results = []
    for records in (together, apart):
        (tmp_path / "a.json").write_text(json.dumps(records))
        photos = open_photos([str(tmp_path / "a.json")], "val", 8)
        assert Gallery(photos).positives.tolist() == torch.eye(3, dtype=torch.bool).repeat_interleave(2, dim=1).tolist()
        results.append(retrieval(shapes_model(), photos))
    assert results[0]["reranked"] == results[1]["reranked"] and results[0]["photos"] == 3 and results[0]["texts"] == 6


def test_rerank_with_itm_and_itc_adds_raw_logit_and_raw_cosine():
    """What the original does; by default, as in the paper, ITM alone decides."""
    model, photos = shapes_model(), few(6)
    with torch.no_grad():
        gallery = Gallery(photos)
        images = model.encode_image([photos.picture(row) for row in gallery.rows])
        texts = model.encode_text(gallery.texts)
        pairs = torch.arange(6).repeat_interleave(6), torch.arange(6).repeat(6)
        sum_ = model.match_logits(images, texts, *pairs)[:, 1].view(6, 6) + model.itc_scores(images, texts)
    expected = recalls(reranked_ranks(model.itc_scores(images, texts), sum_, gallery.positives, 6))
    assert retrieval(model, photos, 6, "itm+itc")["reranked"]["image_to_text"] == expected


def same_result(rank, expected):
    result = retrieval(shapes_model(), few(13), 4)
    for key in ("itc", "reranked", "mistakes", "photos", "texts"):
        assert result[key] == expected[key], key
    assert torch.equal(gather_shards(torch.arange(7)[shard(7)], 7), torch.arange(7))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_find_what_one_finds(processes):
    run_many(processes, same_result, retrieval(shapes_model(), few(13), 4))


def same_result_for_one(rank, expected):
    assert retrieval(shapes_model(), few(1), 4)["reranked"] == expected["reranked"]


def test_more_processes_than_photos():
    run_many(2, same_result_for_one, retrieval(shapes_model(), few(1), 4))


def test_evaluation_leaves_training_mode_and_random_numbers_alone():
    model = shapes_model().train()
    before = torch.get_rng_state()
    retrieval(model, few(4), 2)
    assert model.training and torch.equal(before, torch.get_rng_state())


# --- the calls a user makes


def test_scores_of_any_photos_and_texts():
    model = shapes_model()
    pictures = [few(4).picture(i) for i in range(4)]
    texts = ["a red circle", "a large blue square left of a small red circle", "no"]
    itc, itm = model.itc_scores(pictures, texts), model.itm_scores(pictures, texts)
    assert itc.shape == itm.shape == (4, 3)
    assert itc.abs().max() <= 1 + 1e-5 and 0 <= itm.min() and itm.max() <= 1
    encoded = model.encode_image(pictures), model.encode_text(texts)
    torch.testing.assert_close(model.itm_scores(*encoded), itm)
    for n in range(4):  # a batch gives what each gives alone
        torch.testing.assert_close(model.itc_scores(pictures[n], texts), itc[n : n + 1])
        torch.testing.assert_close(model.itm_scores(pictures[n], texts[1]), itm[n : n + 1, 1:2])


def test_match_probability_goes_through_one_softmax():
    model = shapes_model()
    with torch.no_grad():
        model.itm_head.weight.zero_()
        model.itm_head.bias.copy_(torch.tensor([0.0, 2.0]))
    assert model.itm_scores(few(1).picture(0), "a red circle").item() == pytest.approx(
        1 / (1 + 2.718281828**-2), rel=1e-5
    )


def test_captions_of_a_batch_are_those_of_each_alone():
    model = shapes_model()
    pictures = [few(5).picture(i) for i in range(5)]
    for options in ({}, dict(num_beams=1), dict(length_penalty=-1.0)):
        together = model.caption(pictures, max_new_tokens=6, **options)
        assert together == [model.caption(picture, max_new_tokens=6, **options) for picture in pictures]
    assert [len(group) for group in model.caption(pictures, max_new_tokens=4, num_captions=2)] == [2] * 5


def test_saved_model_opens_as_the_same_model(tmp_path):
    model, _ = Blip2.build("assets/tiny/vit", "assets/tiny/bert", image_size=64, num_queries=4, embed_dim=8)
    model.eval().save_pretrained(tmp_path / "run")
    again = Blip2.from_pretrained(tmp_path / "run")
    pictures = [open_photos(["shapes"], "val", 64).picture(i) for i in range(3)]
    assert torch.equal(model.itc_scores(pictures, ["a red circle"]), again.itc_scores(pictures, ["a red circle"]))
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert len({path.stat().st_mode for path in (tmp_path / "run").iterdir()}) == 1  # who may read one may read all
    assert (tmp_path / "run" / config["vit"]).resolve() == (ROOT / "assets/tiny/vit").resolve()
    assert not any(name.startswith("vit.") for name in model.trained_state())


def test_command_line_prints_a_table_and_writes_json(tmp_path, capsys):
    model, _ = Blip2.build("assets/tiny/vit", "assets/tiny/bert", image_size=64, num_queries=4, embed_dim=8)
    model.save_pretrained(tmp_path)
    photos = tmp_path / "photos.json"
    few(1).picture(0).save(tmp_path / "0.png")
    photos.write_text(json.dumps([{"image": "0.png", "caption": ["a red circle", "a blue square"]}]))
    main(["retrieval", "--checkpoint", str(tmp_path), "--data", str(photos), "--out", str(tmp_path / "r.json")])
    assert "ITM re-ranks 128" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["itc"]["image_to_text"]["R@1"] == 100


def test_shuffled_pictures_are_the_control():
    """Scores that know every pair find all, and nothing when the captions belong to other pictures."""
    result = report(Gallery(few(12)), torch.eye(12), None, 4)
    assert result["itc"] == {way: {"R@1": 100, "R@5": 100, "R@10": 100} for way in result["itc"]}
    assert [way["R@1"] for way in result["shuffled pictures"].values()] == [0, 0]
    assert result["subsets"] == {"plain": result["itc"]} and result["mistakes"] == []
    twins = torch.eye(12) + 0.5 * torch.eye(12).view(6, 2, 12).flip(1).view(12, 12)  # neighbours look alike
    shuffled = report(Gallery(few(12)), twins, None, 4)["shuffled pictures"]
    assert [way["R@5"] for way in shuffled.values()] == [0, 0]  # nobody gets the caption of its twin


@pytest.mark.parametrize("lacks", [["itm"], []])
def test_a_run_without_itm_is_not_reranked(lacks, tmp_path, monkeypatch, capsys):
    """Its ITM head is as random as at the start."""
    model = shapes_model()
    model.sources["lacks"] = lacks
    monkeypatch.setattr(eval, "open_photos", lambda *_, **__: few(4))
    monkeypatch.setattr(Blip2, "from_pretrained", lambda *_, **__: model)
    model.save_pretrained(tmp_path)
    result = main(["retrieval", "--checkpoint", str(tmp_path)])
    assert ("reranked" in result) == ("ITM re-ranks" in capsys.readouterr().out) == (not lacks)


def test_a_mistake_is_what_the_ranking_put_first():
    """A pair outside the k best does not count, though the other direction had it judged."""
    gallery = Gallery(few(3))
    itc = torch.tensor([[3.0, 2, 1], [0, 1, 0], [0, 0, 1]])
    itm = torch.tensor([[0.0, 1, 9], [0, 1, 0], [0, 0, 1]])
    (mistake,) = report(gallery, itc, itm, 2)["mistakes"]
    assert mistake["picture"] == gallery.photos.name(0)
    assert (mistake["found"], mistake["its own"]) == (gallery.texts[1], gallery.texts[0])


def test_table_tells_everything():
    text = table(retrieval(shapes_model(), few(12), 4))
    for word in ("chance", "shuffled pictures", "ITC", "ITM re-ranks 4", "- plain", "R@10", "mistake"):
        assert word in text


# --- answers and captions


def know_all(model, photos, monkeypatch, wrong=()):
    """Let `model.ask` answer rightly about the pictures it is shown, except questions of the kinds in `wrong`."""
    world = photos.parts[0]
    right = {}
    for row in range(len(photos)):
        index = photos.find(row)[1]
        for _, kind, question, answer in tasks.chosen_questions(world, index, 4):
            right[row, question] = "something else" if kind in wrong else answer

    def ask(images, texts, **_):
        if torch.equal(images.tokens, pictures.tokens):
            return [[right[row, question] for question in group] for row, group in enumerate(texts)]
        return [["nothing"] * len(group) for group in texts]

    pictures = tasks.encode_photos(model, photos, list(range(len(photos))), 0)
    monkeypatch.setattr(model, "ask", ask)


def test_answers_are_counted_by_subset_and_kind_beside_the_controls(monkeypatch):
    model, photos = stage2_model("opt"), few(1000)
    photos.chosen = photos.chosen[[*range(20), *range(500, 520), *range(900, 920)]]
    know_all(model, photos, monkeypatch, wrong=["size"])
    result = answering(model, photos)
    sizes = sum(
        kind == "size" for row in photos.chosen for _, kind, _, _ in tasks.chosen_questions(photos.parts[0], row, 4)
    )
    assert result["accuracy"]["the picture"]["all"] == pytest.approx(100 * (1 - sizes / result["questions"]))
    assert list(result["accuracy"]["the picture"]) == ["all", "seen", "held-out pairs", "held-out wordings"]
    assert result["kinds"]["size"] == 0 and {share for kind, share in result["kinds"].items() if kind != "size"} == {
        100
    }
    assert result["accuracy"]["a blank picture"]["all"] == result["accuracy"]["another picture"]["all"] == 0
    assert 20 < result["accuracy"]["the majority answer"]["seen"] < 60
    text = answer_table(result)
    for word in ("the majority answer", "a blank picture", "another picture", "the true caption as text", "mistake: "):
        assert word in text


def test_questions_about_held_out_pairs_name_such_a_pair():
    world = open_photos(["shapes"], "test", 8).parts[0]
    asked = [q for index in range(500, 700) for q in tasks.chosen_questions(world, index, 4)]
    assert {subset for subset, *_ in asked} == {"held-out pairs"} and len(asked) > 300
    for _, _, question, answer in asked:
        words = set(f"{question} {answer}".replace("?", "").split())
        assert any({*pair} <= words for pair in shapes.HELD_OUT_PAIRS)
    for index in range(900, 1000):
        learned = {wording for q in shapes.questions(world.scene(index)) for wording in q.wordings}
        assert not any(question in learned for _, question, _ in world.questions(index))


def test_the_ceiling_reads_the_caption_in_the_place_of_the_picture():
    """The tiny language models alone, given the true caption, answer most questions; given another, few."""
    for kind in LLMS:
        model, photos = stage2_model(kind), few(60)
        asked = [(row, question, answer) for row in range(60)
                 for _, _, question, answer in tasks.chosen_questions(photos.parts[0], row, 4)]  # fmt: skip
        shares = []
        for shift in (0, 30):
            said = tasks.answers_to_text(model, [(photos.captions((row + shift) % 60)[0], q) for row, q, _ in asked])
            shares.append(sum(a == right for a, (_, _, right) in zip(said, asked)) / len(asked))
        assert shares[0] > 0.75 and shares[0] > shares[1] + 0.2


def test_a_caption_is_right_in_any_wording_and_order():
    scene = open_photos(["shapes"], "test", 8).parts[0].scene(0)
    a, b = scene
    right = tasks.told_right(scene)
    assert (
        f"{a.words} {shapes.relation(a, b)} {b.words}" in right
        and f"{b.words} {shapes.relation(b, a)} {a.words}" in right
    )
    assert f"{b.words} {shapes.relation(a, b)} {a.words}" not in right


def test_captions_are_scored_against_people_and_against_other_photos(tmp_path, monkeypatch):
    model = stage2_model("opt")
    few(4).picture(0).save(tmp_path / "0.png")
    people = [[f"a {c} dog runs on the grass", f"one {c} dog runs"] for c in ("red", "blue", "green", "black")]
    for i in range(4):
        few(4).picture(i).save(tmp_path / f"{i}.png")
    records = [{"image": f"{i}.png", "caption": people[i]} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    photos = open_photos([str(tmp_path / "a.json")], "val", 8)
    monkeypatch.setattr(model, "caption", lambda images, *_, **__: [texts[0] for texts in people][: len(images.tokens)])
    result = captioning(model, photos)
    assert result["BLEU-4"] == pytest.approx(100, abs=1e-3) and result["distinct captions"] == 4
    assert (
        result["shuffled pictures"]["BLEU-4"] < result["BLEU-4"]
        and result["shuffled pictures"]["CIDEr"] < result["CIDEr"]
    )
    assert len(result["examples"]) == 4 and result["captions"][str(tmp_path / "0.png")] == people[0][0]
    assert "shuffled photos" in caption_table(result) and "a person: " in caption_table(result)


def same_answers(rank, kind, expected):
    result = answering(stage2_model(kind), few(70))
    for key in ("accuracy", "kinds", "captions right", "mistakes", "questions"):
        assert result[key] == expected[key], key


@pytest.mark.parametrize("kind", LLMS)
def test_two_processes_answer_what_one_answers(kind):
    run_many(2, same_answers, kind, answering(stage2_model(kind), few(70)))


# --- one photo


def test_ask_without_arguments_answers_about_the_built_in_picture(capsys):
    """The README's first ten seconds: no training, no download."""
    (row,) = main(["ask"])
    said = capsys.readouterr().out
    assert row["caption"] in said and "what color is the star?: green" in said
    assert row["how many shapes are there?"] == "two" and row["is the cross small or large?"] == "small"


def test_ask_refuses_what_cannot_work(tmp_path):
    for flag in ("--beams", "--max-new-tokens"):
        with pytest.raises(UserError, match=f"got {flag} 0, expected at least 1"):
            main(["ask", flag, "0"])
    with pytest.raises(UserError, match="--chat is about one photo, .* is a folder"):
        main(["ask", "--chat", "--image", str(tmp_path)])


def test_ask_about_a_folder_skips_what_is_no_picture(tmp_path, capsys):
    for i in range(3):
        few(3).picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "3.jpg").write_text("no picture")
    (tmp_path / "notes.txt").write_text("nor this")
    rows = main(
        ["ask", "--image", str(tmp_path), "--question", "how many shapes are there?", "--out", str(tmp_path / "o.json")]
    )
    assert [set(row) for row in rows] == [{"image", "how many shapes are there?"}] * 3
    assert "skipped: " in capsys.readouterr().out and json.loads((tmp_path / "o.json").read_text()) == rows
    with pytest.raises(UserError, match="has no pictures in it"):
        (tmp_path / "empty").mkdir()
        main(["ask", "--image", str(tmp_path / "empty")])


def test_a_run_of_stage_1_captions_by_its_q_former(tmp_path, capsys):
    model, _ = Blip2.build("assets/tiny/vit", "assets/tiny/bert", image_size=64, num_queries=4, embed_dim=8)
    model.save_pretrained(tmp_path)
    (row,) = main(["ask", "--checkpoint", str(tmp_path)])
    assert set(row) == {"image", "caption"}
    with pytest.raises(UserError, match="has no language model to ask"):
        main(["ask", "--checkpoint", str(tmp_path), "--question", "what?"])


def test_chat_keeps_the_conversation(monkeypatch, capsys):
    typed, asked = iter(["what color is the star?", "is it small or large?", ""]), []
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(Blip2, "ask", lambda model, images, turns: asked.append(list(turns)) or ["green"])
    main(["ask", "--chat"])
    assert asked[1] == [("what color is the star?", "green"), "is it small or large?"]
    assert "an empty line ends the conversation" in capsys.readouterr().out


def test_a_free_prompt_goes_as_it_is(capsys):
    (row,) = main(["ask", "--prompt", "Question: how many shapes are there? Answer:"])
    assert row["Question: how many shapes are there? Answer:"] == "two"
