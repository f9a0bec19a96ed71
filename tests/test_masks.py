"""Paper 3.2 and Figure 2: who sees whom, for each of the three losses."""

import pytest
import torch
from conftest import ROOT, small_qformer

from qformer import Prefix, qformer_mask

KINDS = ("itc", "itm", "itg")


def drawings() -> dict[str, list[str]]:
    """The three grids out of the docstring of `qformer_mask`."""
    rows = [line.split() for line in qformer_mask.__doc__.splitlines()]
    rows = [cells[1:] for cells in rows if cells and cells[0] in "qtp" and set(cells[1:]) <= {"#", "."}]
    return {kind: ["".join(cells[7 * i : 7 * i + 7]) for cells in rows] for i, kind in enumerate(KINDS)}


def inputs(seed=0, batch=2, words=5, image_tokens=4):
    """Text with one padding token in the first row; image tokens."""
    torch.manual_seed(seed)
    ids = torch.randint(5, 29, (batch, words))
    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[0, -1] = False
    return ids, mask, torch.randn(batch, image_tokens, 10)


def test_the_readme_has_the_same_drawing():
    grid = [line.strip() for line in qformer_mask.__doc__.splitlines() if "# #" in line]
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len(grid) == 7 and all(line in readme for line in grid)


@pytest.mark.parametrize("kind", KINDS)
def test_the_drawing_is_the_mask(kind):
    text_mask = torch.tensor([[True, True, True, False]])
    drawn = torch.tensor([[cell == "#" for cell in row] for row in drawings()[kind]])
    assert drawn.shape == (7, 7)
    assert torch.equal(qformer_mask(kind, text_mask, 3)[0, 0], drawn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_what_the_mask_hides_cannot_be_felt(kind, seed):
    """By perturbation: another word at place j moves the outputs of those rows only that may see it, by any path."""
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
                sees[3 + j] = True  # a word is in its own output, padding too
                assert torch.equal(moved[row], sees), f"{kind}: word {j} of text {row}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_mask_hides_gets_no_gradient(kind):
    """By gradient: a row's output depends on exactly the places that the mask shows it."""
    model = small_qformer(1)
    ids, mask, tokens = inputs(1)
    text = model.embed(ids).detach().requires_grad_()
    queries = model.queries.expand(2, -1, -1).detach().clone().requires_grad_()
    allowed = qformer_mask(kind, mask, 3)
    out = model.run(torch.cat((queries, text), dim=1), 3, allowed, model.image_kv(tokens))
    for row in range(out.shape[1]):
        weights = torch.randn_like(out[:, row])  # the plain sum of a layer norm's output is constant
        grads = torch.autograd.grad((out[:, row] * weights).sum(), (queries, text), retain_graph=True)
        felt = torch.cat(grads, dim=1).abs().amax(dim=2) > 0
        expected = allowed[:, 0, row].clone()
        expected[:, row] = True
        assert torch.equal(felt, expected)


def test_text_never_touches_the_image_where_queries_are_hidden():
    """Paper 3.2: "direct interactions between the frozen image encoder and the text tokens" do not exist."""
    model = small_qformer(2)
    ids, mask, tokens = inputs(2)
    with torch.no_grad():
        _, text = model("itc", ids, mask, model.image_kv(tokens))
        _, text_of_other_image = model("itc", ids, mask, model.image_kv(tokens + 1))
        query, _ = model("itg", ids, mask, model.image_kv(tokens))
        query_of_other_text, _ = model("itg", ids.flip(0), mask, model.image_kv(tokens))
    assert torch.equal(text, text_of_other_image)
    assert torch.equal(query, query_of_other_text)


@pytest.mark.parametrize("seed", range(3))
def test_joint_itc_pass_is_two_separate_passes(seed):
    model = small_qformer(seed)
    ids, mask, tokens = inputs(seed)
    image_kv = model.image_kv(tokens)
    query, text = model("itc", ids, mask, image_kv)
    torch.testing.assert_close(model.encode_queries(image_kv), query)
    torch.testing.assert_close(model.encode_text(ids, mask), text[:, 0])


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_the_joint_itm_pass(seed):
    """Without the text rows of the last block, which nobody reads."""
    model = small_qformer(seed)
    ids, mask, tokens = inputs(seed)
    image_kv = model.image_kv(tokens)
    query, _ = model("itm", ids, mask, image_kv)
    torch.testing.assert_close(model.encode_pairs(ids, mask, image_kv), query)


@pytest.mark.parametrize("seed", range(3))
def test_joint_itg_pass_is_the_cached_pass(seed):
    """What the original trains (text behind the cached keys of the queries) is what Figure 2 shows."""
    model = small_qformer(seed)
    ids, mask, tokens = inputs(seed)
    image_kv, cache = model.image_kv(tokens), [Prefix() for _ in model.blocks]
    query, text = model("itg", ids, mask, image_kv)
    torch.testing.assert_close(model.encode_queries(image_kv, cache), query)
    torch.testing.assert_close(model.decode_text(ids, mask, cache), text)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_invisible(kind):
    """A text gives the same, alone or padded in a batch."""
    model = small_qformer(3)
    ids, mask, tokens = inputs(3)
    query, text = model(kind, ids, mask, model.image_kv(tokens))
    alone = model(kind, ids[:1, :4], mask[:1, :4], model.image_kv(tokens[:1]))
    torch.testing.assert_close(query[:1], alone[0])
    torch.testing.assert_close(text[:1, :4], alone[1])


def test_other_masks_are_refused():
    with pytest.raises(TypeError, match="bool"):
        qformer_mask("itc", torch.ones(1, 4), 3)
    with pytest.raises(ValueError, match="itc"):
        qformer_mask("causal", torch.ones(1, 4, dtype=torch.bool), 3)
