"""Paper 3.4: the frozen encoders, their second-last block, any image size; equality with transformers."""

import json

import pytest
import torch
from conftest import roughen
from safetensors.torch import save_file

from vit import PRESETS, ViT, ViTConfig
from weights import load_vit, open_tensors, weight_files

SMALL = dict(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24, patch_size=4, image_size=16
)


@pytest.mark.parametrize("name, expected", [("eva-g", 985_894_528), ("clip-l", 290_581_504)])
def test_paper_encoders_have_the_originals_parameters(name, expected):
    with torch.device("meta"):
        vit = ViT(PRESETS[name])
    assert sum(p.numel() for p in vit.parameters()) == expected


def random_peer(kind: str, folder):
    """transformers' model of a kind, random, saved as a hub serves it; and ours, all blocks, loaded from there."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    if kind == "dinov2":
        sizes = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
        peer = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=2))
    elif kind == "clip":
        peer = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL))
    else:
        peer = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**SMALL))
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if kind == "blip2" and name.endswith("qkv.bias"):
                parameter[16:32] = 0  # as EVA-CLIP has no key bias
    peer.eval().save_pretrained(folder)
    return peer, load_vit(str(folder), last_block=kind != "blip2")[0]  # BLIP-2's is published without it


@pytest.mark.parametrize("kind", ["dinov2", "clip", "blip2"])
@pytest.mark.parametrize("size", [(16, 16), (24, 12), (8, 8)])
def test_equals_transformers(kind, size, tmp_path):
    """Every block's tokens; at other image sizes too where transformers resizes positions as the original does."""
    if kind == "clip" and size != (16, 16):
        pytest.skip("transformers resizes CLIP's positions with align_corners=False, the original with True")
    peer, vit = random_peer(kind, tmp_path)
    images = torch.randn(2, 3, *size)
    more = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = peer(images, output_hidden_states=True, **more).hidden_states
        torch.testing.assert_close(vit(images), expected[-1], rtol=0, atol=1e-5)
        if kind != "blip2":  # by default one block less, and no final norm (paper 3.4); BLIP-2's files lack it already
            torch.testing.assert_close(load_vit(str(tmp_path))[0](images), expected[-2], rtol=0, atol=1e-5)


def test_a_whole_blip2_folder_gives_its_encoder(tmp_path):
    """As the public ones are: the parts beside each other in one file, the encoder's sizes inside of the config."""
    _, vit = random_peer("blip2", tmp_path)
    tensors = {f"vision_model.{key}": tensor for key, tensor in open_tensors(weight_files(tmp_path)).items()}
    others = ("query_tokens", "qformer.layernorm.bias", "language_projection.bias", "language_model.layers.2.bias")
    save_file({**tensors, **{key: torch.ones(2) for key in others}}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip-2", "vision_config": config}))
    whole, account, _ = load_vit(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(vit.parameters(), whole.parameters(), strict=True))
    assert "4 ignored (the other parts of that model)" in account


def test_layer_scale_is_folded_away(tmp_path):
    """DINOv2's factors after each branch are in the Linears: the same function, as the test above shows."""
    peer, vit = random_peer("dinov2", tmp_path)
    theirs = peer.encoder.layer[1]
    expected = theirs.mlp.fc2.weight * theirs.layer_scale2.lambda1[:, None]
    torch.testing.assert_close(vit.blocks[1].fc2.weight, expected)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (8, 5), (2, 3), (1, 1)])
def test_positions_fit_any_grid(align_corners, grid):
    """A table that grows linearly along rows and columns does so on any grid, within the bicubic's error at the rim."""
    vit = ViT(ViTConfig(2, depth=0, heads=1, mlp=2, patch_size=4, image_size=32, align_corners=align_corners))
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    with torch.no_grad():
        vit.pos_embed[0, 0] = torch.tensor([7.0, -7.0])
        vit.pos_embed[0, 1:] = torch.stack((y, x), dim=-1).view(64, 2)
    table = vit.positions(*grid)
    assert table.shape == (1, 1 + grid[0] * grid[1], 2)
    assert table[0, 0].tolist() == [7, -7]
    rows = table[0, 1:].view(*grid, 2)
    assert torch.allclose(rows[:, :, 0], rows[:, :1, 0]) and torch.allclose(rows[:, :, 1], rows[:1, :, 1])
    if grid[0] > 1:
        torch.testing.assert_close(rows[:, :, 0], -rows.flip(0)[:, :, 0], rtol=0, atol=1e-5)
        steps = rows[1:, 0, 0] - rows[:-1, 0, 0]
        assert (steps > 0).all()
        if align_corners:  # corners stay at the corners
            torch.testing.assert_close(rows[[0, -1], 0, 0], torch.tensor([-1.0, 1.0]))


def test_image_normalisation_by_hand():
    vit = ViT(ViTConfig(8, 1, 2, 8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3)))
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.1) / 0.5, (128 / 255 - 0.2) / 0.4, (1 - 0.3) / 0.3]
    torch.testing.assert_close(vit.normalize(pixels).flatten(), torch.tensor(expected))
    assert pixels.flatten().tolist() == [0, 128, 255]  # the caller's tensor is left alone


def test_uint8_and_normalised_images_give_the_same():
    vit = roughen(ViT(ViTConfig(8, 2, 2, 8, patch_size=4, image_size=8)))
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(vit(pixels), vit(vit.normalize(pixels)))


def test_gradient_checkpointing_changes_nothing():
    vit = roughen(ViT(ViTConfig(8, 2, 2, 8, patch_size=4, image_size=8)))
    images, grads = torch.randn(2, 3, 8, 8), []
    for vit.grad_checkpointing in (False, True):
        vit.zero_grad()
        vit(images).square().sum().backward()
        grads.append([p.grad.clone() for p in vit.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_odd_image_size_is_refused_with_a_size_that_fits():
    vit = ViT(ViTConfig(8, 1, 2, 8, patch_size=14, image_size=28))
    with pytest.raises(ValueError, match="225 x 30 .* multiples of the patch size 14: resize to 224 x 28"):
        vit(torch.zeros(1, 3, 225, 30))
