"""CLIP, both towers, from a folder of transformers' CLIPModel: how well does a text say what an image shows?

The paper ranks captions by CLIP ViT-L/14 (3.4). The image tower is `vit.ViT` with the last block, which BLIP-2 drops;
the text tower is small enough to stand here. Letters: see the glossary of qformer.py; E is the shared embedding.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from blip2 import chunked
from engine.device import vit_dtype
from engine.errors import expect
from sources.images import to_tensor
from sources.text import open_tokenizer, pad, truncate
from vit import Attention, Block, ViT, ViTConfig
from weights.configs import CLIP_FIELDS, Fields, as_object, read_config, read_fields, vit_config
from weights.load import weight_files
from weights.open import fill
from weights.runs import Source
from weights.tables import CLIP_TOWERS

TEXT_FIELDS: Fields = {name: CLIP_FIELDS[name] for name in ("act", "eps")} | {
    "width": ("hidden_size", 512),
    "depth": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 8),
    "mlp": ("intermediate_size", 2048),
    "vocab_size": ("vocab_size", 49408),
    "max_positions": ("max_position_embeddings", 77),
}


def is_clip(folder: str | Path) -> bool:
    """Is it a folder of a CLIPModel?"""
    folder = Path(folder)
    return (folder / "config.json").is_file() and read_config(folder).get("model_type") == "clip"


def clip_transform(image: Image.Image, size: int) -> Tensor:
    """CLIP's own: bicubic, the shorter side to `size`, then the middle -> uint8 (3, size, size)."""
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_tensor(image.crop((left, top, left + size, top + size)))


@dataclass(frozen=True)
class ClipConfig:
    """Both towers. Of `text`, which has no patches, only the fields of its blocks count."""

    vision: ViTConfig
    text: ViTConfig
    vocab_size: int
    max_positions: int
    embed_dim: int


class CausalAttention(Attention):
    """Of a text: each token sees those before it."""

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))
        x = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)  # (M, H, T, K)
        return self.proj(x.transpose(1, 2).flatten(2))


class TextTower(nn.Module):
    """Pre-norm blocks over token and position embeddings; the output is that of the end token."""

    def __init__(self, cfg: ClipConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.text.width)
        self.position_embedding = nn.Embedding(cfg.max_positions, cfg.text.width)
        self.blocks = nn.ModuleList(Block(cfg.text) for _ in range(cfg.text.depth))
        for block in self.blocks:
            block.attn = CausalAttention(cfg.text)
        self.norm = nn.LayerNorm(cfg.text.width, eps=cfg.text.eps)
        self.proj = nn.Linear(cfg.text.width, cfg.embed_dim, bias=False)

    def forward(self, ids: Tensor, end_id: int) -> Tensor:
        """(M, T), padded after the end token, which alone is read -> (M, E)."""
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        ends = (ids == end_id).int().argmax(dim=1)  # the first
        return self.proj(self.norm(x[torch.arange(len(ids), device=ids.device), ends]))


class Features(NamedTuple):
    """Unit vectors: of images (N, 1, E), as of a single query; of texts (M, E)."""

    feats: Tensor


class Clip(nn.Module):
    """Both towers, frozen; `Clip.open` reads them."""

    llm, untrained_heads, sources = None, ("itm", "itg"), {"vit": Source("CLIP")}  # as `Blip2` says what it has

    def __init__(self, cfg: ClipConfig):
        super().__init__()
        self.cfg, self.image_size, self.tokenizer, self.end_id = cfg, cfg.vision.image_size, None, 0
        self.vit, self.text = ViT(cfg.vision), TextTower(cfg)
        self.vision_norm = nn.LayerNorm(cfg.vision.width, eps=cfg.vision.eps)
        self.vision_proj = nn.Linear(cfg.vision.width, cfg.embed_dim, bias=False)

    @classmethod
    def open(cls, path: str | Path, device: str | torch.device = "cpu", precision: str = "fp32") -> "Clip":
        """Read config.json, the weights and tokenizer.json of a folder; UserError if they do not fit."""
        folder = Path(path)
        there = (folder / "tokenizer.json").exists()
        expect(there, f"{folder} has no tokenizer.json, which knows how CLIP cuts words: fetch it into the folder")
        config, where = read_config(folder), folder / "config.json"
        text = read_fields(TEXT_FIELDS, as_object(config.get("text_config", {}), where), f"text_config in {where}")
        tables = [text.pop(name) for name in ("vocab_size", "max_positions")]
        sizes = read_fields({"embed_dim": ("projection_dim", 512)}, config, where)
        cfg = ClipConfig(vit_config(folder)[0], ViTConfig(**text), *tables, **sizes)
        dtype = vit_dtype(precision, device)
        clip, _ = fill(cls, cfg, weight_files(folder), CLIP_TOWERS, f"CLIP {folder}", dtype, device)
        clip.tokenizer = open_tokenizer(folder)
        words, clip.end_id = clip.tokenizer.get_vocab_size(), clip.tokenizer.encode("a").ids[-1]
        got = f"{folder} has a tokenizer of {words} words and weights of {cfg.vocab_size}, expected no more words"
        expect(words <= cfg.vocab_size, f"{got}: use the model's own tokenizer")
        return clip.requires_grad_(False).eval()

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Features:
        """uint8 (N, 3, size, size) of `clip_transform` -> feats (N, 1, E)."""
        cls = self.vit(images.to(self.vit.pos_embed.device))[:, :1]
        return Features(F.normalize(self.vision_proj(self.vision_norm(cls)).float(), dim=-1))

    @torch.no_grad()
    def encode_text(self, texts: list[str], batch_size: int = 256) -> Features:
        """-> feats (M, E). Longer ones than the position table are cut, and keep the end token."""
        limit, parts = self.cfg.max_positions, []
        for batch in chunked(self.tokenizer.encode_batch(texts), batch_size):
            ids, _ = pad([truncate(text.ids, limit, [self.end_id]) for text in batch], self.end_id, multiple=1)
            parts.append(self.text(ids.to(self.vit.pos_embed.device), self.end_id))
        return Features(F.normalize(torch.cat(parts).float(), dim=-1))
