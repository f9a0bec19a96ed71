"""Exercise 6, ITG: make the inputs and the labels of image-grounded text generation.

    input    [DEC]  a     red   star   [SEP]  [PAD]
    label    a      red   star  [SEP]  -100   -100

Where to look: paper 3.2; `Blip2Model.itg` and `data.qformer_batch`, which do it in two places.
"""

import copy

import pytest
import torch

from course.adapters import generation_batch
from course.exercises.helpers import small_qformer
from losses import itg_loss
from qformer import QueryCache

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_6]

DEC, PAD, CLS, SEP = 29, 0, 2, 3


def test_the_drawing():
    ids, mask, labels = generation_batch([[CLS, 11, 12, 13, SEP], [CLS, 14, 15, 16, 17, SEP]], DEC, PAD)
    assert ids.tolist() == [[DEC, 11, 12, 13, SEP, PAD], [DEC, 14, 15, 16, 17, SEP]]
    assert labels.tolist() == [[11, 12, 13, SEP, -100, -100], [14, 15, 16, 17, SEP, -100]]
    assert mask.tolist() == [[True] * 5 + [False], [True] * 6]
    assert ids.dtype == labels.dtype == torch.int64 and mask.dtype == torch.bool


@pytest.mark.parametrize("seed", range(3))
def test_every_token_but_the_first_is_predicted_once(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (5,), generator=generator).tolist()
    texts = [[CLS, *torch.randint(4, 29, (n,), generator=generator).tolist(), SEP] for n in lengths]
    before = copy.deepcopy(texts)
    ids, mask, labels = generation_batch(texts, DEC, PAD)
    assert texts == before, "the texts are the caller's: change a copy"
    assert ids.shape == mask.shape == labels.shape == (5, max(lengths) + 2)
    for row, text in enumerate(texts):
        assert labels[row][labels[row] != -100].tolist() == text[1:]
        assert ids[row][mask[row]].tolist() == [DEC, *text[1:]]


def test_a_word_that_has_the_id_of_the_padding_is_a_word():
    """OPT's padding is an ordinary token of the vocabulary: what is padding is said by the length."""
    ids, mask, labels = generation_batch([[CLS, 7, PAD, 8, SEP], [CLS, 7, SEP]], DEC, PAD)
    assert labels.tolist() == [[7, PAD, 8, SEP, -100], [7, SEP, -100, -100, -100]]
    assert mask.sum(dim=1).tolist() == [5, 3]


def test_more_padding_does_not_change_the_loss():
    """A text gives the same loss alone and beside a longer one, which counts for itself only."""
    torch.manual_seed(0)
    model, tokens = small_qformer(), torch.randn(2, 4, 10)

    def loss_of(texts: list[list[int]]) -> float:
        ids, mask, labels = generation_batch(texts, DEC, PAD)
        model.encode_queries(model.image_kv(tokens[: len(texts)]), cache := QueryCache())
        logits = model.lm_logits(model.decode_text(ids, mask, cache))
        return itg_loss(logits[:1], labels[:1]).item()

    text = [CLS, 11, 12, SEP]
    assert loss_of([text]) == pytest.approx(loss_of([text, [CLS, *range(10, 18), SEP]]), rel=1e-5)
