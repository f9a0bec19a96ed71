"""What the tiny language models learn from is text alone, without what the shapes world holds out."""

import importlib.util
import re

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import shapes
import weights
from llm import OPT, T5

spec = importlib.util.spec_from_file_location("make_tiny", ROOT / "assets/make_tiny.py")
make_tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_tiny)


@pytest.mark.parametrize("kind", [OPT, T5])
def test_no_text_shows_a_held_out_pair_wording_or_scene(kind):
    corpus = make_tiny.ShapesText()
    documents = [doc for step in range(20) for doc in corpus.documents(step, 32, kind.layout)]
    texts = [" ".join(("".join(chunks), prompt, *(text for text, _ in said))) for chunks, prompt, said in documents]
    held_out = [f"{color} {shape}" for color, shape in shapes.HELD_OUT_PAIRS]
    assert not any(pair in text for text in [*texts, *corpus.sentences()] for pair in held_out)
    asked = [
        re.escape(w).replace(r"\{", "{").replace(r"\}", "}") for ws in shapes.HELD_OUT_QUESTIONS.values() for w in ws
    ]
    for pattern in [re.sub(r"\{\w+\}", r"[\\w ]+", wording) for wording in asked]:
        assert not any(re.search(f": {pattern}", text) for text in texts), pattern
    wordings = {w for ws in shapes.HELD_OUT_WORDINGS.values() for w in ws}
    starts = {re.split(r"[{]", wording)[0] for wording in wordings}
    assert not any("".join(chunks).startswith(tuple(starts - {"a picture of "})) for chunks, _, _ in documents)


def test_opt_answers_in_a_conversation_and_t5_one_by_one():
    corpus = make_tiny.ShapesText()
    for _, prompt, said in corpus.documents(0, 32, T5.layout):
        assert len(said) == 1 and prompt.count("Question:") <= 1
    turns = [said for _, _, said in corpus.documents(0, 32, OPT.layout) if len(said) > 1]
    assert turns
    for said in turns:
        assert [learned for _, learned in said] == [True, False] * (len(said) // 2) + [True]
        assert all(
            text.startswith(". Question: ") and text.endswith(" Answer:") for text, learned in said if not learned
        )


def test_lines_of_a_file_are_all_read_before_any_twice(tmp_path):
    lines = [f"a {word} dog on {word} grass" for word in "one two three four five six seven".split()]
    (tmp_path / "a.txt").write_text("\n".join(line.upper() + "." for line in lines) + "\n\n")
    corpus = make_tiny.FileText(tmp_path / "a.txt")
    assert corpus.lines == lines
    said = [text for step in range(4) for _, _, [(text, _)] in corpus.documents(step, 7, OPT.layout)]
    assert [sorted(said[i : i + 7]) for i in range(0, 28, 7)] == [sorted(lines)] * 4
    for chunks, _, [(text, _)] in corpus.documents(0, 7, OPT.layout):
        assert {chunk.strip() for chunk in chunks} <= set(text.split())


def test_a_chunk_is_one_embedding_the_sum_of_its_tokens():
    llm, _, _ = weights.load_llm("assets/tiny/opt")
    rows = [[[5, 6], [7]], [[8]]]
    embedded, mask = make_tiny.embed_chunks(llm, rows, "left")
    assert mask.tolist() == [[True, True], [False, True]]
    word = llm.word_embedding.weight
    torch.testing.assert_close(embedded[0], torch.stack((word[5] + word[6], word[7])))
    torch.testing.assert_close(embedded[1, 1], word[8])


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_tiny_language_models_open_in_transformers(kind):
    """They are saved under the names and in the layout of their public models."""
    transformers = pytest.importorskip("transformers")
    cls = {"opt": transformers.OPTForCausalLM, "t5": transformers.T5ForConditionalGeneration}[kind]
    theirs, info = cls.from_pretrained(ROOT / "assets/tiny" / kind, output_loading_info=True, dtype=torch.float32)
    assert not info["unexpected_keys"] and set(info["missing_keys"]) <= {"lm_head.weight"}
    ours, _, _ = weights.load_llm(f"assets/tiny/{kind}")
    ids, mask = torch.randint(10, 400, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    with torch.no_grad():
        if kind == "opt":
            wanted = theirs.eval()(ids).logits
            found = ours.logits(ours.read(ours.embed(ids), mask))
        else:
            wanted = theirs.eval()(input_ids=ids, labels=ids).logits
            found = ours(ours.embed(ids), mask, ids, torch.arange(18)).view(2, 9, -1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_all_that_ships_is_small():
    sizes = {part: (ROOT / f"assets/tiny/{part}/model.safetensors").stat().st_size / 1e6 for part in ("opt", "t5")}
    assert sum(sizes.values()) < 6
    assert all(t.dtype == torch.float16 for t in load_file(ROOT / "assets/tiny/opt/model.safetensors").values())
