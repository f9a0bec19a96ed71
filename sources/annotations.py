"""Sources of samples: annotation files and the shapes world; tar shards are in shards.py, mixtures in mixture.py.

A source is a sequence of samples. A sample is one image with its texts and has

    name                        its path, for messages
    captions                    list of strings
    record                      as in the annotation file
    read_bytes(), open()        the image file's bytes; the upright RGB image
    augment(size, rng)          uint8 (3, size, size), as a training step sees it
    texts()                     what can be learned of it: ("", caption) or (question, answer) pairs
    sample_text(rng)            one of these

A source also has image_ids (equal ones are one image), the words of a sample's text, counts, and hashes of what it
holds. Its blocks are what `--shuffle-shards` keeps together.
"""

import hashlib
import json
import os
import re
from array import array
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from engine.distributed import print0
from engine.draws import SampleRngs
from engine.errors import UserError, expect, shorten
from engine.progress import progress
from sources import shapes
from sources.images import decode_crop, eval_transform, image_header, open_image, train_transform
from sources.layouts import stream_records
from sources.text import is_string, is_text, says_left_or_right

SIZED_FILES = 10_000  # image files whose sizes are compared on --resume
Target = tuple[str, str]  # ("", caption) or (question, answer)


class Sample:
    """What the samples of all sources have in common."""

    record: dict = {}

    def sample_text(self, rng: np.random.Generator) -> Target:
        """Paper 3.4: "randomly sample one at each pre-training step"."""
        texts = self.texts()
        return texts[rng.integers(len(texts))]


class StoredImage(Sample):
    """A sample whose image is stored: `file` is its path, or an open file."""

    def open(self) -> Image.Image:
        """The upright RGB image."""
        return open_image(self.file, self.name)

    def augment(self, size: int, rng: np.random.Generator) -> Tensor:
        """A random crop, mirrored half of the time unless a text says left or right."""
        texts = [self.record.get("question", ""), *self.record.get("answer", []), *self.captions]
        with image_header(self.file, self.name) as image:
            crop = decode_crop(image, size, rng)
        return train_transform(*crop, size, rng, not says_left_or_right(texts))


class Source:
    """What all sources have in common."""

    asks, unanswered = False, 0  # questions, or captions? How many questions have no answer?
    group_size = 1  # consecutive images that stay in one batch

    @cached_property
    def blocks(self) -> np.ndarray:
        """Where parts of the source that are stored together begin, and its end: (blocks + 1,)."""
        return np.array([0, len(self)])

    def words(self, rows: np.ndarray, rngs: SampleRngs) -> list[int]:
        """Words of the text that each sample shows with its random numbers."""
        return [len(self[row].sample_text(rng)[1].split()) for row, rng in zip(rows.tolist(), rngs)]


SHARED = 0x7FFF << 48  # bits of an id that names the same image in every set
SHA256 = re.compile("[0-9a-f]{64}")


def image_id(record: dict, name: str) -> int:
    """An id of the image of a record, else of its name: 48 bits of a hash.

    An image_id that is no number ("coco_57870"), or the "sha256" of the image, says the same in every set, and has the
    bits SHARED too; a number, or a file name, counts within its own set.
    """
    own, content = record.get("image_id"), record.get("sha256")
    known = isinstance(own, str) and not own.isdecimal()
    if not known and isinstance(content, str) and SHA256.fullmatch(content):
        return SHARED | int(content[:12], 16)
    digest = hashlib.sha256(str(name if own is None else own).encode(errors="surrogatepass")).digest()
    return known * SHARED | int.from_bytes(digest[:6], "big")


# --- annotation files ------------------------------------------------------------------------------------------------


class AnnotatedImage(StoredImage):
    """A sample of an annotation file."""

    def __init__(self, record: dict, folders: list[Path]):
        self.record, self.folders, self.captions = record, folders, record.get("caption", [])

    @cached_property
    def name(self) -> str:
        """Path of the image: in the first folder that has it, else in the last."""
        paths = [folder / self.record["image"] for folder in self.folders]
        return str(next(filter(os.path.exists, paths[:-1]), paths[-1]))

    @property
    def key(self) -> str:
        """Its image_id, else its file name."""
        return str(self.record.get("image_id", self.record["image"]))

    @property
    def file(self) -> str:
        """Where the image is."""
        return self.name

    def read_bytes(self) -> bytes:
        """The image file."""
        return Path(self.name).read_bytes()

    def texts(self) -> list[Target]:
        """The captions; or the question with each of its answers, which people may have given several times. One that
        gave none teaches nothing."""
        if "question" in self.record:
            return [(self.record["question"], answer) for answer in self.record["answer"] if answer.strip()]
        return [("", caption) for caption in self.captions]


class AnnotationFile(Source):
    """An annotation file of captions, or with `questions` of questions, and the folders of its images.

    The layout of the file is any of layouts.py, or it is a folder. Images are looked for in the folders `images`, in
    turn, by default in the file's own. All records are checked at once, then kept as one block of bytes, which the
    loader's workers share instead of copying.
    """

    def __init__(self, path: str | Path, split="train", images: list | None = None, questions=False, need_texts=True):
        """need_texts: refuse images without a caption. (Questions of a test set have no answers.)"""
        self.path, self.asks = Path(path), questions
        self.folders = [Path(f) for f in images or [path if os.path.isdir(path) else Path(path).parent]]
        self.need_texts = need_texts and not questions
        self.num_texts, self.unanswered, self.empty = 0, 0, 0  # captions or questions; these without an answer, a word
        expect_there(self.path)
        content, offsets, ids = bytearray(), array("q", [0]), (array("q"), array("q"))
        lengths, firsts = bytearray(), array("q", [0])  # words of each caption, and where a record's begin
        for record in progress(self.checked(stream_records(self.path, split)), f"reading {self.path}"):
            content += json.dumps(record).encode()
            offsets.append(len(content))
            lengths += bytes(min(255, len(caption.split())) for caption in record.get("caption", []))
            firsts.append(len(lengths))
            ids[0].append(hash(AnnotatedImage(record, []).key))
            ids[1].append(hash(record["image"]))
        self.bytes, self.offsets = np.frombuffer(content, np.uint8), np.frombuffer(offsets, np.int64)
        self.lengths, self.firsts = np.frombuffer(lengths, np.uint8), np.frombuffer(firsts, np.int64)
        if self.empty:
            print0(f"{self.path}: {self.empty:,} captions without a word are left out")
        self.tell_shared_ids(*map(np.array, ids))

    def tell_shared_ids(self, ids: np.ndarray, files: np.ndarray) -> None:
        """Print whether records of different files, both given as hashes, have one image_id."""
        _, first, group = np.unique(ids, return_index=True, return_inverse=True)
        others = np.flatnonzero(files != files[first[group]])
        if len(others):
            names = " and ".join(self[index].record["image"] for index in (first[group[others[0]]], others[0]))
            count = f"{len(np.unique(ids[others])):,} image_ids are of several files, which count as one image"
            print0(f"{self.path}: {count}: {self[others[0]].key} of {names}; remove them if that is wrong")

    def checked(self, records):
        """Yield every record with its captions or answers as a list; UserError with the first bad ones."""
        text, problems = "answer" if self.asks else "caption", []
        for number, record in enumerate(records):
            if problem := record_problem(record, self.asks, self.need_texts):
                problems.append(f"record {number} {problem}")
                continue
            texts = record.get(text, [])
            words = texts if self.asks else list(filter(is_text, texts))
            self.num_texts += 1 if self.asks else len(words)
            self.unanswered += self.asks and not any(map(str.strip, texts))
            self.empty += len(texts) - len(words)
            unread = () if self.asks else ("question", "answer", "scores", "web")  # the last two are CapFilt's
            yield {key: value for key, value in record.items() if key not in unread} | {text: words}
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UserError(f"{self.path}: {'; '.join(problems[:3])}{more}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> AnnotatedImage:
        content = self.bytes[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return AnnotatedImage(json.loads(content), self.folders)

    def words(self, rows: np.ndarray, rngs: SampleRngs) -> np.ndarray:
        """As of any source, up to 255, without a look at the records."""
        return self.lengths[self.firsts[rows] + rngs.choose(self.firsts[rows + 1] - self.firsts[rows])]

    @property
    def name(self) -> str:
        """As `--data` names it."""
        return str(self.path)

    def image_id(self, row: int) -> int:
        """See `image_id`."""
        return image_id((record := self[row].record), record["image"])

    def content_sha256(self) -> str:
        """Hash of all records: identifies the split of the data set."""
        return hashlib.sha256(self.bytes).hexdigest()

    def sizes_sha256(self) -> str:
        """Hash of the sizes of the image files, or of some evenly spread ones: identifies them at any place."""
        chosen = range(0, len(self), -(-len(self) // SIZED_FILES))
        names = (self[index].name for index in chosen)
        sizes = [os.path.getsize(name) if os.path.exists(name) else None for name in names]
        return hashlib.sha256(repr(sizes).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Changes when any image or their order does."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            path = Path(self[index].name)
            stat = path.stat() if os.path.exists(path) else None
            state = f"{path.name} {stat and stat.st_size} {stat and stat.st_mtime_ns}\n"
            digest.update(state.encode(errors="surrogatepass"))  # a file's name need not be UTF-8
        return digest.hexdigest()


LABELS = ("image_id", "question_id", "question_type", "answer_type", "domain")  # by which records are told apart


def record_problem(record, asks: bool, need_texts: bool = True) -> str:
    """Why a record of captions, or a question if it `asks`, is refused; empty if it is fine."""
    needed = "question" if asks else "caption"
    keys = {"image", needed} if asks or need_texts else {"image"}
    if not isinstance(record, dict) or not keys <= record.keys():
        got = sorted(record) if isinstance(record, dict) else type(record).__name__
        return f'has {shorten(got)}, expected "image" and "{needed}"'
    if not isinstance(record["image"], str):
        return f"has the image {shorten(repr(record['image']), 60)}, expected a file name"
    name = f"({shorten(record['image'], 100)}) has"
    if not is_text(record["question"]) if asks else need_texts and not any(map(is_text, record["caption"])):
        return f"{name} an empty {needed}: write one, or remove it"
    if asks and not all(map(is_string, record.get("answer", []))):
        return f"{name} an answer that is no text: write one, or remove it"
    for key, value in ((key, str(record[key])) for key in LABELS if record.get(key) is not None):
        plain = type(record[key]) in (str, int, float) and value.lower() not in ("nan", "inf", "-inf", "infinity")
        if not plain or len(value) > 1000:
            return f"{name} {key} {shorten(value, 60)}, expected a number or a short text: write one, or remove it"
    return ""


def expect_there(path: str | Path, flag: str = "data") -> None:
    """Refuse a --data that does not exist."""
    kinds = "an annotation file, a folder of images with a .txt beside each, tar shards, or the word shapes"
    expect(os.path.exists(path), f"--{flag} {path} does not exist: expected {kinds}")


# --- the shapes world ------------------------------------------------------------------------------------------------


class ShapesImage(Sample):
    """A sample of the shapes world."""

    def __init__(self, source: "ShapesSource", index: int):
        self.source, self.index = source, index
        self.name = f"shapes {source.split} {index}"

    @cached_property
    def captions(self) -> list[str]:
        """In training all wordings, elsewhere one."""
        return self.source.captions(self.index)

    def open(self) -> Image.Image:
        """The image."""
        return self.source.image(self.index)

    def augment(self, size: int, rng: np.random.Generator) -> Tensor:
        """The whole image: its captions name all objects and places, so a crop would make them false."""
        return eval_transform(self.open(), size)

    def texts(self) -> list[Target]:
        """The captions, or the questions, each with its answer."""
        if self.source.asks:
            return [(question, answer) for _, question, answer in self.source.questions(self.index)]
        return [("", caption) for caption in self.captions]


class ShapesSource(shapes.ShapesWorld, Source):
    """The shapes world as a source, of captions or of questions."""

    name = "shapes"

    def __init__(self, split: str = "train", size: int = 64, questions: bool = False):
        super().__init__(split, size)
        self.asks, self.num_texts = questions, len(self)  # an epoch shows each image once
        if questions:
            self.group_size = 1  # no contrast between images, so twins need not be together

    def __getitem__(self, index: int) -> ShapesImage:
        return ShapesImage(self, index)

    def image_id(self, row: int) -> int:
        """Each image is drawn once."""
        return image_id({}, str(row))

    def fingerprint(self) -> str:
        """Hash: changes with the code of the shapes world, the split and the size."""
        return hashlib.sha256(Path(shapes.__file__).read_bytes() + f" {self.split} {self.size}".encode()).hexdigest()

    content_sha256 = sizes_sha256 = fingerprint
