"""Paper 3.1: the Q-Former's parts, its size, and equality with transformers' implementation and with BERT."""

import pytest
import torch
from conftest import small_qformer

from formats import BERT, HF_QFORMER
from qformer import Linear, QFormer, QFormerConfig, copy_text_ffn_to_queries, drop
from weights import load


def test_cross_attention_in_every_other_block():
    """ "inserted every other transformer block" """
    model = small_qformer(depth=5)
    assert [block.cross is not None for block in model.blocks] == [True, False, True, False, True]
    assert [block.cross is not None for block in small_qformer(cross_every=3, depth=5).blocks] == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("image_width, expected", [(1408, 186_282_811), (1024, 182_743_867)])
def test_paper_sized_qformer_has_the_originals_parameters(image_width, expected):
    with torch.device("meta"):
        model = QFormer(QFormerConfig(image_width=image_width))
    assert sum(p.numel() for p in model.parameters()) - model.queries.numel() == expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (40, 1, 12), (3, 5, 12), (5, 2, 8, 12)])
def test_linear_is_torchs_whatever_way_round_it_is_computed(shape, bias):
    """Values, gradients, and rows that lie one behind the other in memory."""
    ours = Linear(12, 7, bias=bias)
    theirs = torch.nn.Linear(12, 7, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        assert out.is_contiguous()
        (out * torch.arange(7)).sin().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_queries_start_small_but_not_at_zero():
    """At zero, the gradient through the first norm would be 1e6 times too large."""
    torch.manual_seed(0)
    model = QFormer(QFormerConfig(50, 64, 2, 4, 128, 20, 32, 24))
    assert 0.018 < model.queries.std() < 0.022
    model.encode_queries(model.image_kv(torch.randn(2, 5, 24))).square().sum().backward()
    assert model.queries.grad.norm() < 1e5


def test_query_feed_forward_starts_as_the_texts_copy():
    model = small_qformer()
    assert not torch.equal(model.blocks[0].ffn_query.up.weight, model.blocks[0].ffn_text.up.weight)
    copy_text_ffn_to_queries(model)
    for block in model.blocks:
        for theirs, ours in zip(block.ffn_text.parameters(), block.ffn_query.parameters(), strict=True):
            assert torch.equal(theirs, ours) and theirs is not ours


def test_queries_and_text_have_a_feed_forward_each():
    model = small_qformer()
    ids, mask, image_kv = (
        torch.randint(5, 29, (1, 4)),
        torch.ones(1, 4, dtype=torch.bool),
        model.image_kv(torch.randn(1, 4, 10)),
    )
    query, text = model("itc", ids, mask, image_kv)
    with torch.no_grad():
        for block in model.blocks:
            block.ffn_text.down.weight.mul_(2)
    other_query, other_text = model("itc", ids, mask, image_kv)
    assert torch.equal(query, other_query) and not torch.allclose(text, other_text)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_a_share_and_keeps_the_mean(p, dtype):
    """Also for a number of elements that does not fill the last random word, and anew at every call."""
    torch.manual_seed(0)
    x = torch.ones(301, 999, dtype=dtype, requires_grad=True)
    y = drop(x, p)
    y.sum().backward()
    kept = y != 0
    assert abs(1 - kept.float().mean() - p) < 0.005  # a standard deviation is 0.001
    for direction in (0, 1):  # neighbours are independent
        together = (kept & kept.roll(1, direction)).float().mean()
        assert abs(together - (1 - p) ** 2) < 0.007
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    assert torch.equal(x.grad, y.detach())  # the gradient has the same mask and scale
    assert not torch.equal(drop(x, p), y)
    assert torch.equal(drop(x, 0.0), x)


def test_output_matrix_is_the_word_embedding():
    model = small_qformer()
    hidden = torch.randn(2, 16)
    before = model.lm_logits(hidden)
    with torch.no_grad():
        model.word_embedding.weight[7].add_(1)
    moved = (model.lm_logits(hidden) != before).any(dim=0)
    assert moved.nonzero().flatten().tolist() == [7]


def test_too_long_text_is_refused():
    model = small_qformer()
    with pytest.raises(ValueError, match="at most 20"):
        model.encode_text(torch.zeros(1, 21, dtype=torch.long), torch.ones(1, 21, dtype=torch.bool))


@pytest.mark.parametrize("seed", range(2))
def test_equals_transformers_qformer(seed):
    """Queries and text in one bi-directional pass (ITM), queries alone (ITC), over the same weights."""
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
        torch.testing.assert_close(torch.cat((query, text), dim=1)[0], expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(query, expected[:, :5], rtol=0, atol=1e-5)
        expected = theirs(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        torch.testing.assert_close(ours.encode_queries(image_kv), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_head", [True, False])
def test_text_side_is_bert(with_head):
    """Initialised from BERT (paper 3.1), the text side gives BERT's outputs, token type 0 included; the head too."""
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
    account = load(ours, theirs.state_dict(), BERT, "BERT")
    assert ("LM head, which this checkpoint lacks" in account) == (not with_head)

    ids, mask = torch.randint(5, 29, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    with torch.no_grad():
        hidden = ours.run(ours.embed(ids), 0, mask[:, None, None])  # all rows of the text pass
        out = theirs(input_ids=ids, attention_mask=mask.long())
        if with_head:
            logits = ours.lm_logits(hidden)
            torch.testing.assert_close(logits[mask][:, :-1], out.logits[mask], rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(hidden[mask], out.last_hidden_state[mask], rtol=0, atol=1e-5)


def test_dropout_grows_what_it_keeps_without_a_bias_in_half_precision():
    """The factor itself is not rounded to bf16, which would shrink everything by 0.16 % at every layer."""
    x = 1 + torch.rand(1000, 1000).bfloat16()
    y = drop(x, 0.1)
    assert (y.double().sum() / x[y > 0].double().sum()).item() == pytest.approx(1 / 0.9, rel=2e-4)


@pytest.mark.parametrize(("p", "share"), [(1e-7, 2**-16), (1 - 1e-7, 1 - 2**-16)])
def test_the_smallest_and_the_largest_dropout_are_a_65536th_from_none_and_all(p, share):
    dropped = (drop(torch.ones(2**22), p) == 0).double().mean().item()
    assert abs(dropped - share) < 2**-18
