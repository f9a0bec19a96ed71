"""What `--data` names: sources in a row, mixed in proportion to their weights."""

import hashlib
import re
from pathlib import Path

import numpy as np

from engine.draws import SampleRngs
from engine.errors import expect
from engine.permutation import permute_blocks
from engine.progress import progress
from sources.annotations import AnnotationFile, ShapesSource, expect_there
from sources.shards import TarShards, find_tars, is_shards


class Mixture:
    """Several sources in a row, or chosen samples of them. [index] is a sample; its row counts through the sources."""

    cached = None  # `tasks.features.CachedTokens` of all samples, if computed

    def __init__(self, parts: list, chosen: np.ndarray | None = None, weights: list[float] | None = None):
        """chosen: rows, ascending where there are several parts; None: all. weights: of the parts in the batches, by
        default their sizes."""
        self.parts, self.chosen, self.weights = parts, chosen, weights
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self.group_size = parts[0].group_size if len(parts) == 1 and chosen is None else 1
        self.asks = parts[0].asks  # questions, or captions?

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.chosen is None else len(self.chosen)

    def rows(self, indices) -> np.ndarray:
        """Rows of some samples."""
        return np.asarray(indices) if self.chosen is None else self.chosen[indices]

    def subset(self, indices) -> "Mixture":
        """Some of the samples."""
        subset = Mixture(self.parts, self.rows(indices), self.weights)
        subset.cached = self.cached
        return subset

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the part, index in that part)."""
        row = index if self.chosen is None else self.chosen[index]
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return part, int(row - self.starts[part])

    def __getitem__(self, index: int):
        part, row = self.locate(index)
        return self.parts[part][row]

    def image_id(self, index: int) -> int:
        """A stable int64 of the image: see `annotations.image_id`; one that counts within its set has its number."""
        part, row = self.locate(index)
        own = self.parts[part].image_id(row)
        return own if own >> 48 else part << 48 | own

    # --- the order of a training -------------------------------------------------------------------------------------

    def blocks(self, part: int) -> np.ndarray:
        """`Source.blocks` of a part, as indices."""
        bounds = self.starts[part] + self.parts[part].blocks
        return bounds if self.chosen is None else np.searchsorted(self.chosen, bounds)

    def shares(self) -> np.ndarray:
        """The share of each part in the batches; sums to 1."""
        sizes = [np.ptp(self.blocks(part)) for part in range(len(self.parts))]
        weights = np.array(self.weights or sizes, np.float64)
        return weights / weights.sum()

    def draws(self, end: int) -> list[int]:
        """How many of the first `end` samples of a training are of each part."""
        shares = self.shares()
        counts = [int(end * share) for share in shares]
        counts[shares.argmax()] += end - sum(counts)
        return counts

    def drawn(self, part: int, draws: np.ndarray, seed: int, together: int) -> np.ndarray:
        """The indices that a part shows at its n-th draws, n in `draws`, a multiple of `group_size`.

        Each epoch shows each sample of the part once, in a new order, which is computed: nothing grows with their
        number. together: blocks that are read at a time (`permute_blocks`); 0: all.
        """
        group = self.group_size
        bounds, groups = self.blocks(part) // group, draws[::group] // group
        epochs, places = np.divmod(groups, bounds[-1] - bounds[0])
        for epoch in np.unique(epochs):
            now = epochs == epoch
            groups[now] = permute_blocks(bounds, together, [seed, part, int(epoch)], places[now])
        return (groups[:, None] * group + np.arange(group)).flatten()

    def words(self, part: int, indices: np.ndarray, rngs: SampleRngs) -> list[int]:
        """`Source.words` of samples of a part."""
        return self.parts[part].words(self.rows(indices) - self.starts[part], rngs)

    def held_out(self, count: int) -> tuple["Mixture", "Mixture"]:
        """(the rest, `count` images): always the same choice, and no image on both sides."""
        ids = np.array([self.image_id(index) for index in range(len(self))])
        unique = np.unique(ids)
        total = len(unique)
        expect(count < total, f"--val-photos {count} of {total} images leaves none to train on: pass a smaller number")
        out = np.isin(ids, np.random.default_rng(0).choice(unique, count, replace=False))
        return self.subset(np.flatnonzero(~out)), self.subset(np.flatnonzero(out))

    # --- counts and hashes -------------------------------------------------------------------------------------------

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
        return hashlib.sha256(parts.encode() + (b"" if self.chosen is None else self.chosen.tobytes())).hexdigest()


# --- --data ----------------------------------------------------------------------------------------------------------


def split_weight(spec: str) -> tuple[str, float | None]:
    """ "coco.json:2" -> the set, and its weight if it has one."""
    found = re.fullmatch(r"(.+):([0-9]*\.?[0-9]+)", spec)
    if not found or Path(spec).exists():
        return spec, None
    expect(float(found[2]) > 0, f"got --data {spec}, expected a weight above 0: leave the set out")
    return found[1], float(found[2])


def check_spec(spec: str, flag: str = "data") -> None:
    """Refuse a --data that is neither the shapes world nor tar shards, nor a file or folder."""
    spec = split_weight(spec)[0]
    if is_shards(spec):
        find_tars(spec)
    elif spec != "shapes":
        expect_there(spec, flag)


def open_images(
    specs: list[str], split: str, image_size: int, images: list | None = None, questions=False, need_texts=True,
    field: str = "",
) -> Mixture:  # fmt: skip
    """What `--data` names: "shapes", tar shards or annotation files, mixed if several; with captions or with questions.
    field: of the captions in the shards."""

    def opened(spec: str):
        if spec == "shapes":
            return ShapesSource(split, image_size, questions)
        if is_shards(spec):
            expect(not questions, f"--data {spec}: tar shards have no questions: pass an annotation file")
            return TarShards(spec, field, need_texts)
        return AnnotationFile(spec, split, images, questions, need_texts)

    names, weights = zip(*map(split_weight, specs))
    some = "got a weight for some sets of --data, expected one for each, or none: write it as FILE:WEIGHT"
    expect(None not in weights or not any(weights), some)
    return Mixture([opened(name) for name in names], weights=None if None in weights else list(weights))
