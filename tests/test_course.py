"""What the course shows is what the code computes: the plain stage 1 has the losses and gradients of the fast one."""

import pytest
import torch
from conftest import random_batch, small_model

from course.plain_stage1 import plain_stage1_losses
from losses import Negatives, draw_negatives
from model import OBJECTIVES


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """Of every trained parameter; 0 where the loss does not reach it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(loss, trained.values(), retain_graph=True, materialize_grads=True)
    return dict(zip(trained, grads, strict=True))


@pytest.mark.parametrize(
    "seed, rows, image_ids, sizes",
    [
        (0, 4, None, {}),
        (1, 5, [1, 1, 2, 3, 3], {}),  # two texts of an image: positives of each other, never negatives
        (2, 3, [7, 7, 7], {}),  # no negative at all
        (3, 1, None, {}),
        (4, 6, None, dict(num_queries=5, depth=4, width=24, cross_every=1)),
    ],
)
def test_the_plain_stage_1_has_the_losses_and_gradients_of_the_fast_one(monkeypatch, seed, rows, image_ids, sizes):
    """Each loss alone, so that no error of one hides behind another. Given the same negatives, in fp32."""
    drawn = []
    monkeypatch.setattr("model.draw_negatives", lambda *args: drawn.append(draw_negatives(*args)) or drawn[-1])
    model, batch = small_model(seed, **sizes), random_batch(rows, seed, image_ids)
    fast = model.stage1_losses(batch)
    assert isinstance(drawn[0], Negatives)
    plain = plain_stage1_losses(model, batch.images, batch.text_ids, batch.text_mask, batch.image_ids, *drawn)
    assert tuple(plain) == tuple(fast) == OBJECTIVES
    for name in OBJECTIVES:
        torch.testing.assert_close(plain[name], fast[name], rtol=1e-5, atol=1e-6)
        expected = gradients(model, fast[name])
        for parameter, gradient in gradients(model, plain[name]).items():
            assert torch.allclose(gradient, expected[parameter], rtol=1e-4, atol=1e-6), f"{name}: {parameter}"
