"""Cleaning, prompts, and the tokenizers of BERT and of the language models."""

import os
import re
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer
from torch import Tensor

from engine.errors import UserError, expect, shorten
from engine.files import MAX_CONFIG, expect_file, whole
from sources.prompts import PromptFormat, choose_format

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism

# --- strings ---------------------------------------------------------------------------------------------------------

REMOVED = '.!"()*#:;~'  # characters that cleaning removes


def is_string(text) -> bool:
    """A string without lone surrogates, which no tokenizer reads."""
    return isinstance(text, str) and not re.search("[\ud800-\udfff]", text)


def is_text(text) -> bool:
    """A string of which cleaning leaves something."""
    return is_string(text) and bool(re.search(rf"[^\s{REMOVED}]", text))


def clean_caption(caption: str) -> str:
    """LAVIS's caption cleaning: lower case, `. ! " ( ) * # : ; ~` to spaces, single spaces, at most 50 words."""
    caption = re.sub(rf"[{REMOVED}]", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).strip()
    return " ".join(caption.split(" ")[:50])


def clean_question(question: str) -> str:
    """LAVIS's question cleaning: as for captions, but removed characters leave no space."""
    return " ".join(re.sub(rf"[{REMOVED}]", "", question.lower()).rstrip(" ").split(" ")[:50])


def says_left_or_right(texts: list[str]) -> bool:
    """Would mirroring the image make a text false?"""
    return any(re.search(r"\b(left|right)", text.lower()) for text in texts)


def fill_template(template: str, turns) -> str:
    """Put a question into the template, or a conversation: [(question, answer), ..., question].

    With the template "Question: {} Answer:", the turns ("what is it?", "a dog") and "what color?" become
    "Question: what is it? Answer: a dog. Question: what color? Answer:".
    """
    expect("{}" in template, f"got the template {template!r}, expected {{}} in it, where the question goes")
    *past, question = [turns] if isinstance(turns, str) else turns
    said = [f"{template.replace('{}', asked)} {answer.rstrip('.')}." for asked, answer in past]
    return " ".join([*said, template.replace("{}", question)])


def split_prefix(caption: str, rng: np.random.Generator) -> tuple[str, str]:
    """Prefix and suffix of a caption of n words (paper 3.3), cut after 0 to n - 1 of them: the prefix may be empty."""
    words = caption.split()
    cut = int(rng.integers(len(words)))
    return " ".join(words[:cut]), " ".join(words[cut:])


# --- token ids -------------------------------------------------------------------------------------------------------


def pad(ids: list[list[int]], pad_id: int, side: str = "right", multiple: int = 8) -> tuple[Tensor, Tensor]:
    """Token lists -> ids (B, T) and mask (B, T) bool; T is the longest, rounded up to 8 for the matrix units."""
    longest = -(-max(map(len, ids), default=0) // multiple) * multiple
    padded, mask = torch.full((len(ids), longest), pad_id), torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, real, tokens in zip(padded, mask, ids, strict=True):
        place = slice(longest - len(tokens), None) if side == "left" else slice(len(tokens))
        row[place], real[place] = torch.tensor(tokens), True
    return padded, mask


def truncate(ids: list[int], limit: int, end: list[int]) -> list[int]:
    """At most `limit` tokens, still with their end tokens (LAVIS cuts OPT's newline off)."""
    return ids if len(ids) <= limit else ids[: limit - len(end)] + end


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, from any of the files that the hubs have."""
    kinds = ("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt")  # the last is OPT's
    files = next(([folder / n for n in names] for names in kinds if all((folder / n).exists() for n in names)), [])
    if not files:
        more = " (spiece.model is not read: T5 v1.1 has the vocabulary of Flan-T5, whose tokenizer.json fits)"
        raise UserError(
            f"{folder} has no tokenizer: expected tokenizer.json, vocab.txt, or vocab.json with merges.txt in it"
            + more * (folder / "spiece.model").exists()
        )
    for file in files:
        expect_file(file, "a tokenizer", MAX_CONFIG)
    paths = [str(file) for file in files]
    try:
        if len(paths) == 2:
            tokenizer = ByteLevelBPETokenizer(*paths)._tokenizer
            special = ("<s>", "<pad>", "</s>", "<unk>")
            tokenizer.add_special_tokens([token for token in special if tokenizer.token_to_id(token) is not None])
        elif files[0].suffix == ".txt":
            tokenizer = BertWordPieceTokenizer(*paths)._tokenizer
        else:
            tokenizer = Tokenizer.from_file(*paths)
        tokenizer.encode("a \u2603")  # fails if there is no token for unknown words
    except BaseException as error:  # tokenizers raises nothing narrower, and its PanicException is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        why = f"{shorten(error)}; this is tokenizers {tokenizers.__version__}"
        raise UserError(f"{' or '.join(paths)} cannot be read ({why}): fetch it again, or update tokenizers") from None
    tokenizer.no_padding()  # some published files have both enabled
    tokenizer.no_truncation()
    return tokenizer


class BertTokenizer:
    """BERT's tokenizer with [DEC] appended to its vocabulary: captions to ids and back. words: of the weights."""

    def __init__(self, folder: str | Path, max_tokens: int = 32, words: int | None = None):
        self.tokenizer = open_tokenizer(Path(folder))
        self.tokenizer.enable_truncation(max_tokens)
        self.max_tokens = max_tokens
        self.tokenizer.add_special_tokens(["[DEC]"])  # some published files have it
        ids = [self.tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")]
        expect(None not in ids, f"{folder} is not BERT's tokenizer: expected the tokens [PAD], [CLS] and [SEP] in it")
        self.pad_id, self.cls_id, self.sep_id = ids
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        expect(
            words in (None, self.vocab_size),
            f"{folder} has a tokenizer of {self.vocab_size - 1} words and weights of {(words or 0) - 1}, expected the "
            "same: use the tokenizer that the weights were trained with",
        )

    def encode(self, captions: list[str]) -> list[list[int]]:
        """Cleaned and tokenized: [CLS] ... [SEP], at most `max_tokens`."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch([clean_caption(c) for c in captions])]

    def decode(self, ids: list[int]) -> str:
        """Ids to a string, special tokens skipped."""
        return self.tokenizer.decode(ids)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, from which `BertTokenizer` opens again."""
        with whole(folder / "tokenizer.json") as partial:
            self.tokenizer.save(str(partial))


class LLMTokenizer:
    """The language model's tokenizer, which puts the special tokens around images, prompts and targets.

    prompt_format: of the language model's class; None: chosen by the folder, or by `name`, see `choose_format`. OPT
    reads "</s> prompt" and writes "target newline", T5 reads "prompt </s>" and writes "target </s>".
    """

    def __init__(self, folder: str | Path, prompt_format: PromptFormat | None, max_tokens: int = 32, name=None):
        self.folder, self.max_tokens = Path(folder), max_tokens
        self.tokenizer = open_tokenizer(self.folder)
        self.format_name, form = None, prompt_format
        if form is None:
            self.format_name, form = choose_format(self.folder, self.tokenizer, name)
        self.format = form
        self.vocab_size = max(self.tokenizer.get_vocab().values(), default=0) + 1
        for special in re.findall("<[^<>]+>", form.prompt_start + form.before_image + form.prompt_end):
            self.token(special)  # else it would be read as several words
        self.end_id, self.pad_id = self.token(form.text_end), self.token(form.padding)
        self.before_image, self.start, self.end = self.encode([form.before_image, form.prompt_start, form.prompt_end])

    def token(self, text: str) -> int:
        """The id of a text that is one token."""
        token = self.tokenizer.token_to_id(text)
        ids = self.encode([text])[0] if token is None else [token]
        expect(len(ids) == 1, f"the tokenizer in {self.folder} has no token {text!r}: use the language model's own")
        return ids[0]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids without special tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def fill(self, template: str, turns) -> str:
        """`fill_template`; a chat model gets each question and answer of a conversation as a turn."""
        form = self.format
        if not form.next_turn or isinstance(turns, str):
            return fill_template(template, turns)
        *past, question = turns
        said = [fill_template(template, asked) + form.prompt_end + answer + form.next_turn for asked, answer in past]
        return "".join(said) + fill_template(template, question)

    def encode_prompts(self, prompts: list[str]) -> list[list[int]]:
        """What the model reads after the visual embeddings."""
        return [self.start + ids + self.end for ids in self.encode(prompts)]

    def pad_prompts(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """All that the model reads beside the visual embeddings: ids (B, n) and mask (B, n) bool of the tokens before
        them, equal in all rows, then of the prompts after them."""
        ids, mask = pad(prompts, self.pad_id, self.format.padding_side, multiple=1)
        first = torch.tensor(self.before_image, dtype=torch.long).expand(len(ids), -1)
        return torch.cat((first, ids), dim=1), F.pad(mask, (first.shape[1], 0), value=True)

    def encode_targets(self, targets: list[str], prompts: list[str]) -> list[list[int]]:
        """What the model writes after the prompts."""
        pairs = zip(targets, prompts, strict=True)
        joined = [self.format.separator + target if prompt else target for target, prompt in pairs]
        return [ids + [self.end_id] for ids in self.encode(joined)]

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]], int]:
        """(prompt, target) pairs -> ids of both, truncated for training, and how many pairs were too long."""
        prompts, targets = map(list, zip(*pairs, strict=True))
        prompt_ids, target_ids, truncated = self.encode_prompts(prompts), self.encode_targets(targets, prompts), 0
        for row, (prompt, target) in enumerate(zip(prompt_ids, target_ids, strict=True)):
            # OPT's text counts from [BOS] on; T5's two sides, as in LAVIS, and a prompt and its answer each by itself.
            limit = self.max_tokens - (0 if self.format.prefix_lm or prompts[row] else len(self.start))
            truncated += len(prompt) > self.max_tokens or len(target) > limit
            prompt_ids[row] = truncate(prompt, self.max_tokens, self.end)
            target_ids[row] = truncate(target, limit, [self.end_id])
        return prompt_ids, target_ids, truncated

    def question_prompt(self, template: str, question: str) -> str:
        """The question in the template; one that is too long loses its last words, not the template's."""
        question = " ".join(question.split()[: self.max_tokens])  # a word has at least one token
        prompt = fill_template(template, question)
        while len(question.split()) > 1 and len(self.encode_prompts([prompt])[0]) > self.max_tokens:
            question = " ".join(question.split()[:-1])
            prompt = fill_template(template, question)
        return prompt

    def decode(self, ids: list[int]) -> str:
        """Ids to a string, special tokens skipped, without surrounding space."""
        return self.tokenizer.decode(ids).strip()
