"""Exercise 2, queries: write the core of the cross-attention, by which the queries read the image.

Each head compares K columns of a query with the same columns of every image token. The softmax of the scaled products
says how much each image token counts, and the result is a weighted mean of the values.

Where to look: `qformer.CrossAttention`, paper Figure 2 (left).
"""

import pytest
import torch

from course.adapters import attend
from course.exercises.helpers import TorchCalls
from qformer import CrossAttention, QFormerConfig

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_2]


@pytest.mark.parametrize("seed, heads, width", [(0, 1, 6), (1, 3, 12), (2, 4, 8)])
def test_it_is_the_core_of_the_q_formers_cross_attention(seed, heads, width):
    torch.manual_seed(seed)
    module = CrossAttention(QFormerConfig(width=width, heads=heads, image_width=5)).eval()
    queries, image_tokens = torch.randn(2, 3, width), 3 * torch.randn(2, 7, 5)
    k, v = module.kv(image_tokens).chunk(2, dim=2)
    got = attend(module.q(queries), k, v, heads)
    assert got.shape == queries.shape, f"got {tuple(got.shape)}, expected (B, Q, D) = {tuple(queries.shape)}"
    expected = module(queries, module.image_kv(image_tokens))
    torch.testing.assert_close(module.ln(queries + module.proj(got)), expected)


def test_a_head_reads_its_own_columns_and_the_scale_is_that_of_its_width():
    """Two heads of K = 4 columns. Head 1's scores are 0, its result is the mean; head 0's are 4 / sqrt(4) and 0."""
    q, k = torch.zeros(1, 1, 8), torch.zeros(1, 2, 8)
    q[..., :4], k[0, 0, :4] = 1.0, 1.0
    v = torch.tensor([1.0, 0.0])[None, :, None].expand(1, 2, 8)
    right = torch.tensor([2.0, 0.0]).softmax(dim=0)[0].item()
    assert attend(q, k, v, 2)[0, 0].tolist() == pytest.approx([right] * 4 + [0.5] * 4)


def test_the_image_tokens_are_a_set_and_so_are_the_queries():
    """Another order of the image tokens changes nothing; the queries do not see each other here."""
    q, k, v = torch.randn(2, 4, 6), torch.randn(2, 9, 6), torch.randn(2, 9, 6)
    whole, order = attend(q, k, v, 2), torch.randperm(9)
    torch.testing.assert_close(attend(q, k[:, order], v[:, order], 2), whole)
    torch.testing.assert_close(attend(q[:, 1:2], k, v, 2), whole[:, 1:2])


def test_it_is_written_by_hand():
    with TorchCalls() as calls:
        attend(torch.ones(1, 2, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 4), 2)
    assert not {"scaled_dot_product_attention", "multi_head_attention_forward"} & set(calls.names)
