"""The maps are the model's own attention, and what speaks for a word lies where the thing is."""

import pytest
import torch
from conftest import ROOT, small_model
from PIL import Image

import eval as evaluation
from blip2 import Blip2
from data import Texts, UserError
from explain import attention_maps, on_patches, sheet, watched, word_map
from shapes import ShapesWorld

RUN = str(ROOT / "assets/tiny/blip2")


@pytest.fixture(scope="module")
def trained():
    return Blip2.from_pretrained(RUN)


def test_watching_changes_nothing_and_leaves_nothing_behind():
    """The probabilities sum to 1, and with the values they make what the fused kernel makes."""
    model = small_model()
    kv = model.image_kv(torch.randn(2, 5, 10))
    with torch.no_grad():
        before = model.qformer.encode_queries(kv)
        with watched(model.qformer) as seen:
            during = model.qformer.encode_queries(kv)
    torch.testing.assert_close(before, during)
    assert [tuple(p.shape) for p in seen] == [(2, 4, 3, 5)] * 2  # blocks 0 and 2 of three
    for probabilities in seen:
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 4, 3))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError), watched(model.qformer):
        raise RuntimeError
    assert not any(module._forward_hooks for module in model.modules())


def test_a_query_that_asks_for_a_patch_looks_at_it():
    """Made by hand: every query asks for what only patch 3 of the photo has."""
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
        with watched(model.qformer) as seen:
            model.qformer.encode_queries(model.qformer.image_kv(tokens))
    assert seen[0][..., 3].min() > 0.99


def test_the_class_token_has_no_place():
    model = small_model()  # 8 pixels, patches of 4: [CLS] and 2 x 2
    grid = on_patches(model, torch.arange(5.0))
    assert grid.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    picture = Image.new("RGB", (8, 8), "red")
    assert attention_maps(model, picture).shape == (2, 3, 2, 2)


def scenes(count: int):
    """Pictures of things of different colours, shapes and places."""
    world = ShapesWorld("test")
    for index in range(300):
        scene = world.scene(index)
        different = [
            {thing.color for thing in scene},
            {thing.shape for thing in scene},
            {thing.place for thing in scene},
        ]
        if len(scene) > 1 and all(len(values) == len(scene) for values in different) and count:
            count -= 1
            yield world.picture(index), scene


def quarter(found: torch.Tensor, place: str) -> float:
    """How much of a map lies in a quarter of the picture."""
    rows = slice(0, 4) if "top" in place else slice(4, 8)
    columns = slice(0, 4) if "left" in place else slice(4, 8)
    return found[rows, columns].sum().item()


def test_what_speaks_for_a_word_lies_where_the_thing_is(trained):
    """Of two or three things, the one that is named has most of the map (97 % of 135 on the whole; chance 44 %)."""
    right = total = 0
    for picture, scene in scenes(20):
        for thing in scene:
            found = word_map(trained, picture, thing.shape, f"a {thing.size} {thing.color}")
            assert found.shape == (8, 8) and found.min() >= 0 and found.max() == pytest.approx(1)
            parts = {other.place: quarter(found, other.place) for other in scene}
            right, total = right + (max(parts, key=parts.get) == thing.place), total + 1
    assert total >= 40 and right / total > 0.85


def test_a_model_of_stage_1_judges_a_match():
    """Without a language model, what speaks for "this text and this photo match"."""
    texts = Texts(ROOT / "assets/tiny/bert")
    model = small_model(texts=texts, vocab_size=texts.vocab_size, max_positions=40)
    assert word_map(model, Image.new("RGB", (8, 8), "red"), "a red star").shape == (2, 2)
    assert all(p.grad is None for p in model.parameters()) and not model.training


def test_the_page_has_the_photo_and_every_map():
    page = sheet(Image.new("RGB", (80, 60)), {str(i): torch.rand(2, 2) for i in range(5)})
    assert page.size == (4 * 224, 2 * (224 + 18))


def test_the_command_line_draws(tmp_path, capsys):
    out = tmp_path / "where.png"
    evaluation.main(["ask", "--attention", str(out), "--word", "green", "--queries", "0", "7", "--device", "cpu"])
    assert Image.open(out).size == (4 * 224, 2 * (224 + 18))  # photo, mean, two queries, the word
    assert f"where the queries look: {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--word", "red"], "got --word or --queries, which say what --attention draws: add --attention out.png"),
        (["--attention", "a.txt"], "--attention a.txt is no name of a picture: let it end in .png"),
        (["--attention", "nowhere/a.png"], "--attention nowhere/a.png: the folder nowhere does not exist"),
        (["--attention", "a.png", "--image", "assets"], "--attention is about one photo, assets is a folder"),
        (["--attention", "a.png", "--queries", "99"], "got the queries [99], expected numbers from 0 to 7"),
        (["--attention", "a.png", "--word", "zebra"], "--word zebra is not in the caption "),
        (
            ["--attention", "a.png", "--word", " ", "--prompt", "a"],
            "got the word ' ', in which there is nothing to look for",
        ),
    ],
)
def test_wrong_flags_get_a_sentence(flags, sentence, tmp_path):
    with pytest.raises(UserError) as error:
        evaluation.main(["ask", *[str(tmp_path / flag) if flag == "a.png" else flag for flag in flags]])
    assert sentence in str(error.value) and not list(tmp_path.iterdir())
