"""Images of the shapes world for the tests of the tasks: in memory, as annotation files, and models that read them."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, small_model

from blip2 import Blip2
from sources.mixture import Mixture, open_images
from sources.shapes import ShapesWorld
from sources.text import BertTokenizer
from tasks import batches, features, shapes_qa

TINY_RUN = str(ROOT / "assets/tiny/blip2")  # a trained run of stage 2 with OPT
PRECISE = ["--precision", "fp32", "--device", "cpu"]


def shapes_model(seed: int = 0) -> Blip2:
    """A random stage-1 model that reads the shapes world's captions; images of 8 x 8 pixels."""
    tokenizer = BertTokenizer(ROOT / "assets/tiny/bert")
    return small_model(seed, tokenizer, vocab_size=tokenizer.vocab_size, max_positions=40)


def few(count: int = 12) -> Mixture:
    """The first images of the test split, 8 x 8 pixels."""
    images = open_images(["shapes"], "test", 8)
    return images.subset(range(count))


def write_images(folder: Path, count: int, split: str = "val") -> ShapesWorld:
    """0.png, 1.png, ... of a split."""
    world = ShapesWorld(split)
    for i in range(count):
        world.image(i).save(folder / f"{i}.png")
    return world


def caption_file(folder: Path, count: int = 12) -> str:
    """An annotation file of captions, in two domains as in NoCaps, and its images."""
    world = write_images(folder, count)
    records = [{"image": f"{i}.png", "caption": world.captions(i), "image_id": 7 * i} for i in range(count)]
    records = [record | {"domain": ("in-domain", "near-domain")[i % 2]} for i, record in enumerate(records)]
    (folder / "captions.json").write_text(json.dumps(records))
    return str(folder / "captions.json")


def question_file(folder: Path, count: int = 12) -> str:
    """An annotation file of three questions an image with ten answers each, as in VQAv2, and its images."""
    world, records = write_images(folder, count), []
    for i in range(count):
        for kind, question, answer in world.questions(i)[1:4]:  # without counts: "two" is normalized to "2"
            records.append({"image": f"{i}.png", "question": question, "question_id": 100 + len(records)})
            records[-1] |= {"answer": [answer] * 10, "question_type": kind}
            records[-1]["answer_type"] = {"color": "color", "yes or no": "yes/no"}.get(kind, "other")
    (folder / "questions.json").write_text(json.dumps(records))
    return str(folder / "questions.json")


@contextmanager
def batches_of(size: int):
    """Evaluate in batches of so many images instead of 64: a few images make several batches."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (batches.shard_slices, batches.shard, batches.gather_shards, batches.map_batches):
            patch.setattr(function, "__defaults__", (size,))
        for module in (batches, features, shapes_qa):
            patch.setattr(module, "IMAGES", size)
        yield
