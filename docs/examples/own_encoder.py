"""An image encoder of one's own in the place of the ViT: any net that makes a feature map.

    python -m docs.examples.own_encoder 300

Here a small convolutional net with random weights, frozen, and stage 1 over it in the shapes world: two minutes.
A net that has seen images gets its weights before `Blip2` is made; `model.unfreeze_vit()` trains it as well.
"""

import sys
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from blip2 import TINY, Blip2
from data import StepSampler, TrainSet, collate_for, train_loader
from sources.mixture import open_images
from sources.text import BertTokenizer
from weights.open import load_bert


class Encoder(nn.Module):
    """uint8 images (B, 3, H, W) -> tokens (B, h * w, V), row by row; net: to a map (B, V, h, w), from -1 to 1."""

    def __init__(self, net: nn.Module, width: int, image_size: int, tokens: int):
        super().__init__()
        self.net, self.cfg = net, SimpleNamespace(width=width, image_size=image_size)
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, width) / 4)  # where a token is, the queries cannot tell

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.pos_embed.dtype) / 127.5 - 1  # the encoder normalises, nothing else does
        return self.net(x).flatten(2).transpose(1, 2) + self.pos_embed


def build(width: int = 96, image_size: int = 64) -> Blip2:
    """Stage 1 over it, with the tiny BERT."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.GELU(), nn.Conv2d(width, width, 2, stride=2))
    encoder = Encoder(net, width, image_size, tokens=(image_size // 8) ** 2)
    qformer, _, _ = load_bert(str(TINY / "bert"), image_width=width, num_queries=8, dropout=0.0)
    return Blip2(encoder, qformer, BertTokenizer(TINY / "bert"), image_size, embed_dim=64)


def train(model: Blip2, steps: int) -> None:
    """Stage 1; `model.save_pretrained(folder)` keeps what was trained, `build().load_trained(folder)` takes it up."""
    images, optimizer = open_images(["shapes"], "train", model.image_size), torch.optim.AdamW(model.parameters(), 1e-3)
    train_set = TrainSet(images, collate_for("1", model), model.image_size, seed=0)
    sampler = StepSampler(images, seed=0, batch=32, accumulate=1, steps=steps, start=0, rank=0, world=1)
    for step, batch in enumerate(train_loader(train_set, sampler, workers=0, pin=False), 1):
        losses = model.stage1_losses(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}/{steps}", *(f"{name} {loss:.3f}" for name, loss in losses.items()))


if __name__ == "__main__":
    train(model := build().train(), int(sys.argv[1]))
    print(model.eval().caption(TINY / "picture.png"))
