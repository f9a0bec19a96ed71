"""Exercise 8, stage 2: the loss of a caption, given a soft visual prompt, by a frozen decoder-only language model.

    sequence     v1    v2    v3    BOS   a     red   star
    prediction   -     -     -     a     red   star  -

The visual embeddings stand where words would; the model predicts the caption and nothing else.

Where to look: paper 3.3 and Figure 3 (top); `llm.OPT.forward`, which has the prompt as well.
"""

import pytest
import torch
from torch import nn

from course.adapters import caption_loss
from llm import OPT, OPTConfig

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_8]

BOS = 2


class TinyLM(nn.Module):
    """A small OPT with the interface of the exercise, frozen."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.opt = OPT(OPTConfig(vocab_size=20, width=8, depth=2, heads=2, mlp=16, max_positions=32, embed_width=8))
        self.opt.init_weights()
        self.requires_grad_(False).eval()

    def embed(self, ids):
        return self.opt.embed(ids)

    def forward(self, x):
        return self.opt.logits(self.opt.read(x, torch.ones(x.shape[:2], dtype=torch.bool)))


def by_hand(lm: TinyLM, visual: torch.Tensor, caption: list[int]) -> list[float]:
    """-log p of each token of one caption, predicted from all that precedes it."""
    found = []
    for i, token in enumerate(caption):
        before = lm.embed(torch.tensor([[BOS, *caption[:i]]]))
        logits = lm(torch.cat((visual[None], before), dim=1))
        found.append(-logits[0, -1].log_softmax(dim=0)[token].item())
    return found


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_mean_over_the_tokens_of_all_captions(seed):
    """Of three captions of different lengths, token by token."""
    lm = TinyLM(seed)
    visual, captions = torch.randn(3, 4, 8), torch.randint(3, 20, (3, 5))
    lengths = torch.tensor([5, 2, 3])[torch.randperm(3)]
    expected = [by_hand(lm, v, ids[:n].tolist()) for v, ids, n in zip(visual, captions, lengths)]
    got = caption_loss(lm, visual, captions, torch.arange(5) < lengths[:, None], BOS)
    assert got.item() == pytest.approx(sum(map(sum, expected)) / 10, rel=1e-4)


def test_what_stands_in_the_padding_does_not_count():
    lm, visual, mask = TinyLM(0), torch.randn(1, 3, 8), torch.tensor([[True, True, False, False]])
    found = [caption_loss(lm, visual, torch.tensor([[5, 6, *rest]]), mask, BOS) for rest in ([1, 1], [7, 8])]
    torch.testing.assert_close(*found)


def test_the_gradient_goes_through_the_frozen_model_to_every_visual_embedding():
    lm, visual = TinyLM(0), torch.randn(2, 3, 8, requires_grad=True)
    caption_loss(lm, visual, torch.randint(3, 20, (2, 4)), torch.ones(2, 4, dtype=torch.bool), BOS).backward()
    assert (visual.grad.abs().sum(dim=2) > 0).all()
    assert all(parameter.grad is None for parameter in lm.parameters())


def test_the_language_model_runs_once_on_as_few_positions_as_needed():
    """Q + 1 + T positions, or one less: nothing reads the output of the last token."""
    lm, lengths = TinyLM(0), []
    lm.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    caption_loss(lm, torch.randn(2, 3, 8), torch.randint(3, 20, (2, 4)), torch.ones(2, 4, dtype=torch.bool), BOS)
    assert lengths in ([7], [8]), f"got calls with {lengths} positions, expected one with 3 + 1 + 4 or one less"
