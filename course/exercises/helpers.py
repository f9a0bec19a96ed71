"""For several exercises: failures in one sentence, the torch functions called, drawings of masks, a small model."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from data import Batch, qformer_batch
from model import Blip2Model
from qformer import QFormer, QFormerConfig


class TorchCalls(TorchFunctionMode):
    """Collects in `names` the torch functions that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def check(right: bool, sentence: str) -> None:
    """Fail with a sentence alone: no traceback, no tensors."""
    if not right:
        pytest.fail(sentence, pytrace=False)


def assert_same_mask(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Both bool (B, 1, S, S); if they differ, the first text that differs is drawn with both masks side by side."""
    assert got.dtype == torch.bool, f"got a mask of {got.dtype}, expected torch.bool, True = may attend"
    assert got.shape == expected.shape, f"got shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    for text, (mine, right) in enumerate(zip(got[:, 0].tolist(), expected[:, 0].tolist())):
        rows = [["".join(".#"[cell] for cell in row) for row in mask] for mask in (right, mine)]
        drawn = [f"{a}    {b}{'' if a == b else '   <'}" for a, b in zip(*rows)]
        assert mine == right, "\n".join([f"{what}, text {text}: expected, then yours", *drawn])


def small_qformer(image_width: int = 10) -> QFormer:
    """Three queries, two blocks; in eval mode: no dropout."""
    sizes = dict(vocab_size=30, width=16, depth=2, heads=4, mlp=24, max_positions=20, num_queries=3)
    return QFormer(QFormerConfig(**sizes, image_width=image_width, init_std=0.1)).eval()


def small_model(encoder: torch.nn.Module) -> Blip2Model:
    """A stage-1 model over the encoder, for images of 32 x 32 pixels."""
    return Blip2Model(encoder, small_qformer(encoder.cfg.width), image_size=32, embed_dim=8).eval()


def small_batch(count: int) -> Batch:
    """Images of 2 x 2 patches of random colours, with texts of random words and lengths."""
    lengths = torch.randint(3, 8, (count,)).tolist()
    texts = [[2, *torch.randint(5, 29, (n,)).tolist(), 3] for n in lengths]
    colours = torch.randint(0, 256, (count, 3, 2, 2), dtype=torch.uint8)
    images = colours.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    return qformer_batch(texts, 0, list(range(count)), images=images)
