"""Exercise 5, hard negatives: draw for each text an image that looks right and is wrong, for all rows at once.

The more similar a candidate, the more probable; but never one of the row's own image, whose text would be right.

Where to look: paper 3.2, "hard negative mining strategy"; `torch.multinomial` draws, but refuses a row without any
candidate. What does softmax make of -inf?
"""

import pytest
import torch

from course.adapters import hard_negatives
from course.exercises.helpers import TorchCalls

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_5]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(3))
def test_the_draws_follow_the_softmax_over_the_candidates_of_other_images(seed):
    """20,000 draws for one row of six candidates, two of its own image: within four standard deviations."""
    torch.manual_seed(seed)
    row, own = 2 * torch.randn(6), torch.arange(6) % 6 < 2
    own = own[torch.randperm(6)]
    draws = 20_000
    negative, found = hard_negatives(row.expand(draws, 6), own.expand(draws, 6), generator(seed))
    assert negative.shape == found.shape == (draws,) and negative.dtype == torch.int64 and found.dtype == torch.bool
    assert found.all()
    counts = torch.bincount(negative, minlength=6)
    assert not counts[own].any(), "a candidate of the row's own image was drawn"
    expected = torch.where(own, 0, row.exp())
    expected /= expected.sum()
    margin = 4 * (draws * expected * (1 - expected)).sqrt() + 1
    assert ((counts - draws * expected).abs() <= margin).all(), f"drawn {counts / draws}, expected {expected}"


def test_never_the_own_image_however_similar():
    """Of 64 texts with two to an image, each is most similar to its own image by far."""
    ids = torch.arange(64) // 2
    same_image = ids[:, None] == ids
    negative, found = hard_negatives(50.0 * same_image, same_image, generator())
    assert found.all()
    assert (ids[negative] != ids).all()


def test_a_row_without_negatives_says_so_and_disturbs_no_other():
    same_image = torch.tensor([[True, True, True], [False, True, False], [True, True, True]])
    negative, found = hard_negatives(torch.zeros(3, 3), same_image, generator())
    assert found.tolist() == [False, True, False]
    assert negative[1] in (0, 2) and ((0 <= negative) & (negative < 3)).all()


def test_extreme_similarities():
    similarity = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -9e3]])
    negative, _ = hard_negatives(similarity, torch.tensor([[True, False, False], [False, True, False]]), generator())
    assert negative.tolist() == [2, 2]


def test_rows_are_drawn_independently_by_the_generator():
    similarity, same_image = torch.zeros(200, 8), torch.zeros(200, 8, dtype=torch.bool)
    draws = [hard_negatives(similarity, same_image, generator(seed))[0] for seed in (1, 1, 2)]
    assert len(draws[0].unique()) == 8, "equal rows all draw the same candidate"
    assert torch.equal(draws[0], draws[1]), "the same generator draws something else: draw with `generator=`"
    assert not torch.equal(draws[0], draws[2])


def test_all_rows_at_once():
    counts = []
    for rows in (4, 400):
        with TorchCalls() as calls:
            hard_negatives(torch.zeros(rows, 8), torch.arange(8) < torch.ones(rows, 1), generator())
        counts.append(len(calls.names))
    assert counts[0] == counts[1], f"4 rows take {counts[0]} calls of torch, 400 rows take {counts[1]}: there is a loop"
