"""Prompt formats: the text and the special tokens around images, prompts and targets, by language model.

OPT and T5 have one each (llm.py). In the Llama family every model was trained with its own:

    plain     [BOS] [visual] prompt text [EOS]                        base models; [BOS] if the tokenizer puts one
    chatml    <|im_start|>user\\n [visual] prompt <|im_end|>\\n <|im_start|>assistant\\n text <|im_end|>
    qwen3     the same with an empty thought, <think>\\n\\n</think>\\n\\n, before the text: it answers without thinking
    llama3    <|begin_of_text|> HEADER(user) [visual] prompt <|eot_id|> HEADER(assistant) text <|eot_id|>

A chat model is known by its end token, which ends a turn, and by its template.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from engine.errors import expect
from engine.files import MAX_CONFIG, read_json


@dataclass(frozen=True)
class PromptFormat:
    """What surrounds the visual embeddings, a prompt and a target, applied by `sources.text.LLMTokenizer`."""

    prompt_start: str  # before a prompt, after the visual embeddings
    prompt_end: str  # after it
    text_end: str  # token that ends a target
    separator: str  # between a prompt and its target
    padding_side: str  # of the prompts of a batch
    prefix_lm: bool  # stage 2 predicts a caption's suffix given its prefix (paper 3.3); else all of it
    template: str  # of questions, unless --template is passed
    padding: str = "<pad>"  # token
    before_image: str = ""  # before the visual embeddings
    next_turn: str = ""  # of a chat model, between an answer and the next question; else they are one text


def chat(user: str, end: str, assistant: str, start: str = "", newline: str = "") -> PromptFormat:
    """The format of a chat model whose turns begin with `user` or `assistant` and end with the token `end`."""
    end_of_turn = end + newline
    turns = dict(prompt_end=end_of_turn + assistant, next_turn=end_of_turn + user)
    return PromptFormat("", text_end=end, separator="", padding_side="left", prefix_lm=False, template="{}",
                        padding=end, before_image=start + user, **turns)  # fmt: skip


CHATML = "<|im_start|>user\n", "<|im_end|>", "<|im_start|>assistant\n"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
FORMATS = {
    # Its tokens are those of the folder, see `choose_format`.
    "plain": PromptFormat("", "", "", " ", "left", prefix_lm=False, template="Question: {} Answer:"),
    "chatml": chat(*CHATML, newline="\n"),
    "qwen3": chat(*CHATML[:2], CHATML[2] + "<think>\n\n</think>\n\n", newline="\n"),
    "llama3": chat(HEADER.format("user"), "<|eot_id|>", HEADER.format("assistant"), "<|begin_of_text|>"),
}


def read_if_there(path: Path) -> dict:
    """A JSON object of a folder, {} if it has none."""
    content = read_json(path, MAX_CONFIG) if path.exists() else {}
    return content if isinstance(content, dict) else {}


def choose_format(folder: Path, tokenizer: Tokenizer, name: str | None = None) -> tuple[str, PromptFormat]:
    """Name and format of a model of the Llama family; name: that of --prompt-format, if passed.

    Raises UserError for a chat model of another format, and for a tokenizer without the tokens of the format.
    """
    config, own = (read_if_there(folder / f"{part}config.json") for part in ("", "tokenizer_"))
    inside = config.get("text_config")  # of a BLIP-2
    config = inside if isinstance(inside, dict) else config
    listed = config.get("eos_token_id", read_if_there(folder / "generation_config.json").get("eos_token_id"))
    ids = [i for i in (listed if isinstance(listed, list) else [listed]) if type(i) is int and 0 <= i < 1 << 31]
    ends = [tokenizer.id_to_token(i) for i in ids]
    template = str(own.get("chat_template") or "")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(errors="replace")
    if name is None:
        name = next((name for name, form in FORMATS.items() if form.next_turn and form.text_end in ends), "plain")
        if name == "chatml" and "enable_thinking" in template:
            name = "qwen3"
        is_known = not template or any(form.next_turn and form.text_end in template for form in FORMATS.values())
        expect(
            name != "plain" or is_known,
            f"{folder} is a chat model of another format than {', '.join(FORMATS)}: pass --prompt-format with the one "
            "nearest to its own, or plain",
        )
    form = FORMATS[name]
    if name == "plain":
        end = next(filter(None, ends), "")
        expect(end, f"{folder} names no end token: expected eos_token_id in config.json, an id of its tokenizer")
        first, word = (tokenizer.encode("a", add_special_tokens=special).tokens[0] for special in (True, False))
        separator = "" if word.startswith("\u2581") else form.separator  # Llama 2 puts a space before every text itself
        form = replace(form, text_end=end, padding=end, separator=separator, before_image=first * (first != word))
    return name, form
