"""Prompt formats of the Llama family: chosen from the folder, stored with the run, used by every call; the visual
embeddings stand where a base model or a chat model expects them, and nobody writes a special token."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import FEW_STEPS, LLMS, ROOT, small_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import train
from blip2 import Blip2
from data import collate_lm, collate_questions
from engine.errors import UserError
from llm import Llama, LlamaConfig
from sources.shapes import ShapesWorld
from sources.text import LLMTokenizer
from weights.configs import LLAMA_FIELDS, write_fields
from weights.load import unload
from weights.tables import LLAMA_TABLE

CHATML, LLAMA3 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>"]
CHATML_TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role }}...<|im_end|>{% endfor %}"


def tokenizer_file(folder: Path, special: list[str], bos: str = "", eos: str = "", metaspace: bool = False) -> None:
    """A tokenizer of bytes, with special tokens first; bos, eos: the tokens that it puts before and after a text."""
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "\u2581"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if bos or eos:
        ids = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A {eos}".strip(), special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))


def llama_folder(folder: Path, special: list[str], end, template: str = "", **options) -> Path:
    """A tiny Llama with random weights, as a hub serves one; end: eos_token_id by name(s)."""
    folder.mkdir()
    tokenizer_file(folder, special, **options)
    cfg = LlamaConfig(len(special) + 257, width=16, depth=2, heads=4, kv_heads=2, head_width=4, mlp=24, tied=False)
    llm = Llama(cfg)
    llm.init_weights()
    save_file(unload(llm, LLAMA_TABLE), folder / "model.safetensors")
    ids = [special.index(token) for token in ([end] if isinstance(end, str) else end)]
    config = {"model_type": "llama", "eos_token_id": ids[0] if isinstance(end, str) else ids, "rope_theta": 1e5}
    (folder / "config.json").write_text(json.dumps(config | write_fields(LLAMA_FIELDS, cfg)))
    if template:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture
def chat(tmp_path) -> Path:
    """A chat model of the format chatml."""
    return llama_folder(tmp_path / "chat", CHATML, "<|im_end|>", CHATML_TEMPLATE)


def reads(tokenizer: LLMTokenizer, prompt: str) -> tuple[str, str]:
    """What a model reads before and after the visual embeddings, special tokens and all."""
    (after,) = tokenizer.encode_prompts([prompt])
    return tuple(tokenizer.tokenizer.decode(ids, skip_special_tokens=False) for ids in (tokenizer.before_image, after))


# --- which format ----------------------------------------------------------------------------------------------------


def test_a_base_model_reads_its_start_token_then_the_image_and_writes_until_its_end(tmp_path):
    folder = llama_folder(tmp_path / "a", ["<s>", "</s>"], "</s>", bos="<s>")
    tokenizer = LLMTokenizer(folder, None)
    assert tokenizer.format_name == "plain" and reads(tokenizer, "what is it?") == ("<s>", "what is it?")
    assert tokenizer.encode_targets(["a"], [""]) == [tokenizer.encode(["a"])[0] + [1]]
    assert tokenizer.encode_targets(["a"], ["it is"]) == [tokenizer.encode([" a"])[0] + [1]]
    assert tokenizer.pad_id == tokenizer.end_id == 1, "it has no padding token: the end token, and a mask"


def test_a_model_without_a_start_token_gets_none(tmp_path):
    """Qwen, SmolLM2."""
    for name, eos in (("a", ""), ("b", "<|endoftext|>")):  # a token after the text is none before it
        tokenizer = LLMTokenizer(llama_folder(tmp_path / name, CHATML, "<|endoftext|>", eos=eos), None)
        assert tokenizer.format_name == "plain" and reads(tokenizer, "") == ("", "") and tokenizer.end_id == 0


def test_a_tokenizer_that_puts_a_space_before_every_text_gets_no_second_one(tmp_path):
    """Llama 2."""
    tokenizer = LLMTokenizer(llama_folder(tmp_path / "a", ["<s>", "</s>"], "</s>", bos="<s>", metaspace=True), None)
    assert tokenizer.format.separator == ""


@pytest.mark.parametrize("end", ["<|im_end|>", ["<|endoftext|>", "<|im_end|>"]], ids=str)
def test_a_chat_model_reads_the_image_inside_the_users_turn(end, tmp_path):
    tokenizer = LLMTokenizer(llama_folder(tmp_path / "a", CHATML, end, CHATML_TEMPLATE), None)
    before, after = reads(tokenizer, "what is it?")
    assert tokenizer.format_name == "chatml" and tokenizer.end_id == CHATML.index("<|im_end|>")
    assert before == "<|im_start|>user\n" and after == "what is it?<|im_end|>\n<|im_start|>assistant\n"


def test_qwen3_answers_without_thinking(tmp_path):
    """As its own template says with enable_thinking=False."""
    special = [*CHATML, "<think>", "</think>"]
    template = CHATML_TEMPLATE + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer = LLMTokenizer(llama_folder(tmp_path / "a", special, "<|im_end|>", template), None)
    turn = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.format_name == "qwen3" and reads(tokenizer, "what?") == ("<|im_start|>user\n", "what?" + turn)
    assert tokenizer.tokenizer.token_to_id("<think>") in tokenizer.encode_prompts([""])[0]


def test_llama_3_has_headers(tmp_path):
    special = [*LLAMA3, *HEADERS]
    folder = llama_folder(tmp_path / "a", special, ["<|end_of_text|>", "<|eot_id|>"], "", bos="<|begin_of_text|>")
    (folder / "chat_template.jinja").write_text("{{ '<|start_header_id|>' + role }} ... <|eot_id|>")
    tokenizer = LLMTokenizer(folder, None)
    before, after = reads(tokenizer, "what is it?")
    assert tokenizer.format_name == "llama3" and tokenizer.end_id == special.index("<|eot_id|>")
    assert before == "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    assert after == "what is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


def test_a_base_model_that_carries_the_chat_template_of_its_sibling_is_a_base_model(tmp_path):
    """Qwen2.5's base models do; their end token says what they were trained to write."""
    folder = llama_folder(tmp_path / "a", CHATML, "<|endoftext|>", CHATML_TEMPLATE)
    assert LLMTokenizer(folder, None).format_name == "plain"


def test_a_chat_model_of_an_unknown_format_is_refused_unless_the_format_is_named(tmp_path):
    folder = llama_folder(tmp_path / "a", ["<s>", "</s>"], "</s>", "[INST] {{ message }} [/INST]", bos="<s>")
    with pytest.raises(
        UserError, match="is a chat model of another format than plain, chatml, qwen3, llama3: pass --prompt-"
    ):
        LLMTokenizer(folder, None)
    assert LLMTokenizer(folder, None, name="plain").format_name == "plain"
    with pytest.raises(UserError, match="has no token '<.im_start.>': use the language model's own"):
        LLMTokenizer(folder, None, name="chatml")


def test_a_folder_that_names_no_end_token_is_refused(tmp_path):
    folder = llama_folder(tmp_path / "a", ["<s>", "</s>"], "</s>")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="names no end token: expected eos_token_id in config.json"):
        LLMTokenizer(folder, None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    assert LLMTokenizer(folder, None).end_id == 1


def test_the_real_chat_model_reads_what_its_own_template_writes():
    """SmolLM2-135M-Instruct, whose template adds a system turn if there is none."""
    transformers = pytest.importorskip("transformers")
    folder = os.environ.get("BLIP2_SMOLLM2")
    if not folder:
        pytest.skip("BLIP2_SMOLLM2 names no folder of SmolLM2-135M-Instruct")
    tokenizer, theirs = LLMTokenizer(folder, None), transformers.AutoTokenizer.from_pretrained(folder)
    said = [("user", "What is it?"), ("assistant", "A dog."), ("user", "What color is it?")]
    turns = [("What is it?", "A dog."), "What color is it?"]
    messages = [{"role": role, "content": text} for role, text in [("system", "."), *said]]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    text = text.removeprefix("<|im_start|>system\n.<|im_end|>\n")
    (after,) = tokenizer.encode_prompts([tokenizer.fill("{}", turns)])
    assert tokenizer.before_image + after == theirs(text).input_ids


# --- in the model ----------------------------------------------------------------------------------------------------


def chat_model(folder: Path) -> Blip2:
    """A small model in front of a chat model."""
    model = small_model()
    model.attach_llm(str(folder))
    return model.eval()


def test_the_visual_embeddings_stand_after_the_tokens_before_the_image(chat):
    model, tokenizer = chat_model(chat), LLMTokenizer(chat, None)
    ids, mask = tokenizer.pad_prompts(tokenizer.encode_prompts(["what is it?", "a"]))
    query_out = torch.randn(2, 4, model.qformer.cfg.width)
    prefix, prefix_mask = model.llm_prefix(query_out, ids, mask)
    first = len(tokenizer.before_image)
    assert torch.equal(prefix[:, :first], model.llm.embed(torch.tensor([tokenizer.before_image] * 2)))
    assert torch.equal(prefix[:, first : first + 4], model.llm_proj(query_out))
    short = len(tokenizer.encode_prompts(["a"])[0])
    assert torch.equal(prefix[1, -short:], model.llm.embed(torch.tensor(tokenizer.encode_prompts(["a"])[0])))
    assert (
        prefix_mask[1].tolist()
        == [True] * (first + 4) + [False] * (len(prefix_mask[1]) - first - 4 - short) + [True] * short
    )


def test_every_call_puts_the_image_there(chat, monkeypatch):
    """caption, ask, a conversation, rank and score."""
    model, images = chat_model(chat), [ShapesWorld("test").image(0)]
    seen, embed = [], model.llm.embed
    monkeypatch.setattr(model.llm, "embed", lambda ids: seen.append(ids) or embed(ids))

    def read() -> str:
        """The last prompt of one row that was embedded, as text; the image's place is after the first tokens."""
        (ids,) = next(ids for ids in seen if ids.dim() == 2 and ids.shape[1] > 1).tolist()
        seen.clear()
        return model.llm_tokenizer.tokenizer.decode(ids, skip_special_tokens=False)

    user, turn = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    model.caption(images[0], max_new_tokens=3)
    assert read() == user + turn
    model.ask(images[0], "what is it?", max_new_tokens=3)
    assert read() == user + "what is it?" + turn
    model.ask(images[0], [("what is it?", "a dog"), "what color?"], max_new_tokens=3)
    assert read() == user + "what is it?" + turn + "a dog<|im_end|>\n" + user + "what color?" + turn
    model.rank(images[0], "what is it?", ["a dog", "a cat"])
    assert read() == user + "what is it?" + turn
    model.score(images[0], ["a dog"])
    assert read() == user + turn


def test_rows_of_a_batch_are_what_they_are_alone(chat):
    model, images = chat_model(chat), [ShapesWorld("test").image(i) for i in range(3)]
    questions = ["what is it?", "is there a large red circle left of it?", "a"]
    together = model.ask(images, questions, num_beams=3)
    assert together == [model.ask(image, question, num_beams=3) for image, question in zip(images, questions)]
    ranked = model.rank(images, questions, ["a dog", "no"])
    for image, question, row in zip(images, questions, ranked):
        alone = model.rank(image, question, ["a dog", "no"])
        assert [x.answer for x in row] == [x.answer for x in alone]
        assert torch.allclose(torch.tensor(row[0][1:]), torch.tensor(alone[0][1:]), atol=1e-5)


def test_training_predicts_the_text_and_the_end_of_the_turn_and_nothing_else(chat):
    tokenizer = LLMTokenizer(chat, None)
    batch = collate_lm(tokenizer, [("", "a dog"), ("", "a")], [0, 1], [0, 1], images=torch.zeros(2, 1))
    decode = tokenizer.tokenizer.decode
    for row, text in zip(batch.labels, ("a dog", "a")):
        assert decode(row[row != -100].tolist(), skip_special_tokens=False) == text + "<|im_end|>"
    assert decode(batch.prompt_ids[0].tolist(), skip_special_tokens=False) == (
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )
    batch = collate_questions(tokenizer, "{}", None, [("is it?", "yes")], [0], [0], images=torch.zeros(1, 1))
    assert decode(batch.prompt_ids[0].tolist(), skip_special_tokens=False) == (
        "<|im_start|>user\nis it?<|im_end|>\n<|im_start|>assistant\n"
    )
    long = collate_lm(tokenizer, [("", "dog " * 40)], [0], [0], images=torch.zeros(1, 1))
    assert (long.labels != -100).sum() == tokenizer.max_tokens and long.labels[0].max() != -100


# --- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_format(chat, stage1_run, tmp_path):
    model = Blip2.from_pretrained(stage1_run)
    assert model.attach_llm(str(chat)).endswith("; prompt format chatml")
    model.save_pretrained(tmp_path / "run")
    (chat / "tokenizer_config.json").unlink()
    (chat / "config.json").write_text(
        (chat / "config.json").read_text().replace('"eos_token_id": 2', '"eos_token_id": 0')
    )
    again = Blip2.from_pretrained(tmp_path / "run")  # although the folder would be one of a base model now
    assert (again.llm_tokenizer.format_name, again.template) == ("chatml", "{}")


def test_the_flag_names_another_format_and_fine_tuning_inherits_it(chat, stage1_run, few_test_images, tmp_path):
    flags = ["--stage", "2", "--init", str(stage1_run), "--llm", str(chat), "--prompt-format", "plain", *FEW_STEPS]
    train.main([*flags, "--out", str(tmp_path / "run")])
    train.main(["--stage", "vqa", "--init", str(tmp_path / "run"), *FEW_STEPS, "--out", str(tmp_path / "vqa")])
    for name in ("run", "vqa"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["prompt_format"], config["template"]) == ("plain", "Question: {} Answer:")


def test_a_language_model_with_a_format_of_its_own_takes_no_other(stage1_run, tmp_path):
    with pytest.raises(UserError, match="got --prompt-format chatml for .*opt: OPT has a format of its own, leave it"):
        small_model().attach_llm(str(ROOT / LLMS["opt"]), form="chatml")
