"""Exercise 10, evaluation: compute CIDEr-D by hand.

A caption is as good as it agrees with what people wrote, and agreeing on a rare word counts more than on "a". So each
text becomes a vector of its n-grams, weighted by tf-idf, and the score is a cosine. The "-D" adds two defences: counts
are clipped to the reference's, and a length that differs from the reference's costs.

Where to look: Vedantam et al., 2015, section 3; the formula is in `adapters.cider_d`.
"""

import math

import pytest
import torch

from course.adapters import cider_d
from tasks.metrics import cider

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_10]


def words(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


# Two images with a reference each, and no word in both.
APART = [words("the small red star"), words("one big blue cross here")]


def test_a_caption_that_is_its_reference_has_the_highest_score():
    assert cider_d(words("the small red star", "one big blue cross here"), APART) == pytest.approx(10)


def test_a_caption_without_a_common_word_has_none():
    assert cider_d(words("some other words", "and still others"), APART) == 0


def test_one_word_of_four():
    """Image 0: 1-grams have the cosine 1 / 2, as "red" is one of four entries that are equal; no longer n-gram agrees;
    three words are missing. Image 1 has nothing."""
    score = 10 * 0.5 / 4 * math.exp(-(3**2) / 72)
    assert cider_d(words("red", "x"), APART) == pytest.approx(score / 2)


def test_repeating_a_word_does_not_pay():
    """Four times "red": the entry is clipped to that of the reference, but counts fully in the caption's norm."""
    score = 10 * (1 / (4 * 2)) / 4
    assert cider_d(words("red red red red", "x"), APART) == pytest.approx(score / 2)


def test_a_word_of_all_images_counts_nothing():
    references = [words("a star"), words("a cross")]
    assert cider_d(words("a", "a"), references) == 0


def test_a_word_counts_once_for_each_image_however_often_its_references_have_it():
    """Of three images the references of one have "star", those of two "dog": log 3 against log 1.5 in the 1-grams."""
    references = [words("star dog", "star"), words("dog"), words("cross")]
    rare, common = math.log(3), math.log(1.5)
    unigrams = [rare / math.hypot(rare, common), 1.0]  # the cosine of "star" with each reference of image 0
    expected = 10 / 4 * (unigrams[0] * math.exp(-1 / 72) + unigrams[1]) / 2
    assert cider_d(words("star", "x", "x"), references) == pytest.approx(expected / 3)


@pytest.mark.parametrize("seed", range(5))
def test_any_corpus_has_the_score_of_the_product(seed):
    """Captions made of pieces of their references, which differ in number and length."""
    generator = torch.Generator().manual_seed(seed)

    def text(least: int) -> list[str]:
        length = int(torch.randint(least, 9, (1,), generator=generator))
        return [f"w{number}" for number in torch.randint(0, 7, (length,), generator=generator).tolist()]

    references = [[text(1) for _ in range(1 + image % 3)] for image in range(6)]
    captions = [texts[0][:3] + text(1) for texts in references]
    assert cider_d(captions, references) == pytest.approx(cider(captions, references), rel=1e-9)
