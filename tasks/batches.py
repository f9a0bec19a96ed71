"""Evaluation work in batches: shared among ranks, resumable, each image encoded once.

Batches are formed before they are spread over ranks, so that a batch, and with it every number, is the same for any
number of processes. Letters: see the glossary of qformer.py.
"""

import json
import re
import time
import zlib
from functools import cached_property, wraps
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from blip2 import Blip2, EncodedImages, chunked
from data import ImageFiles, image_loader
from engine.distributed import all_gather, gather_objects, print0, rank, world_size
from engine.errors import UserError
from engine.files import writing
from engine.progress import progress
from sources.annotations import ShapesSource
from sources.mixture import Mixture

IMAGES, TEXTS = 64, 256  # in a batch


def evaluation(task):
    """Make task(model, ...) run in eval mode and without gradients, and add its seconds to its result."""

    @wraps(task)
    @torch.no_grad()
    def run(model: Blip2, *args, **kwargs) -> dict:
        started, was_training = time.time(), model.training
        model.eval()
        result = task(model, *args, **kwargs)
        model.train(was_training)
        return result | {"seconds": round(time.time() - started, 1)}

    return run


class Gallery:
    """The distinct images of a set, their rows there, all their captions, and which belongs to which; [i] is a sample
    of image i."""

    def __init__(self, images: Mixture):
        by_id: dict[int, list[int]] = {}  # image_id -> rows: one a caption, or one a question, in many files
        for row in range(len(images)):
            by_id.setdefault(images.image_id(row), []).append(row)
        self.images, self.groups = images, list(by_id.values())
        self.rows = [group[0] for group in self.groups]
        self.references = [[text for row in group for text in images[row].captions] for group in self.groups]
        self.texts = list(chain.from_iterable(self.references))
        self.owner = torch.tensor([image for image, texts in enumerate(self.references) for _ in texts])

    @cached_property
    def positives(self) -> Tensor:
        """(N, M) bool: which texts belong to each image. Only retrieval needs so much memory."""
        return torch.arange(len(self.rows))[:, None] == self.owner

    def __getitem__(self, image: int):
        return self.images[self.rows[image]]

    def public_id(self, image: int) -> int | str:
        """The image_id of the annotation file, as a number if it is one; else the file name."""
        image_id, name = self[image].record.get("image_id"), Path(self[image].name).name
        if str(image_id).isdecimal():
            return int(image_id)
        if of_coco := re.fullmatch(r"COCO_\w+_0*(\d+)\.\w+", name):  # LAVIS's files have no id, or one of their own
            return int(of_coco[1])
        return name if image_id is None else image_id

    def subsets(self) -> dict[str, Tensor]:
        """The named subsets of the shapes world's test split -> image numbers."""
        parts = self.images.parts
        if len(parts) > 1 or not isinstance(parts[0], ShapesSource) or not parts[0].subsets:
            return {}
        names = [parts[0].subsets[self.images.locate(row)[1]] for row in self.rows]
        return {name: torch.tensor([i for i, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)}


# --- shares of the ranks ---------------------------------------------------------------------------------------------


def shard_slices(count: int, together: int = IMAGES) -> list[slice]:
    """Each rank's share of `count` things; batches of `together` stay whole."""
    batches, size = -(-count // together), world_size()
    ends = [min(count, batches * number // size * together) for number in range(size + 1)]
    return [slice(start, end) for start, end in zip(ends, ends[1:])]


def shard(count: int, together: int = IMAGES) -> slice:
    """This rank's share."""
    return shard_slices(count, together)[rank()]


def gather_shards(x: Tensor, count: int, together: int = IMAGES) -> Tensor:
    """The rows of all ranks' shares -> (count, ...), in order."""
    sizes = [share.stop - share.start for share in shard_slices(count, together)]
    if len(sizes) == 1:
        return x
    padded = torch.cat((x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])))
    return torch.cat([part[:rows] for part, rows in zip(all_gather(padded).split(max(sizes)), sizes)])


class PartialResults:
    """The finished batches of an interrupted evaluation, in `folder`; without a folder nothing is kept. Each rank
    writes the results of its batches as they come, and reads those of all. A line is a checksum and an object; one that
    is damaged does not count, and its batch is computed again."""

    def __init__(self, folder: Path | None):
        self.done, self.file = {}, None
        if folder:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            for line in [line for file in folder.glob("*.jsonl") for line in file.read_bytes().split(b"\n")]:
                digest, _, kept = line.partition(b" ")
                if kept and digest == b"%08x" % zlib.crc32(kept):
                    self.done |= json.loads(kept)
            self.file = folder / f"{rank()}-{time.time_ns()}.jsonl"  # a new one: the last line of an old may be cut
        for part in gather_objects(self.done):  # of other machines too; and nobody writes before all have read
            self.done |= part
        if self.done:
            print0(f"continuing with {folder}: {len(self.done):,} batches are done")

    def add(self, name: str, result) -> None:
        """Keep the JSON-serializable result of a batch."""
        self.done[name] = result
        if self.file:
            kept = json.dumps({name: result})
            with writing(self.file), open(self.file, "a") as file:
                file.write(f"{zlib.crc32(kept.encode()):08x} {kept}\n")


def map_batches(partial: PartialResults | None, name: str, count: int, work, together: int = IMAGES) -> list:
    """The results of work(batches) for all batches of `together` rows, in order; those of all ranks.

    `work` takes this rank's unfinished batches and yields their results one by one.
    """
    partial = partial or PartialResults(None)
    batches = {f"{name} {i}": rows for i, rows in enumerate(chunked(range(count), together))}
    mine = [key for key in list(batches)[shard(len(batches), 1)] if key not in partial.done]
    results = work([batches[key] for key in mine])
    for key, result in progress(zip(mine, results, strict=True), name.split()[0], len(mine)):
        partial.add(key, result)
    for part in gather_objects({key: partial.done[key] for key in mine}):
        partial.done |= part
    return [partial.done[key] for key in batches]


# --- encoding --------------------------------------------------------------------------------------------------------


def encoded_batches(model: Blip2, images: Mixture | ImageFiles, batches: list[list[int]], workers: int):
    """Yield the features of batches of images."""
    if images.cached:
        for rows in batches:
            yield model.encode_tokens(images.cached.tokens(images.rows(rows)))
    else:
        for _, broken, pixels in image_loader(images, model.image_size, batches, workers):
            for reason in broken.values():  # leaving an image out would make the numbers incomparable
                raise UserError(f"every image is needed here, and {reason}")
            yield model.encode_image(pixels)


def encode_images(model: Blip2, images: Mixture, rows: list[int], workers: int) -> EncodedImages:
    """Features of some images; their ViT tokens stay in host memory, in the ViT's precision."""
    if not rows:  # fewer images than ranks
        blank = torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8)
        return EncodedImages(*(x[:0] for x in model.encode_image(blank)))
    batches = list(chunked(rows, IMAGES))
    encoded = progress(encoded_batches(model, images, batches, workers), "images", len(batches))
    parts = [part._replace(tokens=part.tokens.cpu()) for part in encoded]  # gigabytes for 5,000 images
    return EncodedImages(*map(torch.cat, zip(*parts, strict=True)))
