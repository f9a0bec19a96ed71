"""Exercise 13, a new kind of mask: prefix LM, for text whose beginning is given.

The first n tokens of a text see each other in both directions, as in ITM; the rest is causal, as in ITG. The queries
see no text. Two queries q, a prefix of two tokens, two more tokens, one padding p:

         q q t t t t p
    q    # # . . . . .
    q    # # . . . . .
    t    # # # # . . .    <- the first token sees the second
    t    # # # # . . .
    t    # # # # # . .
    t    # # # # # # .
    p    # # # # # # .

Where to look: `qformer.qformer_mask`; paper 3.3, where the prefix goes to the encoder of T5.
"""

import pytest
import torch

import qformer
from course.adapters import prefix_lm_mask
from course.exercises.helpers import assert_same_mask, small_qformer

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_13]


def text_mask(*lengths: int, longest: int = 5) -> torch.Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def test_the_mask_is_the_drawing():
    drawn = [row.split()[1:] for row in __doc__.split("q q t t t t p\n")[1].splitlines()[:7]]
    drawn = torch.tensor([[cell == "#" for cell in cells[:7]] for cells in drawn])
    assert_same_mask(prefix_lm_mask(text_mask(4), 2, torch.tensor([2])), drawn[None, None], "the drawing")


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("num_queries", [0, 3])
def test_without_a_prefix_to_look_around_in_it_is_itg(prefix, num_queries):
    mask = text_mask(5, 3, 1)
    expected = qformer.qformer_mask("itg", mask, num_queries)
    assert_same_mask(prefix_lm_mask(mask, num_queries, torch.tensor([prefix] * 3)), expected, f"a prefix of {prefix}")


def test_each_text_has_its_own_prefix():
    mask, prefix = text_mask(5, 5, 4, 2), torch.tensor([3, 0, 4, 2])
    alone = [prefix_lm_mask(mask[i : i + 1], 2, prefix[i : i + 1]) for i in range(4)]
    assert_same_mask(prefix_lm_mask(mask, 2, prefix), torch.cat(alone), "four texts, and each alone")


def test_a_text_that_is_all_prefix_is_bidirectional_but_the_queries_do_not_read_it():
    mask = text_mask(5)
    expected = qformer.qformer_mask("itm", mask, 2)
    expected[:, :, :2, 2:] = False
    assert_same_mask(prefix_lm_mask(mask, 2, torch.tensor([5])), expected, "all prefix")


def test_padding_in_the_prefix_stays_masked_and_no_row_is_empty():
    got = prefix_lm_mask(text_mask(2), 2, torch.tensor([4]))
    assert not got[..., 4:].any(), "padding is a key"
    assert got.any(dim=-1).all()


@pytest.mark.parametrize("seed", range(2))
def test_the_q_former_obeys_it(seed):
    """By perturbation, with a prefix of 3 of 5 tokens: who sees token j has another output if it is another."""
    torch.manual_seed(seed)
    model, ids, tokens = small_qformer(), torch.randint(5, 29, (1, 5)), torch.randn(1, 4, 10)
    image_kv, mask = model.image_kv(tokens), prefix_lm_mask(text_mask(5), 3, torch.tensor([3]))

    @torch.no_grad()
    def run(ids):
        return model.run(torch.cat((model.queries, model.embed(ids)), dim=1), 3, mask, image_kv)

    for j in range(5):
        other = ids.clone()
        other[0, j] = (other[0, j] + 1) % 29
        moved = ((run(other) - run(ids)).abs().amax(dim=2) > 0)[0].tolist()
        sees = [False] * 3 + [j < 3 or row >= j for row in range(5)]
        assert moved == sees, f"token {j} of the text changes the outputs {moved}, expected {sees}"
