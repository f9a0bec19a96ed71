"""Exercise 15, a new encoder: put a small convolutional net in the place of the ViT.

The Q-Former reads tokens, whatever made them. Nothing of the model has to change, if the encoder answers what the model
asks of one.

Where to look: every line of model.py that has `vit` in it. Two strided convolutions of 4 x 4 make a token of 16 x 16
pixels. uint8 pixels want a mean of about 0 and a spread of about 1 first.
"""

import pytest
import torch

from course.adapters import ConvEncoder
from course.exercises.helpers import small_batch, small_model

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_15]


def encoder(seed: int = 0, width: int = 12) -> ConvEncoder:
    torch.manual_seed(seed)
    return ConvEncoder(width, 32)


@pytest.mark.parametrize("width, size, tokens", [(12, 32, 4), (8, 64, 16)])
def test_the_tokens_have_the_shape_that_the_model_expects(width, size, tokens):
    torch.manual_seed(0)
    conv = ConvEncoder(width, size)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    out = conv(images)
    assert out.shape == (2, tokens, width) and out.dtype == torch.float32
    assert (conv.cfg.width, conv.cfg.image_size) == (width, size)
    assert images.float().mean() > 100, "the images are the caller's: do not change them"


def test_a_token_sees_its_patch_first_of_all_row_by_row():
    """Other pixels in the patch at the top right change token 1 more than any other."""
    images = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    other = images.clone()
    other[:, :, :16, 16:] = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        moved = (encoder().eval()(other) - encoder().eval()(images)).norm(dim=2)[0]
    assert moved.argmax() == 1, f"the tokens move by {moved.tolist()}"


def test_equal_patches_in_different_places_are_different_tokens():
    """The queries read a set: where a token is, it has to say itself."""
    tokens = encoder().eval()(torch.full((1, 3, 32, 32), 100, dtype=torch.uint8))[0]
    assert not torch.allclose(tokens[0], tokens[3], atol=1e-4)


def test_frozen_it_gets_no_gradient_and_the_queries_do():
    model = small_model(encoder())
    assert not any(parameter.requires_grad for parameter in model.vit.parameters()) and not model.vit.training
    sum(model.stage1_losses(small_batch(4)).values()).backward()
    assert model.qformer.queries.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.vit.parameters())


def test_unfrozen_every_parameter_gets_a_gradient():
    """As in fine-tuning."""
    model = small_model(encoder())
    model.unfreeze_vit()
    sum(model.stage1_losses(small_batch(4)).values()).backward()
    idle = [name for name, parameter in model.vit.named_parameters() if parameter.grad is None]
    assert not idle, f"no gradient reaches {idle}"


def test_stage_1_learns_with_it():
    """Eight images by heart in 150 steps, over a frozen random encoder; chance is log 8 = 2.08."""
    model = small_model(encoder())
    torch.manual_seed(0)
    batch, found = small_batch(8), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(150):
        loss = model.stage1_losses(batch, objectives=("itc",))["itc"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.temperature.data.clamp_(0.05, 0.5)  # as in train.py
        found.append(loss.item())
    assert min(found) < 1.6, f"ITC stays above {min(found):.2f}: what of an image reaches the queries?"
