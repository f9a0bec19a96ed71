"""Paper 3.4: the image encoder is a ViT without its last block, for images of any size; it computes what transformers
computes."""

import json

import pytest
import torch
from conftest import roughen
from safetensors.torch import save_file

from vit import PRESETS, ViT, ViTConfig
from weights.load import no_init, open_tensors, weight_files
from weights.open import load_vit

SMALL = dict(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24, patch_size=4, image_size=16
)


@pytest.mark.parametrize("name, expected", [("eva-g", 985_894_528), ("clip-l", 290_581_504)])
def test_the_encoders_of_the_paper_have_the_parameters_of_lavis(name, expected):
    with torch.device("meta"), no_init():
        vit = ViT(PRESETS[name])
    assert sum(p.numel() for p in vit.parameters()) == expected


# --- the same function as transformers' encoders ---------------------------------------------------------------------


def random_peer(kind: str, folder) -> tuple[torch.nn.Module, ViT]:
    """A random encoder of transformers, saved as a hub serves it, and ours, opened from there."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    own = {"clip b16": {"patch_size": 16, "image_size": 64}, "clip b32": {"patch_size": 32, "image_size": 64}}
    own |= {"siglip odd": {"patch_size": 14, "image_size": 34}}  # 6 pixels over, as in so400m-patch14-384
    sizes = SMALL | own.get(kind, {})
    if kind.startswith("dinov2"):
        sizes = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
        sizes |= dict(mlp_ratio=2, use_swiglu_ffn=kind == "dinov2 giant")
        peer = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    elif kind.startswith("clip"):
        peer = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    elif kind.startswith("siglip"):
        peer = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
    else:
        peer = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**sizes))
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if kind == "blip2" and name.endswith("qkv.bias"):
                parameter[16:32] = 0  # EVA-CLIP has no key bias
    peer.eval().save_pretrained(folder)
    return peer, load_vit(str(folder))[0]


@pytest.mark.parametrize("kind, size", [
    ("dinov2", (16, 16)), ("dinov2", (24, 12)), ("dinov2", (8, 8)),
    ("blip2", (16, 16)), ("blip2", (24, 12)), ("blip2", (8, 8)),
    ("clip", (16, 16)),  # transformers resizes CLIP's positions with align_corners=False, LAVIS with True
    ("clip b16", (64, 64)), ("clip b32", (64, 64)),
    ("dinov2 giant", (16, 16)), ("dinov2 giant", (24, 12)),
    ("siglip", (16, 16)), ("siglip", (24, 12)), ("siglip", (8, 8)),
    ("siglip odd", (34, 34)), ("siglip odd", (28, 28)), ("siglip odd", (42, 34)),
])  # fmt: skip
def test_the_output_is_that_of_the_second_last_block_of_transformers(kind, size, tmp_path):
    """Paper 3.4: "we remove the last layer of the ViT", and with it the final norm. BLIP-2's files are published
    without that layer."""
    peer, vit = random_peer(kind, tmp_path)
    images, blocks = torch.randn(2, 3, *size), 3 if kind == "blip2" else 2
    more = {} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = peer(images, output_hidden_states=True, **more).hidden_states
        assert (len(vit.blocks), len(expected)) == (blocks, 4)  # the input of the first block is the first state
        torch.testing.assert_close(vit(images), expected[blocks], rtol=0, atol=1e-5)


def test_a_whole_blip2_folder_opens_as_its_encoder(tmp_path):
    """The public folders hold all parts in one file, and the encoder's sizes inside the config of the whole model."""
    _, vit = random_peer("blip2", tmp_path)
    tensors = {f"vision_model.{key}": tensor for key, tensor in open_tensors(weight_files(tmp_path)).items()}
    others = ("query_tokens", "qformer.layernorm.bias", "language_projection.bias", "language_model.layers.2.bias")
    save_file({**tensors, **{key: torch.ones(2) for key in others}}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip-2", "vision_config": config}))
    whole, report, _ = load_vit(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(vit.parameters(), whole.parameters(), strict=True))
    assert "4 ignored (the other parts of that model)" in report


def test_a_siglip_opens_alone_or_from_a_whole_model_under_the_keys_of_any_release(tmp_path):
    """Hubs serve the whole model; an encoder alone has `vision_model.` before its keys, in transformers 5 nothing."""
    _, vit = random_peer("siglip", tmp_path)
    assert (vit.cls_token, vit.cfg.mean, vit.cfg.std) == (None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    tensors = {f"vision_model.{key}": tensor for key, tensor in open_tensors(weight_files(tmp_path)).items()}
    config = json.loads((tmp_path / "config.json").read_text())
    whole = {"model_type": "siglip", "text_config": {}, "vision_config": config}
    text = {key: torch.ones(2) for key in ("text_model.head.bias", "logit_scale", "logit_bias")}
    for written, more in ((config, {}), (whole, text)):
        save_file(tensors | more, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(written))
        opened, report, _ = load_vit(str(tmp_path))
        assert all(torch.equal(a, b) for a, b in zip(vit.parameters(), opened.parameters(), strict=True))
        assert "13 ignored (the final norm and pooling, unused)" in report
        assert ("3 ignored (the text side and projections)" in report) == bool(more)
        assert report.endswith(f"; SigLIP's mean and std of pixels, as {tmp_path} names none")


def test_layer_scale_is_folded_into_the_linear_before_it(tmp_path):
    """DINOv2 scales the output of each branch; with the scale in the weights it is the same function, as the
    comparison with transformers shows."""
    peer, vit = random_peer("dinov2", tmp_path)
    theirs = peer.encoder.layer[1]
    expected = theirs.mlp.fc2.weight * theirs.layer_scale2.lambda1[:, None]
    torch.testing.assert_close(vit.blocks[1].fc2.weight, expected)


# --- images of any size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (8, 5), (2, 3), (1, 1)])
def test_positions_fit_any_grid(align_corners, cls, grid):
    """A table that grows linearly along rows and columns does so on any grid; [CLS] has no place and is kept."""
    cfg = ViTConfig(2, 0, 1, 2, patch_size=4, image_size=32, cls_token=cls, align_corners=align_corners)
    vit = ViT(cfg)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    with torch.no_grad():
        vit.pos_embed[0, :cls] = torch.tensor([7.0, -7.0])
        vit.pos_embed[0, cls:] = torch.stack((y, x), dim=-1).view(64, 2)
    table = vit.positions(*grid)
    assert table.shape == (1, cls + grid[0] * grid[1], 2)
    assert table[0, :cls].tolist() == [[7, -7]] * cls
    rows = table[0, cls:].view(*grid, 2)
    assert torch.allclose(rows[:, :, 0], rows[:, :1, 0]) and torch.allclose(rows[:, :, 1], rows[:1, :, 1])
    if grid[0] > 1:
        torch.testing.assert_close(rows[:, :, 0], -rows.flip(0)[:, :, 0], rtol=0, atol=1e-5)
        steps = rows[1:, 0, 0] - rows[:-1, 0, 0]
        assert (steps > 0).all()
        if align_corners:  # corners stay at the corners
            torch.testing.assert_close(rows[[0, -1], 0, 0], torch.tensor([-1.0, 1.0]))


def small_vit(**sizes) -> ViT:
    """A ViT of two blocks over 2 x 2 patches."""
    return roughen(ViT(ViTConfig(8, 2, 2, 8, patch_size=4, image_size=8, **sizes)))


def test_a_resized_position_table_gives_the_same_output_at_its_size_and_is_a_parameter():
    """Fine-tuning at another resolution trains the table of that resolution."""
    vit, images = small_vit(), torch.randn(2, 3, 12, 12)
    expected = vit(images)
    vit.resize_positions(12)
    assert vit.pos_embed.shape == (1, 1 + 3 * 3, 8) and vit.cfg.image_size == 12
    torch.testing.assert_close(vit(images), expected, rtol=0, atol=0)
    vit(images).square().sum().backward()
    assert vit.pos_embed.grad.abs().amax(dim=2).gt(0).all()
    vit.requires_grad_(False).resize_positions(8)
    assert not vit.pos_embed.requires_grad


@pytest.mark.parametrize("cls", [True, False])
def test_the_configuration_says_how_many_tokens_an_image_has(cls):
    vit = small_vit(cls_token=cls)
    for size in (4, 8, 12):
        assert vit(torch.zeros(1, 3, size, size)).shape[1] == vit.cfg.tokens(size) == cls + (size // 4) ** 2


def test_an_image_size_that_does_not_fit_is_refused_with_one_that_fits():
    """A multiple of the patch size fits, and the encoder's own size: siglip-so400m-patch14-384 has 6 pixels over."""
    cfg = PRESETS["siglip-so400m"]
    assert [cfg.fitting(side) for side in (384, 378, 380, 1)] == [384, 378, 378, 14] and cfg.tokens(384) == 27 * 27
    assert ViTConfig(8, 1, 2, 8, patch_size=14, image_size=7).fitting(7) == 14  # not even one patch
    vit = ViT(ViTConfig(8, 1, 2, 8, patch_size=14, image_size=28))
    with pytest.raises(ValueError, match="225 x 30 .* multiples of the patch size 14: resize to 224 x 28"):
        vit(torch.zeros(1, 3, 225, 30))


# --- pixels and memory -----------------------------------------------------------------------------------------------


def test_images_are_normalized_by_the_mean_and_deviation_of_the_encoder():
    """By hand; the caller's tensor is unchanged, and uint8 images are normalized by the encoder itself."""
    vit = small_vit(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.1) / 0.5, (128 / 255 - 0.2) / 0.4, (1 - 0.3) / 0.3]
    torch.testing.assert_close(vit.normalize(pixels).flatten(), torch.tensor(expected))
    assert pixels.flatten().tolist() == [0, 128, 255]
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(vit(pixels), vit(vit.normalize(pixels)))


def test_gradient_checkpointing_runs_each_block_twice_and_changes_no_gradient():
    vit, images, grads, runs = small_vit(), torch.randn(2, 3, 8, 8), [], []
    vit.blocks[0].register_forward_pre_hook(lambda *_: runs.append(vit.grad_checkpointing))
    for vit.grad_checkpointing in (False, True):
        vit.zero_grad()
        vit(images).square().sum().backward()
        grads.append([p.grad.clone() for p in vit.parameters()])
    assert runs == [False, True, True]
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


# --- the kernels of a GPU --------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_a_frozen_half_precision_encoder_on_a_gpu_computes_what_one_in_fp32_computes():
    """With cuDNN's attention and GELU in the product's epilogue (tanh form)."""
    torch.manual_seed(0)
    vit = roughen(ViT(ViTConfig(88 * 2, depth=4, heads=2, mlp=352, patch_size=14, image_size=56))).cuda().eval()
    images = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8, device="cuda")
    with torch.no_grad():
        exact, half = vit(images), vit.half()(images).float()
    assert (half - exact).norm() / exact.norm() < 5e-3
