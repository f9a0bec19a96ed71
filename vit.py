"""The image encoder: one plain pre-norm ViT for EVA-CLIP ViT-g/14, CLIP, DINOv2 and SigLIP.

Frozen in both stages; trained in fine-tuning, unless --freeze-vit.

Paper 3.4: "We remove the last layer of the ViT and use the second last layer's output features."
So a `ViT` lacks the published last block and the final norm, which the trained `ln_vision` of model.py replaces. It
returns all P = 1 + H/patch * W/patch tokens, [CLS] first; SigLIP has no [CLS].

In:  images (B, 3, H, W), uint8 or already normalised; H and W as `ViTConfig.fitting` says
Out: image tokens (B, P, V)

Left out on purpose: dropout and drop path (0 in every BLIP-2 recipe), and DINOv2's LayerScale, which the weight loader
folds into the Linear before it. Letters: see the glossary of qformer.py.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.kernels import activated, image_attention

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP = dict(cls_token=False, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of one encoder. `depth` counts the blocks of the `ViT`, one less than published."""

    width: int
    depth: int
    heads: int
    mlp: int
    patch_size: int = 14
    image_size: int = 224  # the (square) side that the position table was made for
    act: str = "gelu"  # exact (erf), or another of ACTIVATIONS
    eps: float = 1e-6
    cls_token: bool = True  # before the patches
    ln_pre: bool = False  # CLIP: LayerNorm before the first block
    conv_bias: bool = True
    key_bias: bool = True  # EVA has none; softmax cancels it anyway
    align_corners: bool = False  # when the position table is resized; CLIP: True, as in LAVIS
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def fitting(self, side: int) -> int:
        """The side of an image nearest to `side`: a multiple of the patch size, or its own (the rest is left out)."""
        own = side == self.image_size >= self.patch_size
        return side if own else max(1, round(side / self.patch_size)) * self.patch_size

    def tokens(self, side: int) -> int:
        """P of an image of side x side pixels."""
        return self.cls_token + (side // self.patch_size) ** 2


# The paper's two encoders (3.4), and others. Published depths are 40, 24, 12 and 27; the last block is dropped.
PRESETS = {
    "eva-g": ViTConfig(1408, depth=39, heads=16, mlp=6144, key_bias=False),  # 985,894,528 parameters
    "clip-l": ViTConfig(  # 290,581,504 parameters
        1024, depth=23, heads=16, mlp=4096, act="quick_gelu", eps=1e-5, ln_pre=True, conv_bias=False, align_corners=True
    ),
    "dinov2-s": ViTConfig(384, depth=11, heads=6, mlp=1536),
    "siglip-so400m": ViTConfig(1152, depth=26, heads=16, mlp=4304, image_size=384, act="gelu_pytorch_tanh", **SIGLIP),
}
ACTIVATIONS = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),  # SigLIP
    "swiglu": lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],  # DINOv2-giant, from twice `mlp`
}


class Attention(nn.Module):
    """Multi-head self-attention over all image tokens."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width, bias=False)
        # Three separate biases, because EVA-CLIP has no key bias.
        self.q_bias = nn.Parameter(torch.zeros(cfg.width))
        self.k_bias = nn.Parameter(torch.zeros(cfg.width)) if cfg.key_bias else None
        self.v_bias = nn.Parameter(torch.zeros(cfg.width))
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        B, P, V = x.shape
        k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, k_bias, self.v_bias)))
        q, k, v = qkv.view(B, P, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, H, P, K)
        x = image_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, P, V))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.fc1 = nn.Linear(cfg.width, cfg.mlp * (2 if cfg.act == "swiglu" else 1))
        self.fc2 = nn.Linear(cfg.mlp, cfg.width)
        self.act = ACTIVATIONS[cfg.act]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.fc2(activated(self.fc1, self.act, self.ln_2(x)))


class ViT(nn.Module):
    """Patches, [CLS], positions, blocks; no head and no final norm (paper 3.4)."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        self.grad_checkpointing = False  # activation checkpointing of each block: slower, less memory
        self.patch_embed = nn.Conv2d(3, cfg.width, cfg.patch_size, stride=cfg.patch_size, bias=cfg.conv_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width)) if cfg.cls_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.tokens(cfg.image_size), cfg.width))  # [CLS], then row by row
        self.ln_pre = nn.LayerNorm(cfg.width, eps=cfg.eps) if cfg.ln_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The usual N(0, 0.02) of ViTs, for encoders trained from scratch (tools/make_tiny.py)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.normal_(0, 0.02)
                if module.bias is not None:
                    module.bias.zero_()
        for table in self.parameters(recurse=False):  # [CLS] and positions
            table.normal_(0, 0.02)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the images are processed."""
        return self.pos_embed.dtype

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P, V). uint8 is normalised here, floats must be normalised."""
        B, _, height, width = images.shape
        patch, fit = self.cfg.patch_size, (self.cfg.fitting(height), self.cfg.fitting(width))
        if fit != (height, width):
            got = f"got images of {height} x {width} pixels, expected multiples of the patch size {patch}"
            raise ValueError(f"{got}: resize to {fit[0]} x {fit[1]}")
        images = self.normalize(images) if images.dtype == torch.uint8 else images
        x = self.patch_embed(images.to(self.dtype)).flatten(2).transpose(1, 2)  # (B, H/patch * W/patch, V)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(B, -1, -1), x), dim=1)
        x = self.ln_pre(x + self.positions(height // patch, width // patch))
        for block in self.blocks:
            again = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 with the encoder's own mean and standard deviation."""
        x = images.float()
        for channel, (mean, std) in enumerate(zip(self.cfg.mean, self.cfg.std)):  # Python floats: no copy to the device
            x[:, channel].sub_(255 * mean).div_(255 * std)
        return x

    @torch.no_grad()
    def resize_positions(self, image_size: int) -> None:
        """Resize the position table for good to another image size, for training at that size."""
        grid = image_size // self.cfg.patch_size
        self.pos_embed = nn.Parameter(self.positions(grid, grid).clone(), self.pos_embed.requires_grad)
        self.cfg = replace(self.cfg, image_size=image_size)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table for a grid of rows x columns patches: (1, P, V). For a grid other than its own, the
        patches' rows are resized bicubically in fp32 and the [CLS] row is kept."""
        grid = self.cfg.image_size // self.cfg.patch_size
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        cls_pos, patch_pos = self.pos_embed.tensor_split([int(self.cfg.cls_token)], dim=1)
        patch_pos = patch_pos.float().transpose(1, 2).unflatten(2, (grid, grid))  # (1, V, grid, grid)
        patch_pos = F.interpolate(patch_pos, size=(rows, columns), mode="bicubic", align_corners=self.cfg.align_corners)
        return torch.cat((cls_pos, patch_pos.flatten(2).transpose(1, 2).to(self.dtype)), dim=1)
