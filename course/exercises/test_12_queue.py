"""Exercise 12, a new loss: ITC with a memory queue (MoCo, ALBEF).

More candidates make a harder question, and a batch is small. The features of earlier batches are there for free: they
are kept in a queue, as candidates without a gradient. They are a little stale, as the model has moved on since.

Where to look: `losses.itc_similarity` and `losses.itc_loss`, which take B rows and N candidates; `torch.cat`.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import losses
from course.adapters import queue_loss

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_12]

TEMPERATURE = torch.tensor(0.1)


def feats(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of a batch, image (B, Q, E) and text (B, E), that require a gradient, and ids of images of their own."""
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(rows, 3, 4, generator=generator), torch.randn(rows, 4, generator=generator)
    ids = torch.arange(rows) + 100 * seed
    return F.normalize(image, dim=-1).requires_grad_(), F.normalize(text, dim=-1).requires_grad_(), ids


def empty() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(0, 3, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)


def expected_loss(image: Tensor, text: Tensor, ids: Tensor, queue: tuple) -> Tensor:
    """Row by row: each image against the texts of batch and queue, each text against the images of both."""
    images, texts, all_ids = (torch.cat(pair) for pair in zip((image, text, ids), queue))
    total = torch.zeros(())
    for own_image, own_text, own_id in zip(image, text, ids):
        right = (all_ids == own_id).float()
        target = 0.9 * right / right.sum() + 0.1 / len(all_ids)
        i2t = (texts @ own_image.T).amax(dim=1) / TEMPERATURE
        t2i = (images @ own_text).amax(dim=1) / TEMPERATURE
        total = total - (target * (i2t.log_softmax(dim=0) + t2i.log_softmax(dim=0))).sum() / 2
    return total / len(ids)


def test_with_an_empty_queue_it_is_itc():
    image, text, ids = feats(5, 1)
    loss, _ = queue_loss(image, text, ids, empty(), 8, TEMPERATURE)
    sims = losses.itc_similarity(image, text, image, text, TEMPERATURE)
    torch.testing.assert_close(loss, losses.itc_loss(*sims, ids[:, None] == ids))


@pytest.mark.parametrize("seed", range(3))
def test_the_queue_adds_candidates(seed):
    queue = tuple(x.detach() for x in feats(7, 10 + seed))
    batch = feats(4, seed)
    loss, _ = queue_loss(*batch, queue, 16, TEMPERATURE)
    torch.testing.assert_close(loss, expected_loss(*batch, queue))


def test_the_same_image_in_the_queue_is_a_positive():
    image, text, ids = feats(4, 1)
    old_image, old_text, old_ids = (x.detach() for x in feats(6, 2))
    old_ids[[1, 4]] = ids[2]
    loss, _ = queue_loss(image, text, ids, (old_image, old_text, old_ids), 16, TEMPERATURE)
    torch.testing.assert_close(loss, expected_loss(image, text, ids, (old_image, old_text, old_ids)))


def test_the_newest_rows_stay_in_order_and_the_oldest_leave():
    """Batches of 3 through a queue of 7: the last 7 of 12 rows; all three parts of a row stay together."""
    batches, queue = [feats(3, seed) for seed in range(1, 5)], empty()
    for number, batch in enumerate(batches, start=1):
        _, queue = queue_loss(*batch, queue, 7, TEMPERATURE)
        for kept, all_rows in zip(queue, zip(*batches[:number])):
            expected = torch.cat(all_rows)[-7:]
            assert kept.shape == expected.shape, f"after batch {number} the queue is {tuple(kept.shape)}"
            assert torch.equal(kept, expected), "expected the newest rows, the newest last"


def test_the_queue_holds_no_graph_and_the_batch_gets_a_gradient():
    """A graph in the queue would keep the activations of all earlier batches in memory."""
    queue = empty()
    for seed in (1, 2, 3):
        batch = feats(3, seed)
        loss, queue = queue_loss(*batch, queue, 16, TEMPERATURE)
        assert not any(part.requires_grad for part in queue), "detach what enters the queue"
        loss.backward()
        assert batch[0].grad.abs().sum() > 0 and batch[1].grad.abs().sum() > 0


def test_the_gradient_is_that_of_the_batch_as_query_and_as_candidate():
    queue = tuple(x.detach() for x in feats(5, 9))
    gradients = []
    for loss_of in (lambda *args: queue_loss(*args, 16, TEMPERATURE)[0], expected_loss):
        image, text, ids = feats(4, 1)
        gradients.append(torch.autograd.grad(loss_of(image, text, ids, queue), (image, text)))
    for got, expected in zip(*gradients):
        torch.testing.assert_close(got, expected)
