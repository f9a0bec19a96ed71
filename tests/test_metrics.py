"""BLEU and CIDEr-D are those of pycocoevalcap, on any captions, and by hand."""

import json
import math
import random

import pytest
from conftest import shared

from metrics import bleu, caption_words, cider

WORDS = "a the dog cat man red blue runs sits on in with two grass beach".split()


def corpus(seed: int, count: int = 60):
    """Random captions with references of which some share n-grams with them, some are short, one is empty."""
    rng = random.Random(seed)

    def text(longest=14):
        return rng.choices(WORDS, k=rng.randint(1, longest))

    captions, references = [], []
    for _ in range(count):
        caption = text()
        other = caption[: rng.randint(0, len(caption))] + text(6)
        captions.append(caption)
        references.append([text(), other, text()][: rng.randint(1, 3)])
    captions[0] = captions[0][:1]
    return captions, references


def oracle(captions, references):
    """pycocoevalcap's own BLEU-1 to 4 and CIDEr for tokenized text."""
    said = {i: [" ".join(words)] for i, words in enumerate(captions)}
    told = {i: [" ".join(words) for words in texts] for i, texts in enumerate(references)}
    bleu_scorer = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    cider_scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    return bleu_scorer.compute_score(told, said, verbose=0)[0], cider_scorer.compute_score(told, said)[0]


@pytest.mark.parametrize("seed", range(4))
def test_bleu_and_cider_equal_pycocoevalcap(seed):
    captions, references = corpus(seed)
    theirs, their_cider = oracle(captions, references)
    assert bleu(captions, references) == pytest.approx(theirs, abs=1e-9)
    assert cider(captions, references) == pytest.approx(their_cider, abs=1e-9)


def test_bleu_and_cider_of_people_equal_pycocoevalcap():
    """On Flickr8k's own captions: the first of each photo against the four others."""
    photos = json.loads(shared("data/flickr8k/val.json").read_text())[:200]
    people = [[caption_words(text) for text in photo["caption"]] for photo in photos]
    captions, references = [texts[0] for texts in people], [texts[1:] for texts in people]
    theirs, their_cider = oracle(captions, references)
    assert bleu(captions, references) == pytest.approx(theirs, abs=1e-9)
    assert cider(captions, references) == pytest.approx(their_cider, abs=1e-9)


def test_bleu_by_hand():
    caption, reference = "a dog runs".split(), "a dog runs on the grass".split()
    scores = bleu([caption], [[reference]])
    penalty = math.exp(1 - 6 / 3)  # every n-gram is right, but half of the words are missing
    assert scores[0] == pytest.approx(penalty, abs=1e-6) and scores[2] == pytest.approx(penalty, abs=1e-6)
    assert bleu([reference], [[reference]]) == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert bleu([["cat"] * 4], [[reference]])[0] == pytest.approx(0, abs=1e-6)
    assert bleu([["a"] * 4], [[reference]])[0] == pytest.approx(0.25 * math.exp(1 - 6 / 4), abs=1e-6)  # counted once


def test_cider_counts_rare_words_and_the_length():
    references = [["a dog runs".split()], ["a cat sits".split()], ["a man sits".split()]]
    whole = cider([texts[0] for texts in references], references)
    assert whole == pytest.approx(10 * 3 / 4)  # of three words there are no four in a row
    rare = cider(["dog".split(), ["x"], ["x"]], references)
    common = cider(["a".split(), ["x"], ["x"]], references)
    assert rare > common == 0  # a word of all references says nothing


@pytest.mark.parametrize(
    "caption, words",
    [
        ("A dog's ball , on the GRASS .", "a dog 's ball on the grass"),
        ('He said: "two-year-old boys don\'t!"', "he said two-year-old boys do n't"),
        ("a man -- and a flag ...", "a man and a flag"),
    ],
)
def test_words_of_a_caption(caption, words):
    """Lower case, clitics apart, no punctuation, as the COCO evaluation counts."""
    assert caption_words(caption) == words.split()
