"""Paper 3.2 and Figure 2: who may attend to whom, for each of the three losses."""

import inspect

import pytest
import torch
from conftest import ROOT, small_qformer
from torch import Tensor

from qformer import QueryCache, qformer_mask

KINDS = ("itc", "itm", "itg")


def drawings() -> dict[str, list[str]]:
    """The three grids in the docstring of `qformer_mask`."""
    rows = [line.split() for line in qformer_mask.__doc__.splitlines()]
    rows = [cells[1:] for cells in rows if cells and cells[0] in "qtp" and set(cells[1:]) <= {"#", "."}]
    return {kind: ["".join(cells[7 * i : 7 * i + 7]) for cells in rows] for i, kind in enumerate(KINDS)}


def assert_drawn(kind: str, expected: Tensor, got: Tensor) -> None:
    """Two masks (S, S) are equal; if not, both are drawn side by side, and the rows that differ are marked."""
    if not torch.equal(expected, got):
        rows = [["".join(".#"[cell] for cell in row) for row in mask.int().tolist()] for mask in (expected, got)]
        drawn = [f"{a:10}{b:10}{'' if a == b else '<'}".rstrip() for a, b in zip(*rows)]
        pytest.fail("\n".join([f"the mask {kind!r} is another:", "expected  got", *drawn]), pytrace=False)


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two texts of five tokens, the last of the first text is padding, and image tokens."""
    torch.manual_seed(seed)
    ids, mask = torch.randint(5, 29, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    mask[0, -1] = False
    return ids, mask, torch.randn(2, 4, 10)


# --- the mask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_drawing_is_the_mask(kind):
    text_mask = torch.tensor([[True, True, True, False]])
    drawn = torch.tensor([[cell == "#" for cell in row] for row in drawings()[kind]])
    assert drawn.shape == (7, 7)
    assert_drawn(kind, drawn, qformer_mask(kind, text_mask, 3)[0, 0])


def test_a_mask_that_is_wrong_is_drawn_beside_the_right_one():
    """So that a failure is seen, not searched for in tensors of bools."""
    with pytest.raises(pytest.fail.Exception) as failure:
        assert_drawn("itg", torch.ones(3, 3).tril() > 0, torch.ones(3, 3) > 0)
    drawing = ["expected  got", "#..       ###       <", "##.       ###       <", "###       ###"]
    assert str(failure.value).splitlines() == ["the mask 'itg' is another:", *drawing]


def test_the_readme_has_the_same_drawing():
    lines = inspect.getdoc(qformer_mask).splitlines()
    (first,) = [i for i, line in enumerate(lines) if "itc: unimodal" in line]
    drawing = "\n".join(line[4:] for line in lines[first : first + 9])
    assert drawing.count("#") == 21 + 42 + 30  # of the three grids
    assert drawing in (ROOT / "README.md").read_text()


def test_other_masks_are_refused():
    with pytest.raises(TypeError, match="got a text_mask of torch.float32, expected torch.bool"):
        qformer_mask("itc", torch.ones(1, 4), 3)
    with pytest.raises(ValueError, match='got mask kind \'causal\', expected "itc", "itm" or "itg"'):
        qformer_mask("causal", torch.ones(1, 4, dtype=torch.bool), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_image_tokens_or_nothing_in_the_place_of_their_keys_and_values_are_refused(kind):
    """Every mask has queries, which read the image; PyTorch would report a shape, or nothing."""
    model = small_qformer()
    ids, mask, tokens = inputs(0)
    for image_kv, got in ((None, "NoneType"), (tokens, "Tensor")):
        with pytest.raises(ValueError, match=rf"got a {got} as image_kv, expected qformer.image_kv\(image_tokens\)"):
            model(kind, ids, mask, image_kv)
        with pytest.raises(ValueError, match=f"got a {got} as image_kv"):
            model.encode_queries(image_kv)


# --- the Q-Former obeys it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_another_token_changes_those_outputs_only_that_may_see_it(kind, seed):
    """By perturbation: over all blocks, a token reaches an output by no other path than the mask allows."""
    model = small_qformer(seed)
    ids, mask, tokens = inputs(seed)
    image_kv = model.image_kv(tokens)
    with torch.no_grad():
        before = torch.cat(model(kind, ids, mask, image_kv), dim=1)
        for j in range(ids.shape[1]):
            other = ids.clone()
            other[:, j] = (other[:, j] + 1) % 29
            moved = (torch.cat(model(kind, other, mask, image_kv), dim=1) - before).abs().amax(dim=2) > 0
            for row in range(len(ids)):
                sees = qformer_mask(kind, mask[row : row + 1], 3)[0, 0, :, 3 + j]
                sees[3 + j] = True  # a token is in its own output, padding too
                assert torch.equal(moved[row], sees), f"{kind}: token {j} of text {row}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_reaches_those_inputs_only_that_the_mask_shows(kind):
    """By gradient: an output depends on exactly the positions that its row of the mask allows."""
    model = small_qformer(1)
    ids, mask, tokens = inputs(1)
    text = model.embed(ids).detach().requires_grad_()
    queries = model.queries.expand(2, -1, -1).detach().clone().requires_grad_()
    allowed = qformer_mask(kind, mask, 3)
    out = model.run(torch.cat((queries, text), dim=1), 3, allowed, model.image_kv(tokens))
    for row in range(out.shape[1]):
        weights = torch.randn_like(out[:, row])  # the plain sum of a LayerNorm's output is constant
        grads = torch.autograd.grad((out[:, row] * weights).sum(), (queries, text), retain_graph=True)
        reached = torch.cat(grads, dim=1).abs().amax(dim=2) > 0
        expected = allowed[:, 0, row].clone()
        expected[:, row] = True
        assert_drawn(f"{kind}, output {row}", expected, reached)


def test_text_never_reads_the_image_where_queries_are_hidden_and_queries_never_read_text_in_itg():
    """Paper 3.2: the image encoder and the text tokens have no direct interaction, only through the queries."""
    model = small_qformer(2)
    ids, mask, tokens = inputs(2)
    with torch.no_grad():
        query, text = model("itc", ids, mask, model.image_kv(tokens))
        other_query, text_of_other_image = model("itc", ids, mask, model.image_kv(tokens + 1))
        query_itg, text_itg = model("itg", ids, mask, model.image_kv(tokens))
        query_of_other_text, _ = model("itg", ids.flip(0), mask, model.image_kv(tokens))
        _, text_itg_of_other_image = model("itg", ids, mask, model.image_kv(tokens + 1))
    assert torch.equal(text, text_of_other_image) and not torch.allclose(query, other_query)
    assert torch.equal(query_itg, query_of_other_text) and not torch.allclose(text_itg, text_itg_of_other_image)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_invisible(kind):
    """A text gives the same alone and padded in a batch."""
    model = small_qformer(3)
    ids, mask, tokens = inputs(3)
    query, text = model(kind, ids, mask, model.image_kv(tokens))
    alone = model(kind, ids[:1, :4], mask[:1, :4], model.image_kv(tokens[:1]))
    torch.testing.assert_close(query[:1], alone[0])
    torch.testing.assert_close(text[:1, :4], alone[1])


# --- the joint passes and their parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_joint_itc_pass_is_two_separate_passes(seed):
    model = small_qformer(seed)
    ids, mask, tokens = inputs(seed)
    image_kv = model.image_kv(tokens)
    query, text = model("itc", ids, mask, image_kv)
    torch.testing.assert_close(model.encode_queries(image_kv), query)
    torch.testing.assert_close(model.encode_text(ids, mask), text[:, 0])


@pytest.mark.parametrize("seed", range(3))
def test_the_joint_itg_pass_is_text_after_the_cached_queries(seed):
    """Training computes the text alone, after the keys and values that the query pass of ITC has left in the cache, as
    LAVIS does: that is the mask of Figure 2."""
    model, cache = small_qformer(seed), QueryCache()
    ids, mask, tokens = inputs(seed)
    image_kv = model.image_kv(tokens)
    query, text = model("itg", ids, mask, image_kv)
    torch.testing.assert_close(model.encode_queries(image_kv, cache), query)
    torch.testing.assert_close(model.decode_text(ids, mask, cache), text)
