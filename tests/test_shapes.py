"""The shapes world: the same images on every machine, captions and answers that the images show, splits that share no
scene, and a test split that measures what training does not show."""

import math
import re

import numpy as np
import pytest
from conftest import ROOT
from PIL import ImageColor

from sources import shapes
from sources.shapes import (
    CELLS,
    COLORS,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDINGS,
    RELATIONS,
    SIZES,
    TEST_SUBSETS,
    WORDINGS,
    ShapesWorld,
    Thing,
    captions,
    meaning,
    questions,
    split_of,
)
from sources.text import BertTokenizer

A, B = Thing("small", "red", "circle", 0, 0), Thing("large", "blue", "square", 0, 1)

# --- images ----------------------------------------------------------------------------------------------------------


def test_an_image_is_the_same_on_every_machine_and_in_any_order():
    forth = [np.asarray(ShapesWorld("train").image(i)) for i in (0, 1, 2)]
    world = ShapesWorld("train")
    back = [np.asarray(world.image(i)) for i in (2, 1, 0)]
    assert all((a == b).all() for a, b in zip(forth, reversed(back), strict=True))
    assert world.captions(5)[0] == "a small blue cross left of a large blue diamond"


def test_an_image_shows_what_its_scene_says():
    """Each object in its cell, in its colour, covering its share; nothing elsewhere."""
    near = {name: min(COLORS, key=lambda css: math.dist(rgb, ImageColor.getrgb(css))) for name, rgb in COLORS.items()}
    assert all(name == css for name, css in near.items())  # "red" is red
    world = ShapesWorld("val", size=96)
    covered = {size: [] for size in SIZES}
    for i in range(100):
        pixels = np.asarray(world.image(i)).astype(int)
        cells = {(thing.row, thing.column): thing for thing in world.scene(i)}
        for row, column in CELLS:
            cell = pixels[48 * row : 48 * row + 48, 48 * column : 48 * column + 48]
            if (row, column) in cells:
                thing = cells[row, column]
                assert np.abs(cell[24, 24] - COLORS[thing.color]).max() <= 12  # the jitter of `draw`
                covered[thing.size].append((np.abs(cell - cell[24, 24]).max(axis=2) <= 12).mean())
            else:
                assert (cell[2:-2, 2:-2] == cell[24, 24, 0]).all()  # a corner from the next cell may touch the edge
    assert max(covered["small"]) < min(covered["large"])


# --- captions and questions ------------------------------------------------------------------------------------------


def test_a_caption_names_the_objects_and_their_relation_or_places():
    assert captions((A, B)) == [
        "a small red circle left of a large blue square",
        "a large blue square right of a small red circle",
        "there is a small red circle left of a large blue square",
        "a picture of a large blue square right of a small red circle",
    ]
    assert captions((A, B), held_out=True) == ["there is a picture of a large blue square right of a small red circle"]
    assert captions((A,))[0] == "a small red circle at the top left"
    three = captions((A, B, Thing("small", "white", "star", 1, 0)))[0]
    expected = "a small red circle at the top left, a large blue square at the top right and a small white star at the "
    assert three == expected + "bottom left"


def test_questions_have_the_answers_that_the_image_shows():
    asked = {wording: q.answer for q in questions((A, B)) for wording in q.wordings}
    assert asked["how many shapes are there?"] == "two"
    assert asked["what color is the circle?"] == "red"
    assert asked["what shape is blue?"] == "square"
    assert asked["what is right of the small red circle?"] == "a large blue square"
    assert asked["is the small red circle left of the large blue square?"] == "yes"
    assert asked["is the large blue square left of the small red circle?"] == "no"
    assert {q.answer for q in questions((A,)) if q.kind == "place"} == {A.place}


def test_questions_with_several_answers_or_without_a_caption_that_answers_them_are_left_out():
    twice = questions((A, Thing("large", "blue", "circle", 0, 1)))
    assert not any(q.kind in ("color", "size", "place") for q in twice)
    assert not any(q.kind == "place" for q in questions((A, B)))


def test_held_out_questions_have_the_same_answers_in_other_words():
    """In another order of words that training has."""
    learned, held_out = questions((A, B)), questions((A, B), held_out=True)
    assert [q.answer for q in learned] == [q.answer for q in held_out]
    assert not {w for q in learned for w in q.wordings} & {w for q in held_out for w in q.wordings}
    words, other = (set(re.findall(r"\w+", " ".join(w for q in qs for w in q.wordings))) for qs in (learned, held_out))
    assert other <= words


def test_held_out_wordings_are_other_sentences_of_words_that_training_has():
    """So they test another order, not words that the tiny encoders have never seen."""

    def sentences(wordings) -> set[str]:
        return {wording for several in wordings.values() for wording in several}

    def words(wordings) -> set[str]:
        return set(re.sub(r"{.*?}", "", " ".join(sentences(wordings))).split())

    assert not sentences(WORDINGS) & sentences(HELD_OUT_WORDINGS)
    assert words(HELD_OUT_WORDINGS) <= words(WORDINGS)


def test_the_tiny_bert_has_every_word_and_truncates_no_text():
    tokenizer = BertTokenizer(ROOT / "assets/tiny/bert")
    unknown = tokenizer.tokenizer.token_to_id("[UNK]")
    for split in ("train", "val", "test"):
        world = ShapesWorld(split)
        for i in range(300):
            texts = world.captions(i) + [part for asked in world.questions(i) for part in asked[1:]]
            for ids, text in zip(tokenizer.encode(texts), texts, strict=True):
                assert unknown not in ids and len(ids) < tokenizer.max_tokens, text


# --- splits ----------------------------------------------------------------------------------------------------------


def test_a_split_has_a_known_name():
    with pytest.raises(ValueError, match="got split 'validation', expected one of train, val, test"):
        ShapesWorld("validation")


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_caption_of_an_evaluation_split_means_something_else(split):
    world = ShapesWorld(split)
    texts = {world.captions(i)[0] for i in range(len(world))}
    assert len({meaning(scene) for scene in world.scenes}) == len(texts) == len(world)


def test_the_splits_share_no_scene_not_even_a_swapped_one():
    def arrangement(scene):
        return scene[0].row == scene[1].row if len(scene) == 2 else len(scene) == 3 and sorted(t.place for t in scene)

    def content(scene):
        parts = sorted((t.size, t.shape) for t in scene), sorted(t.color for t in scene)
        return str((parts, arrangement(scene)))

    train = ShapesWorld("train")
    scenes = {"train": [train.scene(i) for i in range(5000)]}
    scenes |= {split: ShapesWorld(split).scenes for split in ("val", "test")}
    assert all(split_of(scene) == split for split, several in scenes.items() for scene in several)
    contents = {split: {content(scene) for scene in several} for split, several in scenes.items()}
    assert not contents["train"] & contents["test"] and not contents["train"] & contents["val"]
    assert not contents["val"] & contents["test"]


def test_held_out_pairs_and_wordings_occur_in_their_subsets_only():
    test = ShapesWorld("test")
    assert {name: test.subsets.count(name) for name in TEST_SUBSETS} == TEST_SUBSETS
    for i, scene in enumerate(test.scenes):
        has_pair = any((thing.color, thing.shape) in HELD_OUT_PAIRS for thing in scene)
        assert has_pair == (test.subsets[i] == "held-out pairs")
        assert (test.captions(i)[0] in captions(scene, held_out=True)) == (test.subsets[i] == "held-out wordings")
    train = ShapesWorld("train")
    for i in range(2000):
        assert not any((thing.color, thing.shape) in HELD_OUT_PAIRS for thing in train.scene(i))
        assert train.captions(i) == captions(train.scene(i))
    colors, kinds = {color for color, _ in HELD_OUT_PAIRS}, {shape for _, shape in HELD_OUT_PAIRS}
    assert len(colors) == len(kinds) == len(HELD_OUT_PAIRS)  # each colour and shape is seen in training with others


def test_the_swapped_subset_consists_of_twins():
    """The same objects with the opposite relation, or the same shapes with exchanged colours."""
    test = ShapesWorld("test")
    rows = [i for i, name in enumerate(test.subsets) if name == "swapped"]
    kinds = set()
    for i, j in zip(rows[::2], rows[1::2], strict=True):
        (a, b), (c, d) = test.scenes[i], test.scenes[j]
        assert sorted((t.size, t.shape) for t in (a, b)) == sorted((t.size, t.shape) for t in (c, d))
        assert sorted(t.color for t in (a, b)) == sorted(t.color for t in (c, d))
        one, other = meaning((a, b)), meaning((c, d))
        kinds.add("place" if one[0] == other[0] and RELATIONS[one[1]] == other[1] else "color")
    assert kinds == {"place", "color"}


def test_training_has_twins_side_by_side():
    """Images 4n and 4n + 1 differ in meaning, and little else: the same words in other roles, or one thing changed."""
    train, swaps, changes = ShapesWorld("train"), 0, 0
    parts = ("size", "color", "shape", "place")
    for i in range(0, 2000, 4):
        one, other = train.scene(i), train.scene(i + 1)
        assert meaning(one) != meaning(other)
        different = sum(getattr(a, part) != getattr(b, part) for a, b in zip(one, other, strict=True) for part in parts)
        words = [[sorted(getattr(thing, part) for thing in scene) for part in parts[:3]] for scene in (one, other)]
        same_words = words[0] == words[1]
        assert different <= 2 if same_words else different == 1
        swaps, changes = swaps + same_words, changes + (not same_words)
    assert swaps > 150 and changes > 150


def test_the_scenes_of_a_split_are_made_once_for_each_size_of_the_split():
    """A split that a test shrinks has the same subsets, and is not taken for the whole one."""
    whole, sizes = ShapesWorld("test"), dict(TEST_SUBSETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SPLITS, "test", 100)
        patch.setitem(shapes.SPLITS, "val", 7)
        for subset, size in sizes.items():
            patch.setitem(TEST_SUBSETS, subset, size // 10)
        small, again = ShapesWorld("test"), ShapesWorld("test")
        assert len(small) == len(small.scenes) == 100 and small.scenes is again.scenes
        assert {name: small.subsets.count(name) for name in sizes} == TEST_SUBSETS
        assert small.scenes[:50] == whole.scenes[:50]  # "plain" comes first
        assert len(ShapesWorld("val")) == len(ShapesWorld("val").scenes) == 7
    assert len(whole.scenes) == 1000 and ShapesWorld("test").scenes is whole.scenes
    assert len(ShapesWorld("val").scenes) == 500
