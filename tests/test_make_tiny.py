"""The tiny parts that ship with the code are made without what the shapes world holds out: the language models learn
from text alone, about scenes of the training split, in training wordings, without held-out pairs."""

import json
import re

import pytest
import torch
from conftest import LLMS, ROOT, small_model
from safetensors.torch import load_file

from llm import OPT, T5
from sources import shapes
from tools import make_tiny
from weights.open import load_llm


@pytest.mark.parametrize("kind", [OPT, T5])
def test_no_text_shows_a_held_out_pair_wording_or_scene(kind, monkeypatch):
    corpus, captions_of, splits = make_tiny.ShapesText(), make_tiny.captions_of, set()
    monkeypatch.setattr(make_tiny, "captions_of", lambda s: splits.add(shapes.split_of(s)) or captions_of(s))
    documents = [document for step in range(20) for document in corpus.documents(step, 32, kind.prompt_format)]
    texts = [" ".join(("".join(chunks), prompt, *(text for text, _ in said))) for chunks, prompt, said in documents]
    held_out = [f"{color} {shape}" for color, shape in shapes.HELD_OUT_PAIRS]
    assert not any(pair in text for text in [*texts, *corpus.sentences()] for pair in held_out)
    asked = [wording for wordings in shapes.HELD_OUT_QUESTIONS.values() for wording in wordings]
    asked = [re.escape(wording).replace(r"\{", "{").replace(r"\}", "}") for wording in asked]
    for pattern in [re.sub(r"\{\w+\}", r"[\\w ]+", wording) for wording in asked]:
        assert not any(re.search(f": {pattern}", text) for text in texts), pattern
    starts = {wording.split("{")[0] for wordings in shapes.HELD_OUT_WORDINGS.values() for wording in wordings}
    assert not any("".join(chunks).startswith(tuple(starts - {"a picture of "})) for chunks, _, _ in documents)
    assert splits == {"train"}


def test_opt_answers_in_a_conversation_and_t5_one_question_at_a_time():
    corpus = make_tiny.ShapesText()
    for _, prompt, texts in corpus.documents(0, 32, T5.prompt_format):
        assert len(texts) == 1 and prompt.count("Question:") <= 1
    conversations = [texts for _, _, texts in corpus.documents(0, 32, OPT.prompt_format) if len(texts) > 1]
    assert conversations
    for texts in conversations:
        assert [trained for _, trained in texts] == [True, False] * (len(texts) // 2) + [True]
        questions = [text for text, trained in texts if not trained]
        assert all(text.startswith(". Question: ") and text.endswith(" Answer:") for text in questions)


def test_lines_of_a_file_are_all_read_before_any_is_read_again(tmp_path):
    lines = [f"a {word} dog on {word} grass" for word in "one two three four five six seven".split()]
    (tmp_path / "a.txt").write_text("\n".join(line.upper() + "." for line in lines) + "\n\n")
    corpus = make_tiny.FileText(tmp_path / "a.txt")
    assert corpus.lines == lines
    read = [text for step in range(4) for _, _, [(text, _)] in corpus.documents(step, 7, OPT.prompt_format)]
    assert [sorted(read[i : i + 7]) for i in range(0, 28, 7)] == [sorted(lines)] * 4
    for chunks, _, [(text, _)] in corpus.documents(0, 7, OPT.prompt_format):
        assert {chunk.strip() for chunk in chunks} <= set(text.split())


def test_a_chunk_is_one_embedding_the_sum_of_its_tokens():
    """As a visual embedding of stage 2 stands for several words."""
    llm, _, _ = load_llm(LLMS["opt"])
    embedded, mask = make_tiny.embed_chunks(llm, [[[5, 6], [7]], [[8]]], "left")
    assert mask.tolist() == [[True, True], [False, True]]
    word = llm.word_embedding.weight
    torch.testing.assert_close(embedded[0], torch.stack((word[5] + word[6], word[7])))
    torch.testing.assert_close(embedded[1, 1], word[8])


@pytest.mark.parametrize("kind", LLMS)
def test_the_tiny_language_models_open_in_transformers(kind):
    """They are saved under the keys of their public models."""
    transformers = pytest.importorskip("transformers")
    cls = {"opt": transformers.OPTForCausalLM, "t5": transformers.T5ForConditionalGeneration}[kind]
    theirs, info = cls.from_pretrained(ROOT / LLMS[kind], output_loading_info=True, dtype=torch.float32)
    assert not info["unexpected_keys"] and set(info["missing_keys"]) <= {"lm_head.weight"}
    ours, _, _ = load_llm(LLMS[kind])
    ids, mask = torch.randint(10, 400, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    with torch.no_grad():
        if kind == "opt":
            wanted = theirs.eval()(ids).logits[:, :-1]
            found = ours(ours.embed(ids[:, :1]), mask[:, :1], ids[:, 1:])
        else:
            wanted = theirs.eval()(input_ids=ids, labels=ids).logits
            found = ours(ours.embed(ids), mask, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_one_command_makes_a_part_as_it_ships(tmp_path):
    """After one step it has the configuration, the tokenizer, the keys and the shapes of the one in assets/tiny."""
    make_tiny.main(["--only", "bert", "--bert-steps", "1", "--out", str(tmp_path)])
    made, shipped = tmp_path / "bert", ROOT / "assets/tiny/bert"
    assert {file.name for file in made.iterdir()} == {file.name for file in shipped.iterdir()}
    for file in ("config.json", "tokenizer.json"):
        assert json.loads((made / file).read_text()) == json.loads((shipped / file).read_text())
    tensors = [load_file(folder / "model.safetensors") for folder in (made, shipped)]
    assert len({str({key: tensor.shape for key, tensor in sorted(found.items())}) for found in tensors}) == 1


@pytest.mark.parametrize("kind", LLMS)
def test_a_language_model_is_made_from_the_lines_of_a_file(kind, tmp_path, monkeypatch):
    """With a tokenizer of its words; it opens as any other."""
    monkeypatch.setattr(make_tiny, "TEXT_SIZES", make_tiny.TINY_SIZES)
    (tmp_path / "a.txt").write_text("A dog runs on the grass.\nTwo dogs run.\n")
    flags = ["--only", kind, f"--{kind}-steps", "1", "--batch", "2", "--out", str(tmp_path)]
    make_tiny.main([*flags, "--text", str(tmp_path / "a.txt")])
    model = small_model()
    model.attach_llm(str(tmp_path / kind))
    assert [len(ids) for ids in model.llm_tokenizer.encode(["a dog runs"])] == [3]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_all_that_ships_is_small():
    files = {part: ROOT / "assets/tiny" / part / "model.safetensors" for part in LLMS}
    assert sum(file.stat().st_size for file in files.values()) < 6e6
    assert all(tensor.dtype == torch.float16 for tensor in load_file(files["opt"]).values())
