"""The shapes world keeps its promises: the same everywhere, honest splits, captions that tell pictures apart."""

import math
import re

import numpy as np
import pytest
from PIL import ImageColor

from data import Texts
from shapes import (
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

A, B = Thing("small", "red", "circle", 0, 0), Thing("large", "blue", "square", 0, 1)


def test_a_picture_is_the_same_on_every_machine_and_in_any_order():
    forth = [np.asarray(ShapesWorld("train").picture(i)) for i in (0, 1, 2)]
    world = ShapesWorld("train")
    back = [np.asarray(world.picture(i)) for i in (2, 1, 0)]
    assert all((a == b).all() for a, b in zip(forth, reversed(back), strict=True))
    assert world.captions(5)[0] == "a small blue cross left of a large blue diamond"


def test_a_picture_shows_what_its_scene_says():
    """Each object in its cell, in its colour, covering its share; nothing elsewhere."""
    near = {name: min(COLORS, key=lambda css: math.dist(rgb, ImageColor.getrgb(css))) for name, rgb in COLORS.items()}
    assert all(name == css for name, css in near.items())  # "red" is red
    world = ShapesWorld("val", size=96)
    drawn = {size: [] for size in SIZES}
    for i in range(100):
        pixels = np.asarray(world.picture(i)).astype(int)
        cells = {(thing.row, thing.column): thing for thing in world.scene(i)}
        for row, column in CELLS:
            cell = pixels[48 * row : 48 * row + 48, 48 * column : 48 * column + 48]
            if (row, column) in cells:
                thing = cells[row, column]
                assert np.abs(cell[24, 24] - COLORS[thing.color]).max() <= 12  # the jitter of `draw`
                drawn[thing.size].append((np.abs(cell - cell[24, 24]).max(axis=2) <= 12).mean())
            else:
                assert (cell[2:-2, 2:-2] == cell[24, 24, 0]).all()  # a neighbour's corner may touch the edge
    assert max(drawn["small"]) < min(drawn["large"])


def test_captions_of_a_scene():
    assert captions((A, B)) == [
        "a small red circle left of a large blue square",
        "a large blue square right of a small red circle",
        "there is a small red circle left of a large blue square",
        "a picture of a large blue square right of a small red circle",
    ]
    assert captions((A, B), held_out=True) == ["there is a picture of a large blue square right of a small red circle"]
    assert captions((A,))[0] == "a small red circle at the top left"


def test_questions_have_the_answers_that_the_picture_shows():
    asked = {wording: q.answer for q in questions((A, B)) for wording in q.wordings}
    assert asked["how many shapes are there?"] == "two"
    assert asked["what color is the circle?"] == "red"
    assert asked["what shape is blue?"] == "square"
    assert asked["what is right of the small red circle?"] == "a large blue square"
    assert asked["is the small red circle left of the large blue square?"] == "yes"
    assert asked["is the large blue square left of the small red circle?"] == "no"
    assert {q.answer for q in questions((A,)) if q.kind == "place"} == {A.place}
    # A question that several answers would fit is not asked, nor one that no caption answers.
    twice = questions((A, Thing("large", "blue", "circle", 0, 1)))
    assert not any(q.kind in ("color", "size", "place") for q in twice)
    assert not any(q.kind == "place" for q in questions((A, B)))


def test_held_out_questions_have_the_same_answers_in_other_words():
    learned, held_out = questions((A, B)), questions((A, B), held_out=True)
    assert [q.answer for q in learned] == [q.answer for q in held_out]
    assert not {w for q in learned for w in q.wordings} & {w for q in held_out for w in q.wordings}
    words, other = (set(re.findall(r"\w+", " ".join(w for q in qs for w in q.wordings))) for qs in (learned, held_out))
    assert other <= words


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_caption_of_an_evaluation_split_means_something_else(split):
    world = ShapesWorld(split)
    assert (
        len({meaning(scene) for scene in world.scenes})
        == len({world.captions(i)[0] for i in range(len(world))})
        == len(world)
    )


def test_splits_share_no_scene_not_even_a_swapped_one():
    def content(scene):
        return (
            tuple(sorted((t.size, t.shape) for t in scene)),
            tuple(sorted(t.color for t in scene)),
            str(relation_axis(scene)),
        )

    def relation_axis(scene):
        return scene[0].row == scene[1].row if len(scene) == 2 else len(scene) == 3 and sorted(t.place for t in scene)

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
    assert not {w for group in WORDINGS.values() for w in group} & {
        w for group in HELD_OUT_WORDINGS.values() for w in group
    }
    every = {c for c, _ in HELD_OUT_PAIRS}, {s for _, s in HELD_OUT_PAIRS}
    assert len(every[0]) == len(every[1]) == len(HELD_OUT_PAIRS)  # each colour and shape is still seen with others


def test_twins_differ_by_a_swap_only():
    """Same objects with the relation the other way round, or the same shapes with each other's colours."""
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


def test_bert_knows_every_word_and_no_caption_is_cut():
    texts = Texts("assets/tiny/bert")
    unknown = texts.tokenizer.token_to_id("[UNK]")
    for split in ("train", "val", "test"):
        world = ShapesWorld(split)
        for i in range(300):
            sentences = world.captions(i) + [part for asked in world.questions(i) for part in asked[1:]]
            for ids, sentence in zip(texts.encode(sentences), sentences, strict=True):
                assert unknown not in ids and ids[-1] == texts.sep_id, sentence


def test_other_splits_are_refused():
    with pytest.raises(ValueError, match="train, val, test"):
        ShapesWorld("validation")


def test_training_shows_twins_side_by_side():
    """Pictures 4n and 4n + 1 mean different things, and are alike: the same words in other roles, or one thing else."""
    train, swaps, changes = ShapesWorld("train"), 0, 0
    parts = ("size", "color", "shape", "place")
    for i in range(0, 2000, 4):
        one, other = train.scene(i), train.scene(i + 1)
        assert meaning(one) != meaning(other)
        different = sum(
            sum(getattr(a, part) != getattr(b, part) for part in parts) for a, b in zip(one, other, strict=True)
        )
        same_words = all(sorted(getattr(t, part) for t in one) == sorted(getattr(t, part) for t in other)
                         for part in parts[:3])  # fmt: skip
        assert different <= 2 if same_words else different == 1
        swaps, changes = swaps + same_words, changes + (not same_words)
    assert swaps > 150 and changes > 150


def test_held_out_wordings_use_words_of_training():
    """So what they test is another order, not words that the tiny encoders have never seen."""

    def words(wordings):
        return set(re.sub(r"{.*?}", "", " ".join(w for several in wordings.values() for w in several)).split())

    assert words(HELD_OUT_WORDINGS) <= words(WORDINGS)
