"""Exercise 1, tokens: write the first lines of a ViT, from the image to the input of block 0, without a convolution.

A convolution whose stride is its width is a matrix product: cut the image into patches, write each patch as a vector
of 3 * p * p numbers, multiply by the weight. Then [CLS] comes first, and each token gets its position.

Where to look: `vit.ViT.forward`; `torch.nn.functional.unfold` cuts an image. Mind the order of the 3 * p * p numbers.
"""

import pytest
import torch

from course.adapters import embed_patches
from course.exercises.helpers import TorchCalls, check
from vit import ViT, ViTConfig

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_1]


@pytest.mark.parametrize("seed, patch, grid, width", [(0, 4, (2, 2), 5), (1, 3, (2, 4), 8), (2, 5, (3, 1), 7)])
def test_the_tokens_are_those_of_the_vit(seed, patch, grid, width):
    """Of a ViT without blocks, for square images and others."""
    torch.manual_seed(seed)
    vit = ViT(ViTConfig(width, depth=0, heads=1, mlp=1, patch_size=patch, image_size=patch))
    vit.patch_embed.bias.data.normal_()
    images = torch.randn(3, 3, grid[0] * patch, grid[1] * patch)
    positions = torch.randn(1, 1 + grid[0] * grid[1], width)
    vit.positions = lambda rows, columns: positions
    got = embed_patches(images, vit.patch_embed.weight, vit.patch_embed.bias, vit.cls_token, positions)
    expected = vit(images)
    check(got.shape == expected.shape, f"got shape {tuple(got.shape)}, expected (B, P, V) = {tuple(expected.shape)}")
    right = [torch.allclose(got[:, token], expected[:, token], atol=1e-5) for token in range(expected.shape[1])]
    check(right[0], "token 0 is wrong: expected [CLS] plus the first position, the same for each image")
    wrong = [token for token, is_right in enumerate(right) if not is_right]
    hint = "are the numbers of a patch in the weight's order (channel, row, column), bias and position added?"
    check(not wrong, f"the tokens {wrong} are wrong, the others right: {hint}")


def test_each_patch_is_one_token_row_by_row():
    """A single bright pixel, in patch 1 of row 1 of a grid of 2 x 3: token 1 + 3 + 1 sees it, and no other."""
    images = torch.zeros(1, 3, 4, 6)
    images[0, 2, 2, 3] = 1.0
    weight, zeros = torch.ones(1, 3, 2, 2), torch.zeros(1, 7, 1)
    got = embed_patches(images, weight, torch.zeros(1), zeros[:, :1], zeros).flatten()
    seen = [token for token, value in enumerate(got.tolist()) if value]
    check(seen == [5], f"the bright pixel is in token 5, yours is in {seen}: are the patches row by row, after [CLS]?")


def test_the_numbers_of_a_patch_go_by_channel_row_column():
    """One bright pixel at a time, in an image of a single patch: which of the 12 weights does it meet?"""
    pixels, weight, zeros = torch.eye(12).view(12, 3, 2, 2), torch.arange(12.0).view(1, 3, 2, 2), torch.zeros(1, 2, 1)
    met = embed_patches(pixels, weight, torch.zeros(1), zeros[:, :1], zeros)[:, 1, 0].tolist()
    expected = [float(number) for number in range(12)]
    check(met == expected, f"order channel, row, column: pixels 0 to 11 should meet weights 0 to 11, yours meet {met}")


def test_there_is_no_convolution():
    positions = torch.ones(1, 5, 7)
    with TorchCalls() as calls:
        embed_patches(torch.ones(1, 3, 4, 4), torch.ones(7, 3, 2, 2), torch.ones(7), positions[:, :1], positions)
    check(not {"conv2d", "conv3d", "conv1d"} & set(calls.names), "use a matrix product, not a convolution")
