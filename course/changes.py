"""What the experiments of `course/lab.py` change in the product, each in a few lines: a patch, undone after the run.

No flag of the product stands behind them: a change is seen best as a difference from what is right.
"""

from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

import blip2
import model
import qformer
import train
import weights.open
from model import Blip2Model
from qformer import Block, QFormer, QueryCache
from weights.configs import vit_config
from weights.load import weight_files

# --- masks -----------------------------------------------------------------------------------------------------------


def leak_itg():
    """ITG's text may look ahead, as under ITM's mask: it sees the tokens that it is to predict."""
    mask = qformer.qformer_mask
    return patch.object(qformer, "qformer_mask", lambda kind, *rest: mask("itm" if kind == "itg" else kind, *rest))


def leak_itc():
    """ITC's queries and text see each other, as under ITM's mask: each feature knows its partner."""

    def encode(self, image_kv, batch):
        self.qformer.encode_queries(image_kv, cache := QueryCache())  # for ITG, which is as it was
        query_out, text_out = self.qformer("itm", batch.text_ids, batch.text_mask, image_kv)
        return self.image_feats(query_out), self.text_feats(text_out[:, 0]), cache

    return patch.object(Blip2Model, "encode", encode)


# --- ITC and ITM -----------------------------------------------------------------------------------------------------


def temperature_1():
    """ITC's temperature is 1 from the second step on (it is clamped after each): cosines are the logits."""
    return patch.object(train, "TEMPERATURES", (1.0, 1.0))


@contextmanager
def mean_over_queries():
    """ITC compares a text with the mean of its cosines with the queries, not with the highest."""

    def similarity(image_feats, text_feats, image_feats_all, text_feats_all, temperature):
        sim_i2t = image_feats.float().mean(dim=1) @ text_feats_all.float().T
        sim_t2i = text_feats.float() @ image_feats_all.float().mean(dim=1).T
        return sim_i2t / temperature, sim_t2i / temperature

    with patch.object(model, "itc_similarity", similarity), patch.object(blip2, "itc_similarity", similarity):
        yield


def random_negatives():
    """ITM's negatives are drawn uniformly, not by ITC's similarity."""
    return patch.object(train, "hardness_at", lambda step, cfg: 0.0)


# --- the Q-Former ----------------------------------------------------------------------------------------------------


def zero_queries():
    """The queries start at zero, as many do by habit, instead of N(0, 0.02)."""
    init = QFormer.init_weights

    def init_weights(self, names=None):
        init(self, names)
        if names is None or "queries" in names:
            self.queries.data.zero_()

    return patch.object(QFormer, "init_weights", init_weights)


def one_feed_forward():
    """Queries go through the text's feed-forward; they have none of their own."""

    def forward(self, x, num_queries, mask, image_kv, cache):
        x = self.attn(x, mask, cache)
        queries, text = x.split((num_queries, x.shape[1] - num_queries), dim=1)
        if num_queries and self.cross is not None:
            queries = self.cross(queries, image_kv)
        return self.ffn_text(torch.cat((queries, text), dim=1))

    return patch.object(Block, "forward", forward)


# --- the image -------------------------------------------------------------------------------------------------------


def last_block():
    """The ViT keeps its last block, which BLIP-2 drops (paper 3.4)."""

    def find_vit(spec):
        return *vit_config(Path(spec)), weight_files(Path(spec))

    return patch.object(weights.open, "find_vit", find_vit)


def blank_images():
    """Every image is plain grey, in training and in the evaluation: what the texts alone teach."""
    tokens = Blip2Model.image_tokens
    return patch.object(Blip2Model, "image_tokens", lambda self, images: tokens(self, torch.full_like(images, 178)))
