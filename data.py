"""From files to batches: photos, captions, tokens, and which sample comes when.

A photo set is a list of photos with captions, or of photos with a question and its answers: the built-in shapes world
(shapes.py), or an annotation file beside a folder of photos (`Annotations`). `Texts` (BERT), `LLMTexts` and, for
fine-tuning, `PromptedTexts` and `QuestionTexts` tokenize, `TrainBatches` makes a `Batch`, `StepSampler` says of what.

Whatever is random about a sample (which caption or answer, crop, flip) is drawn from (seed, its position in the run).
So the data of step n are the same for any number of processes and workers, and after a resume.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from array import array
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import shapes
from layouts import UserError, open_records, read_json, stream_records

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism

MAX_PIXELS = 100_000_000  # a photo above this is taken for a mistake or an attack
Image.MAX_IMAGE_PIXELS = None  # the check is ours, in `opened`, with a message of our own
BROKEN_SHARE = 0.01  # above this share of unreadable photos a run stops


def say_sentence(main) -> int:
    """Run a command line; a UserError becomes its sentence and exit status 2, without a traceback."""
    try:
        main()
        return 0
    except UserError as error:
        sentence = str(error).rpartition("UserError: ")[2].strip()  # a loader's worker wraps it in its traceback
        print(f"error: {sentence}", file=sys.stderr)
        return 2


# --- pictures --------------------------------------------------------------------------------------------------------


def open_picture(path: str | Path) -> Image.Image:
    """A file of any common kind as an upright RGB picture. Raises UserError that names the file and the fix.

    16-bit, grey, CMYK and palette pictures are converted, transparent parts become white, of an animation the first
    frame is taken, and the camera's rotation flag is obeyed.
    """
    with opened(path) as picture:
        return to_rgb(picture)


@contextmanager
def opened(path: str | Path):
    """A picture of which only the header has been read. That it cannot be read inside is a UserError."""
    try:
        picture = Image.open(path)
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise UserError(f"{path} has {width} x {height} pixels, expected at most {MAX_PIXELS:,}: resize it first")
        yield picture
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: check the name, and for photos of an annotation file the folder (--images)"
        ) from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a picture that Pillow knows: convert it to JPEG or PNG") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path} is broken or cut short ({error}): copy it again, or take its record out") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow picture -> RGB, upright, on white."""
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I;16") or picture.mode == "I":  # Pillow would clip, not scale
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> uint8 (3, H, W); the ViT normalises, on its device."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def eval_transform(picture: Image.Image, size: int) -> Tensor:
    """Bicubic to size x size, whatever the aspect ratio was (as in the original) -> uint8 (3, size, size)."""
    return to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC))


Box = tuple[float, float, float, float]  # left, top, right, bottom


def decode_crop(picture: Image.Image, size: int, rng: np.random.Generator) -> tuple[Image.Image, Box]:
    """Paper 3.4: a random crop, of 0.5 to 1.0 of the area -> the upright RGB picture, and the crop in its pixels.

    A JPEG that has not been decoded yet is decoded at a half, a quarter or an eighth of its size, where the crop still
    has `size` pixels a side then.
    """
    if not isinstance(picture, JpegImageFile):
        picture = to_rgb(picture)
    turned = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by a quarter
    width, height = picture.size[::-1] if turned else picture.size
    left, top, right, bottom = random_crop(width, height, rng)
    shrink = max(1.0, min(right - left, bottom - top) / size)
    picture.draft(None, (int(picture.width / shrink), int(picture.height / shrink)))
    picture = to_rgb(picture)
    x, y = picture.width / width, picture.height / height  # 1, if it has not been shrunk
    return picture, (left * x, top * y, min(right * x, picture.width), min(bottom * y, picture.height))


def train_transform(picture: Image.Image, box: Box, size: int, rng: np.random.Generator, flip: bool) -> Tensor:
    """What `decode_crop` gives, resized, and if `flip` mirrored half of the time -> uint8 (3, size, size)."""
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if flip and rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    return to_tensor(picture)


def random_crop(width: int, height: int, rng: np.random.Generator) -> Box:
    """0.5 to 1.0 of the area with an aspect ratio of 3/4 to 4/3."""
    for _ in range(10):
        area = width * height * rng.uniform(0.5, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side_w, side_h = min(width, height * 4 / 3), min(height, width * 4 / 3)  # a very long picture: its middle
    left, top = (width - side_w) / 2, (height - side_h) / 2
    return left, top, left + side_w, top + side_h


# --- text ------------------------------------------------------------------------------------------------------------


NOTHING = re.compile(r'[\s.!"()*#:;~]*')  # of which `clean_caption` leaves nothing


def is_text(thing) -> bool:
    """Is it a string of which something is left when it is cleaned, and no broken half of a character?"""
    return isinstance(thing, str) and not NOTHING.fullmatch(thing) and not re.search("[\ud800-\udfff]", thing)


def clean_caption(caption: str, max_words: int = 50) -> str:
    """The original's caption cleaning: lower case, `. ! " ( ) * # : ; ~` to spaces, single spaces, at most 50 words."""
    caption = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).strip()
    return " ".join(caption.split(" ")[:max_words])


def clean_question(question: str, max_words: int = 50) -> str:
    """The original's question cleaning: as for captions, but what is taken out leaves no space behind."""
    return " ".join(re.sub(r'[.!"()*#:;~]', "", question.lower()).rstrip(" ").split(" ")[:max_words])


def says_left_or_right(captions: list[str]) -> bool:
    """A mirrored photo would make such a caption false."""
    return any(re.search(r"\b(left|right)", caption.lower()) for caption in captions)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, from any of the files that the hubs have."""
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.txt").exists():
        tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"))._tokenizer
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():  # OPT
        tokenizer = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))._tokenizer
        special = ("<s>", "<pad>", "</s>", "<unk>")
        tokenizer.add_special_tokens([token for token in special if tokenizer.token_to_id(token) is not None])
    else:
        more = " (a spiece.model is not read: T5 v1.1 has the words of Flan-T5, whose tokenizer.json fits)"
        raise UserError(
            f"{folder} has no tokenizer: expected tokenizer.json, vocab.txt, or vocab.json with merges.txt in it"
            + more * (folder / "spiece.model").exists()
        )
    tokenizer.no_padding()  # some published files have it switched on
    tokenizer.no_truncation()
    return tokenizer


class Texts:
    """BERT's tokenizer with [DEC] behind its vocabulary: captions to ids and back."""

    def __init__(self, folder: str | Path, max_tokens: int = 32):
        folder = Path(folder)
        self.tokenizer = open_tokenizer(folder)
        self.tokenizer.enable_truncation(max_tokens)
        self.max_tokens = max_tokens
        self.tokenizer.add_special_tokens(["[DEC]"])  # some published files have it
        self.pad_id, self.cls_id, self.sep_id = (self.tokenizer.token_to_id(t) for t in ("[PAD]", "[CLS]", "[SEP]"))
        if None in (self.pad_id, self.cls_id, self.sep_id):
            raise UserError(f"{folder} is not BERT's tokenizer: expected the tokens [PAD], [CLS] and [SEP] in it")
        self.vocab_size = self.tokenizer.token_to_id("[DEC]") + 1

    def encode(self, captions: list[str]) -> list[list[int]]:
        """Cleaned and tokenized: [CLS] ... [SEP], at most `max_tokens`."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch([clean_caption(c) for c in captions])]

    def decode(self, ids: list[int]) -> str:
        """Ids, special tokens skipped, to a string."""
        return self.tokenizer.decode(ids)

    def batch(self, drawn: list["Drawn"], seeds: list[list[int]], image_ids: list[int], **rest) -> "Batch":
        """What stage 1 learns of: captions."""
        ids = self.encode([text for _, text in drawn])
        truncated = sum(len(tokens) == self.max_tokens for tokens in ids)
        return make_batch(ids, self.pad_id, image_ids, truncated=truncated, **rest)

    def hf_tokenizer(self) -> tuple[Tokenizer, dict[str, str]]:
        """As transformers reads it, and the names of its special tokens."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.no_truncation()  # its BLIP-2 processor stumbles over one
        return tokenizer, {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}

    def save(self, folder: Path) -> None:
        """tokenizer.json, from which `Texts` can be opened again."""
        self.tokenizer.save(str(folder / "tokenizer.json"))


class LLMTexts:
    """The language model's tokenizer: prompts and texts, with the tokens in front of them and behind them.

    layout: `llm.Layout`. OPT reads "</s> prompt" and writes "text newline", T5 reads "prompt </s>" and writes
    "text </s>".
    """

    def __init__(self, folder: str | Path, layout, max_tokens: int = 32):
        self.folder, self.layout, self.max_tokens = Path(folder), layout, max_tokens
        self.tokenizer = open_tokenizer(self.folder)
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.start, self.end = ([self.token(t)] if t else [] for t in (layout.prompt_start, layout.prompt_end))
        self.end_id, self.pad_id = self.token(layout.text_end), self.token("<pad>")

    def token(self, text: str) -> int:
        """The one token that the text is."""
        token = self.tokenizer.token_to_id(text)
        ids = self.encode([text])[0] if token is None else [token]
        if len(ids) != 1:
            raise UserError(f"the tokenizer in {self.folder} has no token {text!r}: use the language model's own")
        return ids[0]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """As they are, without special tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def hf_tokenizer(self) -> tuple[Tokenizer, dict[str, str]]:
        """As transformers reads it, with the tokens around a prompt put in by itself and one for an image, and the
        names of its special tokens."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.add_special_tokens(["<image>"])
        around = [token for token in (self.layout.prompt_start, "$A", self.layout.prompt_end) if token]
        special = [(token, self.token(token)) for token in around if token != "$A"]
        tokenizer.post_processor = TemplateProcessing(single=" ".join(around), special_tokens=special)
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        return tokenizer, names | ({"bos_token": self.layout.prompt_start} if self.start else {})

    def encode_prompts(self, prompts: list[str]) -> list[list[int]]:
        """What the model reads behind the visual embeddings."""
        return [self.start + ids + self.end for ids in self.encode(prompts)]

    def encode_texts(self, texts: list[str], prompts: list[str]) -> list[list[int]]:
        """What it shall write behind the prompts."""
        glued = [(self.layout.glue if prompt else "") + text for text, prompt in zip(texts, prompts, strict=True)]
        return [ids + [self.end_id] for ids in self.encode(glued)]

    def decode(self, ids: list[int]) -> str:
        """Ids, special tokens skipped, to a string without space around it."""
        return self.tokenizer.decode(ids).strip()

    def batch(self, drawn: list["Drawn"], seeds: list[list[int]], image_ids: list[int], **rest) -> "Batch":
        """What stage 2 learns of: the caption; or its second part given the first, cut at random (prefix LM)."""
        pairs = [("", clean_caption(caption)) for _, caption in drawn]
        if self.layout.prefix_lm:
            rngs = map(np.random.default_rng, seeds)
            pairs = [cut_in_two(caption, rng) for (_, caption), rng in zip(pairs, rngs)]
        return self.pairs_batch(pairs, image_ids, **rest)

    def pairs_batch(self, pairs: list[tuple[str, str]], image_ids: list[int], **rest) -> "Batch":
        """(prompt, what shall be written behind it) each; both are cut where they are too long."""
        prompts, texts = map(list, zip(*pairs, strict=True))
        prompt_ids, target_ids, truncated = self.encode_prompts(prompts), self.encode_texts(texts, prompts), 0
        for row, (prompt, target) in enumerate(zip(prompt_ids, target_ids, strict=True)):
            # OPT's text counts from [BOS] on, T5's two sides count each for itself, as in the original; and so do a
            # prompt and its answer.
            room = self.max_tokens - (0 if self.layout.prefix_lm or prompts[row] else len(prompt))
            truncated += len(prompt) > self.max_tokens or len(target) > room
            prompt_ids[row] = cut_short(prompt, self.max_tokens, self.end)
            target_ids[row] = cut_short(target, room, [self.end_id])
        side = self.layout.pads
        return make_llm_batch(prompt_ids, target_ids, self.pad_id, side, image_ids, truncated=truncated, **rest)

    def question_prompt(self, template: str, question: str) -> str:
        """The question in the template; of one that is too long, the first words."""
        words = question.split()
        while len(words) > 1 and len(self.encode_prompts([ask_in(template, " ".join(words))])[0]) > self.max_tokens:
            words.pop()
        return ask_in(template, " ".join(words))


@dataclass
class PromptedTexts:
    """What fine-tuning for captions learns of (paper, Table 7): the caption behind a prompt."""

    texts: LLMTexts
    prompt: str

    def batch(self, drawn: list["Drawn"], seeds: list[list[int]], image_ids: list[int], **rest) -> "Batch":
        """See `LLMTexts.batch`."""
        return self.texts.pairs_batch([(self.prompt, clean_caption(text)) for _, text in drawn], image_ids, **rest)


@dataclass
class QuestionTexts:
    """What fine-tuning for VQA learns of (paper 4.3): the answer behind its question, which the Q-Former reads as well
    (Figure 7) if `qformer_texts` are given."""

    texts: LLMTexts
    template: str
    qformer_texts: Texts | None

    def batch(self, drawn: list["Drawn"], seeds: list[list[int]], image_ids: list[int], **rest) -> "Batch":
        """See `LLMTexts.batch`."""
        pairs = [(self.texts.question_prompt(self.template, question), answer) for question, answer in drawn]
        batch = self.texts.pairs_batch(pairs, image_ids, **rest)
        if self.qformer_texts is None:
            return batch
        text_ids, text_mask = pad(self.qformer_texts.encode([q for q, _ in drawn]), self.qformer_texts.pad_id)
        return replace(batch, text_ids=text_ids, text_mask=text_mask)


def cut_short(ids: list[int], room: int, end: list[int]) -> list[int]:
    """At most `room` tokens that still end as they should (the original cuts OPT's newline off)."""
    return ids if len(ids) <= room else ids[: room - len(end)] + end


def cut_in_two(caption: str, rng: np.random.Generator) -> tuple[str, str]:
    """Prefix and suffix of a caption of n words (paper 3.3), after 0 to n - 1 of them: so the prefix may be empty."""
    words = caption.split()
    cut = int(rng.integers(len(words)))
    return " ".join(words[:cut]), " ".join(words[cut:])


def pad(ids: list[list[int]], pad_id: int, side: str = "right", multiple: int = 8) -> tuple[Tensor, Tensor]:
    """Token lists -> ids (B, T) and mask (B, T) bool; T is the longest, rounded up to 8 for the matrix units."""
    longest = -(-max(map(len, ids), default=0) // multiple) * multiple
    padded, mask = torch.full((len(ids), longest), pad_id), torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, real, tokens in zip(padded, mask, ids, strict=True):
        place = slice(longest - len(tokens), None) if side == "left" else slice(len(tokens))
        row[place], real[place] = torch.tensor(tokens), True
    return padded, mask


def ask_in(template: str, turns) -> str:
    """A question put into the template, or a conversation: [(question, answer), ..., question].

    With the template "Question: {} Answer:", the turns ("what is it?", "a dog") and "what color?" become
    "Question: what is it? Answer: a dog. Question: what color? Answer:".
    """
    if "{}" not in template:
        raise UserError(f"got the template {template!r}, expected {{}} in it, where the question goes")
    *past, question = [turns] if isinstance(turns, str) else turns
    said = [f"{template.replace('{}', asked)} {answer.rstrip('.')}." for asked, answer in past]
    return " ".join([*said, template.replace("{}", question)])


# --- photo sets ------------------------------------------------------------------------------------------------------


Drawn = tuple[str, str]  # what a step of training shows of a photo: "" and a caption, or a question and an answer


class Annotations:
    """An annotation file beside a folder of photos.

    .json:  [{"image": "a.jpg", "caption": "..." or ["...", ...], "image_id": optional}, ...]; or, with `questions`,
            [{"image": "a.jpg", "question": "...", "answer": "..." or ["...", ...], "question_id": optional}, ...];
            or what data sets publish, see layouts.py
    .jsonl: one such record a line

    Photos are looked for in the folders `images`, in turn, by default in the file's own. All records are checked at
    once; afterwards they are kept as one block of bytes, which the loader's workers share instead of copying.
    """

    neighbours = 1  # every photo stands for itself

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        images: list[str] | None = None,
        questions: bool = False,
        need_texts: bool = True,
    ):
        self.need_texts = need_texts and not questions  # else a photo without captions, or answers, may be told of
        self.path, self.folders, self.asks = Path(path), [Path(f) for f in images or [Path(path).parent]], questions
        self.texts, self.unanswered = 0, 0  # captions or questions of all photos; questions without an answer
        check_annotations(self.path)
        content, offsets = bytearray(), array("q", [0])
        for record in self.check(stream_records(self.path, split)):
            content += json.dumps(record).encode()
            offsets.append(len(content))
        self.bytes, self.offsets = np.frombuffer(content, np.uint8), np.frombuffer(offsets, np.int64)

    def check(self, records):
        """Every record, its captions or answers as a list; UserError with the first bad ones."""
        what, problems = "answer" if self.asks else "caption", []
        needed = "question" if self.asks else "caption"
        for number, record in enumerate(records):
            missing = needed not in record and (self.asks or self.need_texts) if isinstance(record, dict) else True
            if missing or not isinstance(record.get("image"), str):
                got = sorted(record) if isinstance(record, dict) else type(record).__name__
                problems.append(f'record {number} has {got}, expected "image" and "{needed}"')
                continue
            texts = record.get(what, [])
            texts = texts if isinstance(texts, list) else [texts]
            kind = what if not all(map(is_text, texts)) or (self.need_texts and not texts) else None
            if kind is None and self.asks and not is_text(record[needed]):
                kind = needed
            if kind:
                problems.append(f"record {number} ({record['image']}) has an empty {kind}: write one, or take it out")
                continue
            self.texts += 1 if self.asks else len(texts)
            self.unanswered += self.asks and not texts
            yield record | {what: texts}
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UserError(f"{self.path}: {'; '.join(problems[:3])}{more}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def record(self, index: int) -> dict:
        """As written in the file, but "caption" and "answer" are always lists."""
        return json.loads(self.bytes[self.offsets[index] : self.offsets[index + 1]].tobytes())

    def captions(self, index: int) -> list[str]:
        """The photo's captions, one or several."""
        return self.record(index)["caption"]

    def draw(self, index: int, rng: np.random.Generator) -> Drawn:
        """What a step of training shows: one of the captions, or the question and one of its answers, by how many
        people gave it."""
        record = self.record(index)
        return record.get("question", ""), choose(record["answer" if self.asks else "caption"], rng)

    def key(self, index: int) -> str:
        """What makes it this photo: its image_id, else its file name. Equal keys are one photo."""
        record = self.record(index)
        return str(record["image"] if record.get("image_id") is None else record["image_id"])

    def name(self, index: int) -> str:
        """The photo's path."""
        return str(find_file(self.folders, self.record(index)["image"]))

    def picture(self, index: int) -> Image.Image:
        """The photo, upright, RGB."""
        return open_picture(self.name(index))

    def train_view(self, index: int, size: int, rng: np.random.Generator) -> Tensor:
        """The photo as a step of training sees it: a random crop, mirrored or not."""
        record = self.record(index)
        texts = [record["question"], *record["answer"]] if self.asks else record["caption"]
        with opened(find_file(self.folders, record["image"])) as picture:
            crop = decode_crop(picture, size, rng)
        return train_transform(*crop, size, rng, not says_left_or_right(texts))

    def content_sha256(self) -> str:
        """Of all records: which split of which data set it is."""
        return hashlib.sha256(self.bytes.tobytes()).hexdigest()

    def fingerprint(self) -> str:
        """Changes when any photo or their order does."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            path = Path(self.name(index))
            stat = path.stat() if path.exists() else None
            digest.update(f"{path.name} {stat and stat.st_size} {stat and stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def find_file(folders: list[Path], name: str) -> Path:
    """In the first of the folders that has it; else where it was expected."""
    for folder in folders[:-1]:
        if (folder / name).exists():
            return folder / name
    return folders[-1] / name


def check_annotations(spec: str | Path, flag: str = "data") -> None:
    """Refuse what is neither the shapes world nor a file."""
    if spec != "shapes" and not Path(spec).is_file():
        raise UserError(
            f"--{flag} {spec} {'is a folder' if Path(spec).is_dir() else 'does not exist'}: "
            "expected a .json or .jsonl file, or the word shapes"
        )


class Shapes(shapes.ShapesWorld):
    """The shapes world as a photo set."""

    asks, unanswered = False, 0

    @property
    def texts(self) -> int:
        """An epoch shows each picture once."""
        return len(self)

    def content_sha256(self) -> str:
        """Changes with the code that tells."""
        return hashlib.sha256(self.fingerprint().encode()).hexdigest()

    def key(self, index: int) -> str:
        """Every picture is a photo of its own."""
        return str(index)

    def draw(self, index: int, rng: np.random.Generator) -> Drawn:
        """One of the captions."""
        return "", choose(self.captions(index), rng)

    def name(self, index: int) -> str:
        """For messages."""
        return f"shapes {self.split} {index}"

    def train_view(self, index: int, size: int, rng: np.random.Generator) -> Tensor:
        """The whole picture: the captions tell of all that is in it and where, so a crop would make them false."""
        return eval_transform(self.picture(index), size)

    def fingerprint(self) -> str:
        """Changes with the code that draws and tells."""
        return hashlib.sha256(Path(shapes.__file__).read_bytes()).hexdigest() + f" {self.split} {self.size}"


class ShapesQuestions(Shapes):
    """The shapes world with one of the questions about a picture at a time."""

    neighbours, asks = 1, True  # nothing is compared, so twins need not be together

    def draw(self, index: int, rng: np.random.Generator) -> Drawn:
        """A question and its answer."""
        _, question, answer = choose(self.questions(index), rng)
        return question, answer


class Mixture:
    """Several photo sets in a row, or some photos of one."""

    def __init__(self, parts: list, chosen: np.ndarray | None = None, cached: "CachedTokens | None" = None):
        self.parts = parts
        self.cached = cached  # the frozen ViT's tokens of all photos of the parts, if they have been computed
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self.chosen = np.arange(self.starts[-1]) if chosen is None else chosen
        whole = len(parts) == 1 and chosen is None
        self.neighbours = parts[0].neighbours if whole else 1  # so many photos in a row belong together
        self.asks = parts[0].asks  # are there questions, or captions?

    def __len__(self) -> int:
        return len(self.chosen)

    def find(self, index: int) -> tuple[int, int]:
        """(which part, index in that part)."""
        row = self.chosen[index]
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return part, int(row - self.starts[part])

    def captions(self, index: int) -> list[str]:
        """The photo's captions."""
        part, row = self.find(index)
        return self.parts[part].captions(row)

    def draw(self, index: int, rng: np.random.Generator) -> Drawn:
        """What a step of training shows of the photo."""
        part, row = self.find(index)
        return self.parts[part].draw(row, rng)

    def record(self, index: int) -> dict:
        """As in the annotation file."""
        part, row = self.find(index)
        return self.parts[part].record(row)

    def picture(self, index: int) -> Image.Image:
        """The photo."""
        part, row = self.find(index)
        return self.parts[part].picture(row)

    def train_view(self, index: int, size: int, rng: np.random.Generator) -> Tensor:
        """The photo as a step of training sees it: uint8 (3, size, size)."""
        part, row = self.find(index)
        return self.parts[part].train_view(row, size, rng)

    def name(self, index: int) -> str:
        """The photo's path."""
        part, row = self.find(index)
        return self.parts[part].name(row)

    def image_id(self, index: int) -> int:
        """A stable int64 of the photo: the number of its set and a hash of its key there."""
        part, row = self.find(index)
        digest = hashlib.sha256(self.parts[part].key(row).encode()).digest()
        return part << 48 | int.from_bytes(digest[:6], "big")

    def tokens(self, rows: list[int]) -> Tensor:
        """Cached ViT tokens (n, P, V) of some photos. Raises UserError for a photo that could not be read."""
        slots = self.cached.slots[self.chosen[rows]].tolist()
        for slot in slots:
            if slot in self.cached.broken:
                raise UserError(self.cached.broken[slot])
        return torch.from_numpy(self.cached.tokens[slots])

    def fingerprint(self) -> str:
        """Changes when any photo, or their order, does."""
        parts = " ".join(part.fingerprint() for part in self.parts)
        return hashlib.sha256(parts.encode() + self.chosen.tobytes()).hexdigest()

    def texts(self) -> int:
        """How many captions, or questions, there are: what an epoch shows."""
        whole = sum(part.texts for part in self.parts)
        return whole if len(self) == self.starts[-1] else round(whole * len(self) / self.starts[-1])

    def content_sha256(self) -> str:
        """Changes when any text does."""
        return hashlib.sha256(" ".join(part.content_sha256() for part in self.parts).encode()).hexdigest()

    def held_out(self, photos: int) -> tuple["Mixture", "Mixture"]:
        """(the rest, `photos` photos): the same choice always, and no photo on both sides."""
        ids = np.array([self.image_id(index) for index in range(len(self))])
        unique = np.unique(ids)
        if photos >= len(unique):
            raise UserError(
                f"--val-photos {photos} of {len(unique)} photos leaves none to train on: pass a smaller number"
            )
        out = np.isin(ids, np.random.default_rng(0).choice(unique, photos, replace=False))
        return Mixture(self.parts, self.chosen[~out], self.cached), Mixture(self.parts, self.chosen[out], self.cached)


def open_photos(
    specs: list[str],
    split: str,
    image_size: int,
    images: list[str] | None = None,
    questions: bool = False,
    need_texts: bool = True,
) -> Mixture:
    """What `--data` names: "shapes" or annotation files, several are mixed; with captions, or with questions.

    need_texts: refuse photos without a caption, which are fine where they are to be told of. (Questions of a test set
    have no answers.)
    """
    world = ShapesQuestions if questions else Shapes
    return Mixture(
        [
            world(split, image_size) if spec == "shapes" else Annotations(spec, split, images, questions, need_texts)
            for spec in specs
        ]
    )


class CachedTokens:
    """A memory-mapped fp16 file of the frozen ViT's tokens, a slot a photo, and which photos could not be read.

    slots: of each row of the photo set, the slot of its photo; several questions about a photo share it.
    """

    def __init__(self, path: Path, slots: np.ndarray):
        self.tokens, self.slots = np.load(path, mmap_mode="r"), slots  # (photos, P, V), (rows,)
        self.broken = {int(slot): reason for slot, reason in read_json(path.with_suffix(".json")).items()}


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """One micro-batch of one process. Either `images` or, from the cache, `image_tokens` is there; text for the
    Q-Former (stage 1), or a prompt and what the language model shall write behind it (stage 2), or all (VQA)."""

    image_ids: Tensor  # (B,) int64, equal where the photo is the same
    label_rows: Tensor  # (n,) those b * T + t where logits are read: of text with a next word, or of target
    text_ids: Tensor | None = None  # (B, T)
    text_mask: Tensor | None = None  # (B, T) bool, True = real token
    prompt_ids: Tensor | None = None  # (B, n)
    prompt_mask: Tensor | None = None  # (B, n) bool
    target_ids: Tensor | None = None  # (B, T), padded on the right
    images: Tensor | None = None  # (B, 3, H, W) uint8
    image_tokens: Tensor | None = None  # (B, P, V) fp16
    broken: list[tuple[str, str]] = field(default_factory=list)  # photos that could not be read, and why
    truncated: int = 0  # texts that reach the limit: cut, or just as long

    def __len__(self) -> int:
        return len(self.image_ids)

    def map(self, function) -> "Batch":
        """The same with `function` applied to its tensors."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(t) for name, t in tensors.items() if isinstance(t, Tensor)})

    def to(self, device) -> "Batch":
        """On the device; without waiting if pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the loader."""
        return self.map(Tensor.pin_memory)


def make_batch(ids: list[list[int]], pad_id: int, image_ids: list[int], **rest) -> Batch:
    """Tokens and photo ids -> Batch, padded, with the positions that ITG predicts from."""
    text_ids, text_mask = pad(ids, pad_id)
    has_next = torch.zeros_like(text_mask)
    has_next[:, :-1] = text_mask[:, 1:]
    rows = has_next.flatten().nonzero().squeeze(1)
    return Batch(torch.tensor(image_ids), rows, text_ids=text_ids, text_mask=text_mask, **rest)


def make_llm_batch(
    prompts: list[list[int]], targets: list[list[int]], pad_id: int, side: str, image_ids: list[int], **rest
) -> Batch:
    """Tokens of prompts and of what shall be written, and photo ids -> Batch, padded."""
    prompt_ids, prompt_mask = pad(prompts, pad_id, side, multiple=1)
    target_ids, target_mask = pad(targets, pad_id)
    rows, ids = target_mask.flatten().nonzero().squeeze(1), torch.tensor(image_ids)
    return Batch(ids, rows, prompt_ids=prompt_ids, prompt_mask=prompt_mask, target_ids=target_ids, **rest)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The randomness of one sample; its first draw chooses the caption or the answer."""
    return np.random.default_rng([seed, position])


def choose(texts: list, rng: np.random.Generator):
    """Paper 3.4: "randomly sample one at each pre-training step"."""
    return texts[rng.integers(len(texts))]


class TrainBatches(Dataset):
    """(position, index) pairs of a step -> its Batch. A photo that cannot be read is replaced by the next that can."""

    def __init__(
        self, photos: Mixture, texts: Texts | LLMTexts | PromptedTexts | QuestionTexts, image_size: int, seed: int
    ):
        self.photos, self.texts, self.image_size, self.seed = photos, texts, image_size, seed

    def __len__(self) -> int:
        return len(self.photos)

    def __getitems__(self, samples: list[tuple[int, int]]) -> Batch:
        found = [self.sample(position, index) for position, index in samples]
        drawn, rows, views, broken = zip(*found, strict=True)
        return self.texts.batch(
            drawn,
            [[self.seed, position, 1] for position, _ in samples],  # of what a text is cut by
            [self.photos.image_id(row) for row in rows],
            **{"image_tokens" if self.photos.cached else "images": torch.stack(views)},
            broken=[photo for photos in broken for photo in photos],
        )

    def sample(self, position: int, index: int) -> tuple[Drawn, int, Tensor, list[tuple[str, str]]]:
        """(what is shown, row, picture or its cached tokens, photos that could not be read on the way)."""
        broken = []
        tries = min(100, len(self.photos))  # so many unreadable photos in a row are no accident
        for attempt in range(tries):
            row = (index + attempt) % len(self.photos)
            rng = sample_rng(self.seed, position)
            drawn = self.photos.draw(row, rng)
            try:
                if self.photos.cached:
                    return drawn, row, self.photos.tokens([row])[0], broken
                return drawn, row, self.photos.train_view(row, self.image_size, rng), broken
            except UserError as error:
                broken.append((self.photos.name(row), str(error)))
        raise UserError(f"none of {tries} photos in a row can be read; the last: {broken[-1][1]}")


class EvalPictures(Dataset):
    """Rows of photos -> (the readable rows, {row: why not} of the others, uint8 pictures (n, 3, size, size))."""

    def __init__(self, photos: "Mixture | PictureFiles", image_size: int):
        self.photos, self.image_size = photos, image_size

    def __len__(self) -> int:
        return len(self.photos)

    def __getitems__(self, rows: list[int]) -> tuple[list[int], dict[int, str], Tensor]:
        readable, broken, pictures = [], {}, []
        for row in rows:
            try:
                pictures.append(eval_transform(self.photos.picture(row), self.image_size))
                readable.append(row)
            except UserError as error:
                broken[row] = str(error)
        return readable, broken, torch.stack(pictures) if pictures else torch.empty(0)


class PictureFiles:
    """The pictures of a folder, for `picture_loader`."""

    cached = None

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def picture(self, row: int) -> Image.Image:
        """The picture, upright, RGB."""
        return open_picture(self.paths[row])


class StepSampler(Sampler):
    """Which samples a process sees, step after step, micro-batch after micro-batch; it can start at any step.

    Each epoch is a new permutation of the photos, cut into global batches; the tail is dropped. The captions of a
    global batch are of similar length (among those of WINDOW batches), so that almost no padding is computed: on
    Flickr8k 16 tokens a text instead of 32. The order of the global batches is random again. The twins of the shapes
    world stay together, so that ITC and ITM have to tell them apart.
    """

    WINDOW = 16

    def __init__(
        self, photos: Mixture, seed: int, batch: int, accumulate: int, steps: int, start: int, rank: int, world: int
    ):
        self.photos, self.seed, self.steps, self.start = photos, seed, steps, start
        self.batch, self.accumulate, self.rank, self.world = batch, accumulate, rank, world
        self.global_batch, self.shuffled = batch * accumulate * world, (-1, None)
        self.per_epoch = len(photos) // photos.neighbours * photos.neighbours // self.global_batch
        if self.per_epoch == 0:
            raise UserError(
                f"{len(photos)} photos are fewer than one step's {self.global_batch} "
                f"({batch} x {accumulate} accumulated x {world} processes): pass a smaller --batch"
            )

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self):
        step = self.start
        while step < self.steps:
            epoch, number = divmod(step, self.per_epoch)
            window, first = divmod(number, self.WINDOW)
            for samples in self.window(epoch, window)[first:]:
                if step == self.steps:
                    return
                for part in range(self.accumulate):  # this process's rows of each micro-batch
                    begin = (part * self.world + self.rank) * self.batch
                    yield samples[begin : begin + self.batch]
                step += 1

    def window(self, epoch: int, window: int) -> list[list[tuple[int, int]]]:
        """The global batches of one window, in order, each of (position, index) pairs."""
        together, size = self.photos.neighbours, self.WINDOW * self.global_batch
        if self.shuffled[0] != epoch:  # of millions of photos it takes a second, so once
            groups = np.random.default_rng([self.seed, epoch]).permutation(len(self.photos) // together)
            self.shuffled = epoch, (groups[:, None] * together + np.arange(together)).flatten()
        order = self.shuffled[1][: self.per_epoch * self.global_batch]
        chosen = order[window * size : (window + 1) * size]
        first = epoch * len(self.photos) + window * size
        samples = [(first + place, int(index)) for place, index in enumerate(chosen)]
        groups = [samples[i : i + together] for i in range(0, len(samples), together)]
        if not self.photos.asks:  # questions of a kind are equally long: a batch of them would pull one way
            groups.sort(key=lambda group: max(map(self.caption_length, group)))
        samples = sum(groups, [])
        batches = [samples[i : i + self.global_batch] for i in range(0, len(samples), self.global_batch)]
        rng = np.random.default_rng([self.seed, epoch, window])
        return [batches[i] for i in rng.permutation(len(batches))]

    def caption_length(self, sample: tuple[int, int]) -> int:
        """Words of the caption that the sample will show."""
        position, index = sample
        return len(self.photos.draw(index, sample_rng(self.seed, position))[1].split())


def as_it_is(batch):
    """The loaders' collate: the data sets have made the batch already."""
    return batch


def cores() -> int:
    """Of this machine, the share of each of its processes."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def decoding_workers() -> int:
    """How many processes are worth starting to decode photos."""
    return min(8, max(1, cores() - 1))


def train_loader(batches: TrainBatches, sampler: StepSampler, workers: int, pin: bool) -> DataLoader:
    """Batches, made by worker processes ahead of time."""
    return DataLoader(
        batches,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )


def picture_loader(
    photos: Mixture | PictureFiles, image_size: int, batches: list[list[int]], workers: int = 0
) -> DataLoader:
    """`EvalPictures` of batches of rows, in order."""
    return DataLoader(
        EvalPictures(photos, image_size),
        batch_sampler=batches,
        num_workers=max(0, workers),
        collate_fn=as_it_is,
        generator=torch.Generator(),  # else a loader draws from the global one, and a validation would change dropout
    )


# --- before a long run -----------------------------------------------------------------------------------------------


class Files(Dataset):
    """Paths -> (a hash of the file's content, why it cannot be read or "")."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[str, str]:
        try:
            content = Path(self.paths[row]).read_bytes()
            open_picture(self.paths[row])
        except OSError as error:
            return "", f"{self.paths[row]} cannot be read ({error.strerror}): check the name and the folder (--images)"
        except UserError as error:
            return "", str(error)
        return hashlib.sha256(content).hexdigest(), ""


def check(args: argparse.Namespace) -> None:
    """Read every record and every photo of some annotation files, and tell what is wrong with them.

    Raises SystemExit(1) where anything is.
    """
    problems: dict[str, list[str]] = {}
    texts = Texts(args.bert, 10**6) if args.bert else None
    if texts is None:
        print("the lengths of texts are not checked: add --bert FOLDER to see which are cut")
    photos_of: list[dict[str, str]] = []  # of each file: photo -> hash of its content
    for file in map(Path, args.annotations):
        name, records = open_records(file, args.split)
        folders = [Path(folder) for folder in args.images or [file.parent]]
        whole = [isinstance(record, dict) and isinstance(record.get("image"), str) for record in records]
        if not all(whole):
            bad = [json.dumps(record) for record, fine in zip(records, whole) if not fine]
            problems[f'{file}: records without "image"'] = bad
        records = [record for record, fine in zip(records, whole) if fine]
        paths = list(dict.fromkeys(str(find_file(folders, record["image"])) for record in records))
        where = ", ".join(map(str, folders))
        print(f"{file}: {name}, {len(records):,} records, {len(paths):,} photos in {where}", flush=True)
        problems |= {
            f"{file}: {kind}": rows for kind, rows in text_problems(records, texts, args.max_text_tokens).items()
        }
        hashes, started = {}, time.time()
        for path, (content, reason) in zip(paths, DataLoader(Files(paths), None, num_workers=args.workers)):
            hashes[path] = content
            if reason:
                problems.setdefault(f"{file}: photos that cannot be read", []).append(reason)
            if len(hashes) % 10_000 == 0:
                print(f"  {len(hashes):,} photos, {len(hashes) / (time.time() - started):.0f} a second", flush=True)
        first: dict[str, str] = {}
        for path, content in hashes.items():
            if content and first.setdefault(content, path) != path:
                same = f"{path} is the same picture as {first[content]}: give their records one image_id"
                problems.setdefault(f"{file}: photos that are there twice", []).append(same)
        photos_of.append({content: path for path, content in hashes.items() if content})
        for before, other in zip(photos_of, args.annotations):
            if shared := [f"{path} is also in {other}" for content, path in photos_of[-1].items() if content in before]:
                if other != str(file):
                    problems[f"{file}: photos of {other}, fine unless one is to train and one to test"] = shared
    for kind, rows in problems.items():
        print(f"{kind}: {len(rows):,}", *(f"  {row}" for row in rows[:5]), sep="\n")
        if len(rows) > 5:
            print(f"  and {len(rows) - 5:,} more")
    print(f"{sum(map(len, problems.values())):,} problems" if problems else "fine")
    if problems:
        raise SystemExit(1)


def text_problems(records: list[dict], texts: Texts | None, limit: int) -> dict[str, list[str]]:
    """What is wrong with the texts of some records, by kind; `limit` is that of their tokens, if these are counted."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    is_test = not any(record.get("answer") or record.get("caption") for record in records)
    if is_test:
        print("  no record has a caption or an answer: fine for a test set, nothing to train on")
    for record in records:
        asks = "question" in record
        said = record.get("answer" if asks else "caption", [])
        said = said if isinstance(said, list) else [said]
        read = [record["question"]] if asks else said
        if not said and not is_test:
            found.setdefault(f"without {'an answer' if asks else 'a caption'}", []).append(json.dumps(record))
        for text in said + ([record["question"]] if asks else []):
            if not is_text(text):
                found.setdefault("with an empty text", []).append(json.dumps(record))
        for text, ids in zip(read, texts.encode([str(text) for text in read]) if texts and read else []):
            if len(ids) > limit:
                row = f"{len(ids)} tokens: {text}"
                found.setdefault(f"texts that are cut at {limit} tokens (--max-text-tokens)", []).append(row)
        key = json.dumps(record, sort_keys=True)
        if key in seen:
            found.setdefault("records that are there twice", []).append(key)
        seen.add(key)
    return found


def convert(args: argparse.Namespace) -> None:
    """Write the records of a published annotation file as this project has them, whole or not at all."""
    name, records = open_records(Path(args.file), args.split, args.answers and Path(args.answers))
    out = Path(args.out)
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist, make it first")
    texts = sum(len(record.get("caption", ["one question"])) for record in records)
    what = "questions" if "question" in records[0] else "captions"
    partial = out.with_name(f".{out.name}.tmp")
    partial.write_text(json.dumps(records) + "\n", encoding="utf-8")
    os.replace(partial, out)
    print(f"{args.file}: {name}, {len({record['image'] for record in records}):,} photos, {texts:,} {what}")
    print(f"written to {out}; the photos: {records[0]['image']}, ... (pass their folder as --images)")


def main(argv: list[str] | None = None) -> None:
    """python data.py check | convert"""
    parser = argparse.ArgumentParser(description="Annotation files, before a long run.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="missing and broken photos, duplicates, empty and long texts")
    p.add_argument("annotations", nargs="+", help="annotation files; what several have in common is told")
    p.add_argument("--images", action="append", help="folder of the photos, if not beside the file; may be repeated")
    p.add_argument("--bert", help="count the tokens of this BERT: which texts are cut at --max-text-tokens?")
    p.add_argument("--max-text-tokens", type=int, default=32)
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read photos")
    p.set_defaults(run=check)
    c = commands.add_parser("convert", help="from a published layout (layouts.py) to this project's records")
    c.add_argument("file", help="captions or questions")
    c.add_argument("answers", nargs="?", help="VQA's second file, the annotations")
    c.add_argument("--out", required=True, help="the .json to write")
    c.set_defaults(run=convert)
    for sub in (p, c):
        sub.add_argument("--split", default="train", help="of Karpathy's files")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(say_sentence(main))
