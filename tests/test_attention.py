"""Where the queries look: the maps are the model's own attention, and Grad-CAM for a word lies where the object is."""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, roughen, small_model, stage2_model
from PIL import Image

import eval as evaluation
from blip2 import Blip2
from engine.errors import UserError
from sources.shapes import ShapesWorld
from sources.text import BertTokenizer, fill_template
from tasks.attention_maps import attention_maps, draw_attention, on_patches, recorded_attention, sheet, word_map
from vit import SIGLIP, ViT

RED = Image.new("RGB", (8, 8), "red")


@pytest.fixture(scope="module")
def tiny_run():
    """The trained run that ships with the code."""
    return Blip2.from_pretrained(ROOT / "assets/tiny/blip2")


def reading_model(**sizes) -> Blip2:
    """A small stage-1 model with the tiny BERT's words."""
    tokenizer = BertTokenizer(ROOT / "assets/tiny/bert")
    return small_model(tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, max_positions=40, **sizes)


# --- the maps --------------------------------------------------------------------------------------------------------


def test_recording_changes_no_output_and_leaves_no_hook():
    """The probabilities sum to 1, and with the values they make what the fused kernel makes."""
    model = small_model()
    kv = model.image_kv(torch.randn(2, 5, 10))
    with torch.no_grad():
        before = model.qformer.encode_queries(kv)
        with recorded_attention(model.qformer) as seen:
            during = model.qformer.encode_queries(kv)
    torch.testing.assert_close(before, during)
    assert [tuple(p.shape) for p in seen] == [(2, 4, 3, 5)] * 2  # blocks 0 and 2 of three
    for probabilities in seen:
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 4, 3))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError), recorded_attention(model.qformer):
        raise RuntimeError
    assert not any(module._forward_hooks for module in model.modules())


def test_a_query_that_asks_for_a_patch_attends_to_it():
    """Made by hand: every query asks for what only patch 3 of the image has."""
    model = small_model()
    cross = model.qformer.blocks[0].cross
    with torch.no_grad():
        for linear in (cross.q, cross.kv):
            linear.weight.zero_()
            linear.bias.zero_()
        cross.q.bias.fill_(5.0)
        cross.kv.weight[:16, 0] = 5.0  # keys, of the first number of a token
        tokens = torch.zeros(1, 5, 10)
        tokens[0, 3, 0] = 1.0
        with recorded_attention(model.qformer) as seen:
            model.qformer.encode_queries(model.qformer.image_kv(tokens))
    assert seen[0][..., 3].min() > 0.99


def test_the_class_token_has_no_place_in_a_map():
    model = small_model()  # 8 pixels, patches of 4: [CLS] and 2 x 2
    assert on_patches(model, torch.arange(5.0)).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert attention_maps(model, RED).shape == (2, 3, 2, 2)
    model.vit = roughen(ViT(replace(model.vit.cfg, **SIGLIP)))  # without [CLS]
    assert on_patches(model, torch.arange(4.0)).tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert attention_maps(model, RED).shape == (2, 3, 2, 2)


def test_the_maps_follow_the_question_where_the_q_former_reads_it():
    model = reading_model()
    assert torch.equal(attention_maps(model, RED, "what color is it?"), attention_maps(model, RED, "why?"))
    model.conditioned = True
    difference = (attention_maps(model, RED, "what color is it?") - attention_maps(model, RED, "why?")).abs()
    assert difference.flatten(1).amax(dim=1).min() > 1e-4  # in both blocks


# --- Grad-CAM for a word ---------------------------------------------------------------------------------------------


def scenes(count: int):
    """Images of objects that all differ in colour, shape and place, and their scenes."""
    world = ShapesWorld("test")
    for index in range(300):
        scene = world.scene(index)
        different = [{thing.color for thing in scene}, {thing.shape for thing in scene}]
        different.append({thing.place for thing in scene})
        if len(scene) > 1 and all(len(values) == len(scene) for values in different) and count:
            count -= 1
            yield world.image(index), scene


def quarter(found: torch.Tensor, place: str) -> float:
    """The sum of a map over a quarter of the image."""
    rows = slice(0, 4) if "top" in place else slice(4, 8)
    columns = slice(0, 4) if "left" in place else slice(4, 8)
    return found[rows, columns].sum().item()


def test_the_evidence_for_a_word_is_where_the_object_is(tiny_run):
    """Of two or three objects, the one that is named has most of the map (97 % of 135 on the whole; chance 44 %)."""
    right = total = 0
    for image, scene in scenes(20):
        for thing in scene:
            found = word_map(tiny_run, image, thing.shape, f"a {thing.size} {thing.color}")
            assert found.shape == (8, 8) and found.min() >= 0 and found.max() == pytest.approx(1)
            parts = {other.place: quarter(found, other.place) for other in scene}
            right, total = right + (max(parts, key=parts.get) == thing.place), total + 1
    assert total >= 40 and right / total > 0.85


def test_without_a_language_model_the_evidence_is_for_a_match_with_the_word():
    """The gradient is that of the ITM logit; no weight of the model gets one."""
    model = reading_model()
    assert word_map(model, RED, "a red star").shape == (2, 2)
    assert all(p.grad is None for p in model.parameters()) and not model.training


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_word_map_works_with_any_language_model(kind):
    found = word_map(stage2_model(kind), RED, "star", "a red")
    assert found.shape == (2, 2) and found.min() >= 0 and torch.isfinite(found).all()


# --- the sheet -------------------------------------------------------------------------------------------------------


def test_the_sheet_has_the_image_and_every_map():
    page = sheet(Image.new("RGB", (80, 60)), {str(i): torch.rand(2, 2) for i in range(5)})
    assert page.size == (4 * 224, 2 * (224 + 18))


def test_a_word_of_the_caption_is_taken_after_the_words_before_it(tiny_run, monkeypatch):
    """At the start, the score would be about how captions begin."""
    asked = []
    monkeypatch.setattr("tasks.attention_maps.word_map", lambda *args: asked.append(args[2:]) or torch.ones(8, 8))
    question = "what color is the star?"
    draw_attention(tiny_run, RED, "a small red star", [0], "star")
    draw_attention(tiny_run, RED, "", [0], "green", fill_template(tiny_run.template, question), question)
    assert asked == [
        ("star", "a small red", ""),
        ("green", "Question: what color is the star? Answer:", "what color is the star?"),
    ]


def test_the_command_draws_the_sheet(tmp_path, capsys):
    out = tmp_path / "where.png"
    evaluation.main(["ask", "--attention", str(out), "--word", "green", "--queries", "0", "7", "--device", "cpu"])
    assert Image.open(out).size == (4 * 224, 2 * (224 + 18))  # image, mean, two queries, the word
    assert f"attention maps: {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--word", "red"], "got --word or --queries, which say what --attention draws: add --attention out.png"),
        (["--attention", "a.txt"], "--attention a.txt is no image file: let it end in .png"),
        (["--attention", "nowhere/a.png"], "--attention nowhere/a.png: the folder nowhere does not exist"),
        (["--attention", "a.png", "--image", "assets"], "--attention is for one image, assets is a folder"),
        (["--attention", "a.png", "--queries", "99"], "got --queries [99], expected numbers from 0 to 7"),
        (["--attention", "a.png", "--word", "zebra"], "--word zebra is not in the caption "),
        (["--attention", "a.png", "--word", " ", "--prompt", "a"], "got --word ' ', expected a word"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags_get_a_sentence(flags, sentence, tmp_path):
    with pytest.raises(UserError) as error:
        evaluation.main(["ask", *[str(tmp_path / flag) if flag == "a.png" else flag for flag in flags]])
    assert sentence in str(error.value) and not list(tmp_path.iterdir())
