"""Paper 3.1: the Q-Former's parts and size, its equality with transformers' implementation and with BERT; the kernels
it computes with are PyTorch's functions."""

import pytest
import torch
import torch.nn.functional as F
from conftest import small_qformer

from engine.kernels import LayerNorm, Linear, attention, cross_attention, dropout, shared_attention
from qformer import QFormer, QFormerConfig, copy_text_ffn_to_queries
from weights.load import load, no_init
from weights.tables import BERT, HF_QFORMER

# --- its parts -------------------------------------------------------------------------------------------------------


def test_cross_attention_is_in_every_other_block():
    """Paper 3.1: "inserted every other transformer block"."""
    model = small_qformer(depth=5)
    assert [block.cross is not None for block in model.blocks] == [True, False, True, False, True]
    assert [block.cross is not None for block in small_qformer(cross_every=3, depth=5).blocks] == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("image_width, expected", [(1408, 186_282_811), (1024, 182_743_867)])
def test_the_paper_sized_qformer_has_the_parameters_of_lavis(image_width, expected):
    with torch.device("meta"), no_init():
        model = QFormer(QFormerConfig(image_width=image_width))
    assert sum(p.numel() for p in model.parameters()) - model.queries.numel() == expected
    assert model.queries.shape == (1, 32, 768)


def test_queries_start_small_but_not_at_zero():
    """From 0, the gradient through the first LayerNorm would be 1e6 times too large."""
    torch.manual_seed(0)
    model = QFormer(QFormerConfig(50, 64, 2, 4, 128, 20, 32, 24))
    assert 0.018 < model.queries.std() < 0.022
    model.encode_queries(model.image_kv(torch.randn(2, 5, 24))).square().sum().backward()
    assert model.queries.grad.norm() < 1e5


def test_the_query_feed_forward_starts_as_a_copy_of_the_text_feed_forward():
    """Paper 3.1: "initialize Q-Former with the pre-trained weights of BERT"."""
    model = small_qformer()
    assert not torch.equal(model.blocks[0].ffn_query.up.weight, model.blocks[0].ffn_text.up.weight)
    copy_text_ffn_to_queries(model)
    for block in model.blocks:
        for theirs, ours in zip(block.ffn_text.parameters(), block.ffn_query.parameters(), strict=True):
            assert torch.equal(theirs, ours) and theirs is not ours


def test_queries_and_text_have_a_feed_forward_each():
    model = small_qformer()
    ids, mask = torch.randint(5, 29, (1, 4)), torch.ones(1, 4, dtype=torch.bool)
    image_kv = model.image_kv(torch.randn(1, 4, 10))
    query, text = model("itc", ids, mask, image_kv)
    with torch.no_grad():
        for block in model.blocks:
            block.ffn_text.down.weight.mul_(2)
    other_query, other_text = model("itc", ids, mask, image_kv)
    assert torch.equal(query, other_query) and not torch.allclose(text, other_text)


def test_the_output_matrix_of_the_lm_head_is_the_word_embedding():
    model = small_qformer()
    hidden = torch.randn(2, 16)
    before = model.lm_logits(hidden)
    with torch.no_grad():
        model.word_embedding.weight[7].add_(1)
    moved = (model.lm_logits(hidden) != before).any(dim=0)
    assert moved.nonzero().flatten().tolist() == [7]


def test_a_text_that_is_too_long_is_refused():
    model = small_qformer()
    with pytest.raises(ValueError, match="got 21 tokens, expected at most 20, BERT's position table"):
        model.encode_text(torch.zeros(1, 21, dtype=torch.long), torch.ones(1, 21, dtype=torch.bool))


# --- the same function as transformers' Q-Former and BERT ------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_it_computes_what_the_qformer_of_transformers_computes(seed):
    """Queries and text in one bi-directional pass (ITM), and queries alone (ITC), over the same weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Blip2QFormerConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=20,
        encoder_hidden_size=10,
        cross_attention_frequency=2,
        use_qformer_text_input=True,
    )
    torch.manual_seed(seed)
    theirs = transformers.Blip2QFormerModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = small_qformer(seed, num_queries=5)
    load(ours, theirs.state_dict(), HF_QFORMER, "transformers' Q-Former")

    ids, mask, tokens = torch.randint(5, 29, (2, 6)), torch.ones(2, 6, dtype=torch.bool), torch.randn(2, 7, 10)
    mask[1, 4:] = False
    image_kv, queries = ours.image_kv(tokens), ours.queries.expand(2, -1, -1)
    with torch.no_grad():
        expected = theirs(
            query_embeds=torch.cat((queries, ours.embed(ids)), dim=1),
            query_length=5,
            attention_mask=torch.cat((torch.ones(2, 5), mask), dim=1),
            encoder_hidden_states=tokens,
        ).last_hidden_state
        query, text = ours("itm", ids, mask, image_kv)
        torch.testing.assert_close(query, expected[:, :5], rtol=0, atol=1e-5)
        torch.testing.assert_close(text[mask], expected[:, 5:][mask], rtol=0, atol=1e-5)
        expected = theirs(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        torch.testing.assert_close(ours.encode_queries(image_kv), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_head", [True, False])
def test_the_text_side_is_bert(with_head):
    """Initialized from BERT (paper 3.1), the text side gives BERT's outputs, token type 0 included; the head too."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=29,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    torch.manual_seed(0)
    theirs = (transformers.BertForMaskedLM if with_head else transformers.BertModel)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = small_qformer()
    report = load(ours, theirs.state_dict(), BERT, "BERT")
    assert ("LM head, which this checkpoint lacks" in report) == (not with_head)

    ids, mask = torch.randint(5, 29, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    with torch.no_grad():
        hidden = ours.run(ours.embed(ids), 0, mask[:, None, None])
        out = theirs(input_ids=ids, attention_mask=mask.long())
        if with_head:
            logits = ours.lm_logits(hidden)
            torch.testing.assert_close(logits[mask][:, :-1], out.logits[mask], rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(hidden[mask], out.last_hidden_state[mask], rtol=0, atol=1e-5)


# --- its kernels are PyTorch's functions -----------------------------------------------------------------------------


def assert_same_values_and_gradients(ours, theirs, inputs, parameters=((), ())) -> None:
    """Both functions of the inputs have the same output, and the same gradient at the inputs and at the parameters."""
    found = []
    for function, own in zip((ours, theirs), parameters):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        found.append([out, *torch.autograd.grad((out * weights).sum(), (*leaves, *own))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (40, 1, 12), (3, 5, 12), (5, 2, 8, 12)])
def test_linear_is_pytorchs_whichever_matrix_is_on_the_left(shape, bias):
    """Few rows are computed as W x^T, more rows as x W^T; the rows of the result follow each other in memory."""
    ours, theirs = Linear(12, 7, bias=bias), torch.nn.Linear(12, 7, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    assert_same_values_and_gradients(ours, theirs, [torch.randn(shape)], (ours.parameters(), theirs.parameters()))
    assert ours(torch.randn(shape)).is_contiguous()


@pytest.mark.parametrize("mask", ["none", "bool", "bias"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_attention_is_pytorchs_in_training_and_in_evaluation(mask, scale):
    """In training a CPU computes it as plain products, in evaluation by the fused kernel."""
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    bias = torch.randn(2, 1, 3, 5)
    mask = {"none": None, "bool": bias > -0.5, "bias": bias}[mask]
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True  # no row is empty

    def ours(q, k, v):
        return attention(q, k, v, mask, scale=scale)

    def theirs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    assert_same_values_and_gradients(ours, theirs, (q, k, v))
    with torch.no_grad():
        torch.testing.assert_close(ours(q, k, v), theirs(q, k, v))


def test_rows_that_share_keys_attend_to_them_without_a_copy():
    """Three rows a key: equal to plain attention over three copies of keys, values and mask, with gradient."""
    q, k, v, bias = (
        torch.randn(2, 3, 4, 1, 8),
        torch.randn(2, 4, 5, 8),
        torch.randn(2, 4, 5, 8),
        torch.randn(2, 1, 1, 5),
    )

    def shared(q, k, v):
        return shared_attention(q, k, v, bias, scale=1.0).flatten(0, 1)

    def plain(q, k, v):
        k, v, mask = (x.repeat_interleave(3, dim=0) for x in (k, v, bias))
        return F.scaled_dot_product_attention(q.flatten(0, 1), k, v, attn_mask=mask, scale=1.0)

    assert_same_values_and_gradients(shared, plain, (q, k, v))


@pytest.mark.parametrize("others", [0, 3, 4])
def test_the_pairs_of_itm_share_the_keys_of_their_image(others):
    """Rows b and B + b read own image b, the rows after 2B an image each: equal to plain attention over copied keys and
    values, with gradient."""
    B = 3
    q = torch.randn(2 * B + others, 4, 5, 8)
    own, other = torch.randn(2, B, 4, 6, 8), torch.randn(2, others, 4, 6, 8)

    def shared(q, own, other):
        return cross_attention(q, (*own, *other))

    def copied(q, own, other):
        k, v = torch.cat((own, own, other), dim=1)
        return cross_attention(q, (k, v))

    def plain(q, own, other):
        k, v = torch.cat((own, own, other), dim=1)
        return F.scaled_dot_product_attention(q, k, v)

    assert_same_values_and_gradients(shared, plain, (q, own, other))
    assert_same_values_and_gradients(copied, plain, (q, own, other))


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_a_share_and_keeps_the_mean(p, dtype):
    """Also for a number of elements that does not fill the last random word, and anew at every call."""
    x = torch.ones(301, 999, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    y.sum().backward()
    kept = y != 0
    assert abs(1 - kept.float().mean() - p) < 0.005  # a standard deviation is 0.001
    for direction in (0, 1):  # neighbours are independent
        together = (kept & kept.roll(1, direction)).float().mean()
        assert abs(together - (1 - p) ** 2) < 0.007
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    assert torch.equal(x.grad, y.detach())  # the gradient has the same mask and scale
    assert not torch.equal(dropout(x, p), y)
    assert torch.equal(dropout(x, 0.0), x)


def test_dropout_in_bf16_scales_what_it_keeps_without_bias():
    """The factor itself is not rounded to bf16, which would shrink everything by 0.16 % at every layer."""
    x = 1 + torch.rand(1000, 1000).bfloat16()
    y = dropout(x, 0.1)
    assert (y.double().sum() / x[y > 0].double().sum()).item() == pytest.approx(1 / 0.9, rel=2e-4)


def test_under_autocast_the_residual_stream_is_in_half_precision_and_norms_are_still_accurate():
    """The paper-sized width; gradients reach the fp32 weights."""
    torch.manual_seed(0)
    norm, exact = LayerNorm(768, eps=1e-12), torch.nn.LayerNorm(768, eps=1e-12)
    with torch.no_grad():
        norm.weight.add_(0.1 * torch.randn(768))
        norm.bias.add_(0.1 * torch.randn(768))
    exact.load_state_dict(norm.state_dict())
    x = 3 * torch.randn(40, 768) + 1
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
        model = small_qformer()
        query_out, text_out = model(
            "itm", torch.full((2, 3), 5), torch.ones(2, 3, dtype=torch.bool), model.image_kv(torch.randn(2, 7, 10))
        )
    assert out.dtype == query_out.dtype == text_out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact(x), atol=0.03, rtol=0.02)
    out.float().square().sum().backward()
    exact(x).square().sum().backward()
    assert norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(norm.weight.grad, exact.weight.grad, rtol=0.03, atol=0.5)
    assert torch.equal(norm(x), exact(x))  # without autocast nothing changes
