"""Sources of samples: annotation files, the shapes world, and mixtures of them.

A source is a sequence of samples. A sample is one image with its texts and has

    name, key                   its path, for messages; what makes it this image: equal keys are one image
    captions                    list of strings
    record                      as in the annotation file
    open()                      the upright RGB image
    augment(size, rng)          uint8 (3, size, size), as a training step sees it
    texts()                     what can be learned of it: ("", caption) or (question, answer) pairs
    sample_text(rng)            one of these
"""

import hashlib
import json
import os
from array import array
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from engine.distributed import print0
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

    def sample_text(self, rng: np.random.Generator) -> Target:
        """Paper 3.4: "randomly sample one at each pre-training step"."""
        texts = self.texts()
        return texts[rng.integers(len(texts))]


# --- annotation files ------------------------------------------------------------------------------------------------


class AnnotatedImage(Sample):
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

    def open(self) -> Image.Image:
        """The upright RGB image."""
        return open_image(self.name)

    def augment(self, size: int, rng: np.random.Generator) -> Tensor:
        """A random crop, mirrored half of the time unless a text says left or right."""
        texts = [self.record.get("question", ""), *self.record.get("answer", []), *self.captions]
        with image_header(self.name) as image:
            crop = decode_crop(image, size, rng)
        return train_transform(*crop, size, rng, not says_left_or_right(texts))

    def texts(self) -> list[Target]:
        """The captions; or the question with each of its answers, which people may have given several times. One that
        gave none teaches nothing."""
        if "question" in self.record:
            return [(self.record["question"], answer) for answer in self.record["answer"] if answer.strip()]
        return [("", caption) for caption in self.captions]


class AnnotationFile:
    """An annotation file of captions, or with `questions` of questions, and the folders of its images.

    The layout of the file is any of layouts.py, or it is a folder. Images are looked for in the folders `images`, in
    turn, by default in the file's own. All records are checked at once, then kept as one block of bytes, which the
    loader's workers share instead of copying.
    """

    group_size = 1  # consecutive images that stay in one batch

    def __init__(self, path: str | Path, split="train", images: list | None = None, questions=False, need_texts=True):
        """need_texts: refuse images without a caption. (Questions of a test set have no answers.)"""
        self.path, self.asks = Path(path), questions
        self.folders = [Path(f) for f in images or [path if os.path.isdir(path) else Path(path).parent]]
        self.need_texts = need_texts and not questions
        self.num_texts, self.unanswered, self.empty = 0, 0, 0  # captions or questions; these without an answer, a word
        check_spec(self.path)
        content, offsets, ids = bytearray(), array("q", [0]), (array("q"), array("q"))
        for record in progress(self.checked(stream_records(self.path, split)), f"reading {self.path}"):
            content += json.dumps(record).encode()
            offsets.append(len(content))
            ids[0].append(hash(AnnotatedImage(record, []).key))
            ids[1].append(hash(record["image"]))
        self.bytes, self.offsets = np.frombuffer(content, np.uint8), np.frombuffer(offsets, np.int64)
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
            unread = () if self.asks else ("question", "answer")
            yield {key: value for key, value in record.items() if key not in unread} | {text: words}
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UserError(f"{self.path}: {'; '.join(problems[:3])}{more}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> AnnotatedImage:
        content = self.bytes[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return AnnotatedImage(json.loads(content), self.folders)

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


def check_spec(spec: str | Path, flag: str = "data") -> None:
    """Refuse a --data that is neither the shapes world nor a file or folder."""
    kinds = "an annotation file, a folder of images with a .txt beside each, or the word shapes"
    expect(spec == "shapes" or os.path.exists(spec), f"--{flag} {spec} does not exist: expected {kinds}")


# --- the shapes world ------------------------------------------------------------------------------------------------


class ShapesImage(Sample):
    """A sample of the shapes world."""

    record: dict = {}

    def __init__(self, source: "ShapesSource", index: int):
        self.source, self.index = source, index
        self.name, self.key = f"shapes {source.split} {index}", str(index)

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


class ShapesSource(shapes.ShapesWorld):
    """The shapes world as a source, of captions or of questions."""

    unanswered = 0

    def __init__(self, split: str = "train", size: int = 64, questions: bool = False):
        super().__init__(split, size)
        self.asks, self.num_texts = questions, len(self)  # an epoch shows each image once
        if questions:
            self.group_size = 1  # no contrast between images, so twins need not be together

    def __getitem__(self, index: int) -> ShapesImage:
        return ShapesImage(self, index)

    def fingerprint(self) -> str:
        """Hash: changes with the code of the shapes world, the split and the size."""
        return hashlib.sha256(Path(shapes.__file__).read_bytes() + f" {self.split} {self.size}".encode()).hexdigest()

    content_sha256 = sizes_sha256 = fingerprint


# --- mixtures --------------------------------------------------------------------------------------------------------


class Mixture:
    """Several sources in a row, or chosen samples of them."""

    cached = None  # `tasks.features.CachedTokens` of all samples, if computed

    def __init__(self, parts: list, chosen: np.ndarray | None = None):
        self.parts = parts
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self.chosen = np.arange(self.starts[-1]) if chosen is None else chosen
        self.group_size = parts[0].group_size if len(parts) == 1 and chosen is None else 1
        self.asks = parts[0].asks  # questions, or captions?

    def __len__(self) -> int:
        return len(self.chosen)

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the part, index in that part)."""
        row = self.chosen[index]
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return part, int(row - self.starts[part])

    def __getitem__(self, index: int):
        part, row = self.locate(index)
        return self.parts[part][row]

    def image_id(self, index: int) -> int:
        """A stable int64 of the image: the number of its part and a hash of its key there."""
        part, row = self.locate(index)
        digest = hashlib.sha256(self.parts[part][row].key.encode(errors="surrogatepass")).digest()
        return part << 48 | int.from_bytes(digest[:6], "big")

    def num_texts(self) -> int:
        """Captions, or questions: what an epoch shows."""
        return round(sum(part.num_texts for part in self.parts) * len(self) / self.starts[-1])

    def num_images(self, enough: int) -> int:
        """How many different images; from `enough` rows on the rows, because looking at each takes long."""
        rows = progress(range(len(self)), "counting images") if len(self) < enough else ()
        return len({self.image_id(row) for row in rows}) or len(self)

    def content_sha256(self) -> str:
        """Changes when any text does."""
        return hashlib.sha256(" ".join(part.content_sha256() for part in self.parts).encode()).hexdigest()

    def sizes_sha256(self) -> str:
        """Changes when an image file of another size takes the place of one."""
        return hashlib.sha256(" ".join(part.sizes_sha256() for part in self.parts).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Changes when any image, or their order, does."""
        parts = " ".join(part.fingerprint() for part in self.parts)
        return hashlib.sha256(parts.encode() + self.chosen.tobytes()).hexdigest()

    def held_out(self, count: int) -> tuple["Mixture", "Mixture"]:
        """(the rest, `count` images): always the same choice, and no image on both sides."""
        ids = np.array([self.image_id(index) for index in range(len(self))])
        unique = np.unique(ids)
        total = len(unique)
        expect(count < total, f"--val-photos {count} of {total} images leaves none to train on: pass a smaller number")
        out = np.isin(ids, np.random.default_rng(0).choice(unique, count, replace=False))
        parts = Mixture(self.parts, self.chosen[~out]), Mixture(self.parts, self.chosen[out])
        for part in parts:
            part.cached = self.cached
        return parts


def open_images(
    specs: list[str], split: str, image_size: int, images: list | None = None, questions=False, need_texts=True
) -> Mixture:
    """What `--data` names: "shapes" or annotation files, mixed if several; with captions or with questions."""
    parts = [
        ShapesSource(split, image_size, questions)
        if spec == "shapes"
        else AnnotationFile(spec, split, images, questions, need_texts)
        for spec in specs
    ]
    return Mixture(parts)
