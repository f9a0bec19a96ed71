"""Exercise 3, masks: turn the drawing below into code, for any number of queries and tokens.

Rows attend to columns. Three queries q, three tokens t, one padding p (`#` = may attend, `.` = may not).

Where to look: paper Figure 2 (right). Compare the position of the row and that of the key, broadcast to (S, S).
"""

import pytest
import torch

import qformer
from course.adapters import attention_mask
from course.exercises.helpers import assert_same_mask

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_3]

DRAWING = """
    itc: unimodal      itm: bi-directional   itg: multimodal causal
     q q q t t t p        q q q t t t p         q q q t t t p
q    # # # . . . .        # # # # # # .         # # # . . . .
q    # # # . . . .        # # # # # # .         # # # . . . .
q    # # # . . . .        # # # # # # .         # # # . . . .
t    . . . # # # .        # # # # # # .         # # # # . . .
t    . . . # # # .        # # # # # # .         # # # # # . .
t    . . . # # # .        # # # # # # .         # # # # # # .
p    . . . # # # .        # # # # # # .         # # # # # # .
"""
KINDS = ("itc", "itm", "itg")


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_the_drawing(kind):
    rows = [line.split()[1:] for line in DRAWING.strip().splitlines()[2:]]
    first = 7 * KINDS.index(kind)
    drawn = torch.tensor([[cell == "#" for cell in cells[first : first + 7]] for cells in rows])
    got = attention_mask(kind, torch.tensor([[True, True, True, False]]), 3)
    assert_same_mask(got, drawn[None, None], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_queries, lengths", [(1, [1, 4]), (4, [2, 5, 3]), (0, [3, 2]), (32, [8])])
def test_other_sizes_and_a_batch_of_texts(kind, num_queries, lengths):
    """Also without queries, as the text alone is encoded for ITC; T = 6 or more: each text has padding of its own."""
    text_mask = torch.arange(max(6, *lengths)) < torch.tensor(lengths)[:, None]
    expected = qformer.qformer_mask(kind, text_mask, num_queries)
    assert_same_mask(attention_mask(kind, text_mask, num_queries), expected, f"{kind}, {num_queries} queries")


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_empty(kind):
    """Padding is masked as a key only: the softmax of a row without any key is NaN."""
    text_mask = torch.tensor([[True, False, False]])
    assert attention_mask(kind, text_mask, 2).any(dim=-1).all()
