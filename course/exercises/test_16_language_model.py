"""Exercise 16, a new language model: write the smallest decoder that can stand behind the queries.

Stage 2 asks three things of a language model: its width, its word embeddings, and the logits of a target after a prompt
of embeddings. Nothing of the model has to change.

Where to look: the docstring of llm.py, `llm.OPT.forward`, every line of model.py that has `llm` in it. PyTorch's
`nn.TransformerEncoderLayer` with a causal mask is a decoder block (in its masks True = may not attend).
"""

import pytest
import torch

from course.adapters import SmallLM
from course.exercises.helpers import small_batch, small_model
from data import Batch
from losses import lm_loss
from vit import ViT, ViTConfig

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_16]


def language_model(seed: int = 0) -> SmallLM:
    torch.manual_seed(seed)
    return SmallLM(30, 16).eval()


def prompt_of(lm: SmallLM, *rows: list[int | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two visual embeddings, then words; None is padding -> prompt, mask."""
    ids = torch.tensor([[word or 1 for word in row] for row in rows])
    real = torch.tensor([[word is not None for word in row] for row in rows])
    visual = torch.randn(2, 16, generator=torch.Generator().manual_seed(5)).expand(len(rows), -1, -1)
    mask = torch.cat((torch.ones(len(rows), 2, dtype=torch.bool), real), dim=1)
    return torch.cat((visual, lm.embed(ids)), dim=1), mask


@torch.no_grad()
def test_the_shapes_that_the_model_expects():
    lm = language_model()
    prompt, mask = prompt_of(lm, [2, 7], [2, None])
    assert lm.width == 16 and lm.embed(torch.tensor([[1, 2, 3]])).shape == (1, 3, 16)
    assert lm(prompt, mask, torch.randint(0, 30, (2, 5))).shape == (2, 5, 30)
    assert lm(prompt, mask, torch.randint(0, 30, (2, 1))).shape == (2, 1, 30)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(2))
def test_a_token_changes_the_logits_of_later_tokens_only(seed):
    """Position t of the logits is about token t, which must not have been read."""
    lm, target = language_model(seed), torch.tensor([[5, 6, 7, 8]])
    prompt, mask = prompt_of(lm, [2, 9])
    for t in range(4):
        other = target.clone()
        other[0, t] = 20
        moved = (lm(prompt, mask, other) - lm(prompt, mask, target)).abs().amax(dim=2)[0] > 1e-6
        assert moved.tolist() == [position > t for position in range(4)], f"token {t} changes the wrong logits"


@torch.no_grad()
def test_every_part_of_the_prompt_counts():
    lm, target = language_model(), torch.tensor([[5, 6]])
    prompt, mask = prompt_of(lm, [2, 9])
    for position in range(4):
        other = prompt.clone()
        other[0, position] += torch.randn(16)
        assert not torch.allclose(lm(other, mask, target), lm(prompt, mask, target)), f"position {position} is not read"


@torch.no_grad()
def test_the_order_of_the_words_counts():
    lm, target = language_model(), torch.tensor([[5, 6, 7]])
    prompt, mask = prompt_of(lm, [9, 10, 11], [10, 9, 11])
    logits = lm(prompt, mask, target.expand(2, -1))
    assert not torch.allclose(logits[0], logits[1], atol=1e-4), "two words swapped change nothing: where are positions?"


@torch.no_grad()
@pytest.mark.parametrize("padded", [[None, 2, 9], [None, None, None, 2, 9], [2, None, 9]], ids=str)
def test_padding_in_the_prompt_is_invisible(padded):
    """Between the visual embeddings and the words, or amid these: how much there is of it changes no logit."""
    lm, target = language_model(), torch.tensor([[5, 6, 7]])
    expected = lm(*prompt_of(lm, [2, 9]), target)
    torch.testing.assert_close(lm(*prompt_of(lm, padded), target), expected, rtol=1e-4, atol=1e-5)


def test_it_learns_a_language_then_the_queries_learn_to_speak_it():
    """In 150 steps the language model learns to repeat the word of its prompt; then it is frozen behind the queries,
    which learn in 100 steps to say a word in its language for each of eight images."""
    lm, words = language_model(), torch.arange(5, 29)
    end, bos = torch.full_like(words, 3), torch.full_like(words, 2)
    prompt, target = torch.stack((words, bos), dim=1), torch.stack((words, words, words, end), dim=1)

    def train(module, loss_of) -> list[float]:
        found, optimizer = [], torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(150 if module is lm else 100):
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    found = train(lm, lambda: lm_loss(lm(lm.embed(prompt), prompt > 0, target), target))
    assert min(found) < 0.5, f"the language model's own loss stays above {min(found):.2f} of log 24 = 3.18"

    model = small_model(ViT(ViTConfig(10, depth=1, heads=2, mlp=20, patch_size=16, image_size=32)))
    model.add_llm(lm)
    before, images = [p.clone() for p in lm.parameters()], small_batch(8)
    bos, said = bos[:8, None], target[:8]
    batch = Batch(images.image_ids, said, prompt_ids=bos, prompt_mask=bos > 0, target_ids=said, images=images.images)
    found = train(model, lambda: model.stage2_losses(batch)["lm"])
    assert all(torch.equal(p, old) for p, old in zip(lm.parameters(), before)), "the language model is not frozen"
    assert min(found) < 0.5 * found[0], f"in stage 2 the loss goes from {found[0]:.2f} to {min(found):.2f} only"
