"""The numbers of LAVIS are reproduced: features, sampling probabilities, the three losses, and every gradient."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from safetensors import safe_open
from torch import Tensor

from blip2 import Blip2
from data import Batch
from losses import IGNORE, itc_similarity, negative_probabilities
from qformer import QFormer, QFormerConfig
from vit import ViT, ViTConfig
from weights.load import load
from weights.tables import LAVIS_STAGE1, LAVIS_VITS

GOLDEN = Path(os.environ.get("GOLDEN", SHARED / "golden/stage1_a.safetensors")).absolute()
pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason="no golden file: set GOLDEN to one (expected ../shared/golden/stage1_a.safetensors)"
)


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], Blip2, Batch]:
    """The tensors of the golden file, and the model and the batch that they are of."""
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        cfg = json.loads(file.metadata()["config"])
        vocab = json.loads(file.metadata()["vocab"])
    vit = ViT(
        ViTConfig(
            cfg["vit_dim"],
            depth=cfg["vit_depth"],
            heads=cfg["vit_heads"],
            mlp=cfg["vit_mlp"],
            patch_size=cfg["patch"],
            image_size=cfg["image"],
            key_bias=False,
        )
    )
    qformer = QFormer(
        QFormerConfig(
            vocab_size=len(vocab),
            width=cfg["hidden"],
            depth=cfg["layers"],
            heads=cfg["heads"],
            mlp=cfg["mlp"],
            max_positions=cfg["max_pos"],
            num_queries=cfg["queries"],
            image_width=cfg["vit_dim"],
            cross_every=cfg["freq"],
        )
    )
    model = Blip2(vit, qformer, tokenizer=None, image_size=cfg["image"], embed_dim=cfg["proj"]).eval()
    load(model, part(tensors, "w."), LAVIS_STAGE1, "golden weights")
    load(model.vit, part(tensors, "w."), LAVIS_VITS["eva-g"], "golden weights")
    ids, mask = tensors["in.text_ids"], tensors["in.text_mask"].bool()
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:], IGNORE)
    return tensors, model, Batch(torch.arange(len(ids)), labels, ids, mask, images=tensors["in.image"])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-5."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_features_scores_and_sampling_probabilities_are_those_of_lavis(golden):
    tensors, model, batch = golden
    with torch.no_grad():
        image_tokens = model.image_tokens(batch.images)
        assert_close(model.ln_vision(image_tokens), tensors["out.image_embeds"])
        image_kv = model.image_kv(image_tokens)
        query_out = model.qformer.encode_queries(image_kv)
        assert_close(query_out, tensors["out.query_output"])
        text_cls = model.qformer.encode_text(batch.text_ids, batch.text_mask)
        assert_close(text_cls, tensors["out.text_cls"])
        image_feats, text_feats = model.image_feats(query_out), model.text_feats(text_cls)
        assert_close(image_feats, tensors["out.image_feats"])
        assert_close(text_feats, tensors["out.text_feats"])
        query_out, _ = model.qformer("itm", batch.text_ids, batch.text_mask, image_kv)
        assert_close(model.itm_logits(query_out)[:, 1], tensors["out.itm_score"])
        sim_i2t, sim_t2i = itc_similarity(image_feats, text_feats, image_feats, text_feats, model.temperature)
        own = torch.eye(len(batch), dtype=torch.bool)
        assert_close(negative_probabilities(sim_t2i, own), tensors["out.neg_image_weights"])
        assert_close(negative_probabilities(sim_i2t, own), tensors["out.neg_text_weights"])


def test_losses_and_every_gradient_are_those_of_lavis(golden, monkeypatch):
    """With the hard negatives that LAVIS has drawn."""
    tensors, model, batch = golden
    found = torch.ones(len(batch), dtype=torch.bool)
    drawn = iter([(tensors["out.neg_image"], found), (tensors["out.neg_text"], found)])
    monkeypatch.setattr("losses.sample_hard_negatives", lambda *_: next(drawn))
    model.zero_grad()
    losses = model.stage1_losses(batch)
    for name, loss in losses.items():
        assert_close(loss, tensors[f"out.loss_{name}"])
    sum(losses.values()).backward()

    # The gradients have the keys of the weights, so the loader translates them.
    reference = copy.deepcopy(model)
    load(reference, part(tensors, "grad."), LAVIS_STAGE1, "golden gradients")
    reference = dict(reference.named_parameters())
    elements = beyond = 0
    for name, parameter in model.named_parameters():
        if name.startswith("vit."):
            assert parameter.grad is None
            continue
        expected, error = reference[name].detach(), (parameter.grad - reference[name]).abs()
        # Relative to the tensor's largest element. Element by element, fp32 is too coarse for the contrastive gradient,
        # a small difference of large terms: LAVIS's own numbers are up to six such tolerances away from fp64.
        assert error.max() <= 1e-4 * expected.abs().max() + 1e-7, f"{name}: off by {error.max():.2e}"
        elements += error.numel()
        beyond += (error > 1e-4 * expected.abs() + 1e-7).sum().item()
    assert beyond <= 0.01 * elements, f"{beyond} of {elements} elements are further off than 1e-4 of themselves"
