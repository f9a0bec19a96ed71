"""The shapes world: images drawn by Pillow, their captions, and questions with answers. No download, endless.

An image shows 1 to 3 objects, each in its own quarter. An object has a size, a colour and a shape. The caption of one
object names its place, of two their relation (side by side, or one above the other), of three their places.
Image number i of a split is the same on every machine with the same Pillow.

Generalisation is measured: some colour-shape pairs and some wordings occur in the test split only, never in training,
nor in the text and images that the tiny encoders were trained on (tools/make_tiny.py). Scenes of the test and
validation splits never occur in training. The captions of a test or validation split all differ in meaning.
"""

import hashlib
import random
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
COLORS = {
    "red": (214, 40, 40),
    "green": (42, 157, 70),
    "blue": (45, 85, 225),
    "yellow": (246, 211, 45),
    "purple": (142, 58, 184),
    "orange": (245, 133, 25),
    "black": (25, 25, 25),
    "white": (252, 252, 252),
}
SIZES = {"small": 0.42, "large": 0.9}  # radius, as a share of half a cell
PLACES = (("top left", "top right"), ("bottom left", "bottom right"))  # by row and column
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))  # the quarters: (row, column)
HELD_OUT_PAIRS = {
    ("red", "star"),
    ("green", "circle"),
    ("blue", "triangle"),
    ("yellow", "cross"),
    ("purple", "square"),
    ("orange", "diamond"),
}

# {a}, {b}, {c} are objects, {at_a}, ... their places, {rel} the relation of a to b, {inv} that of b to a.
WORDINGS = {
    1: (
        "{a} at the {at_a}",
        "there is {a} at the {at_a}",
        "at the {at_a} there is {a}",
        "a picture of {a} at the {at_a}",
    ),
    2: ("{a} {rel} {b}", "{b} {inv} {a}", "there is {a} {rel} {b}", "a picture of {b} {inv} {a}"),
    3: (
        "{a} at the {at_a}, {b} at the {at_b} and {c} at the {at_c}",
        "there is {c} at the {at_c}, {a} at the {at_a}, {b} at the {at_b}",
        "at the {at_b} there is {b}, at the {at_c} {c} and at the {at_a} {a}",
        "three shapes: {a} at the {at_a}, {b} at the {at_b}, {c} at the {at_c}",
    ),
}
# The words of training in another order.
HELD_OUT_WORDINGS = {
    1: ("there is at the {at_a} {a}",),
    2: ("there is a picture of {b} {inv} {a}",),
    3: ("a picture of {b} at the {at_b}, {c} at the {at_c}, {a} at the {at_a}",),
}
# {shape}, {color}: of the object in question; {a}, {b}: without an article; {rel}: of the first to the second.
QUESTIONS = {
    "count": ("how many shapes are there?", "how many shapes do you see?", "what is the number of shapes?"),
    "color": ("what color is the {shape}?", "which color does the {shape} have?", "what is the color of the {shape}?"),
    "size": ("is the {shape} small or large?", "what size is the {shape}?", "what is the size of the {shape}?"),
    "place": ("where is the {shape}?", "at which place is the {shape}?", "what is the place of the {shape}?"),
    "shape": ("what shape is {color}?", "which shape is {color}?", "what is the {color} shape?"),
    "relation": ("what is {rel} the {a}?", "which shape is {rel} the {a}?"),
    "yes or no": ("is the {a} {rel} the {b}?", "do you see the {a} {rel} the {b}?"),
}
HELD_OUT_QUESTIONS = {
    "count": ("what number of shapes are there?",),
    "color": ("which color is the {shape}?",),
    "size": ("which size does the {shape} have?",),
    "place": ("at what place is the {shape}?",),
    "shape": ("which is the {color} shape?",),
    "relation": ("what shape is {rel} the {a}?",),
    "yes or no": ("is there the {a} {rel} the {b}?",),
}
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

SPLITS = {"train": 50_000, "val": 500, "test": 1_000}
# Subsets of the test split, in this order, and their numbers of images.
TEST_SUBSETS = {"plain": 500, "held-out pairs": 200, "swapped": 200, "held-out wordings": 100}


@dataclass(frozen=True, order=True)
class Thing:
    """One object: its attributes and its cell."""

    size: str
    color: str
    shape: str
    row: int
    column: int

    @property
    def words(self) -> str:
        """ "a small red circle"."""
        return f"a {self.size} {self.color} {self.shape}"

    @property
    def place(self) -> str:
        """ "top left"."""
        return PLACES[self.row][self.column]


Scene = tuple[Thing, ...]


def relation(a: Thing, b: Thing) -> str:
    """Position of a relative to b; they share a row or a column."""
    if a.row == b.row:
        return "left of" if a.column < b.column else "right of"
    return "above" if a.row < b.row else "below"


def meaning(scene: Scene) -> tuple:
    """What the captions of the scene say; no caption could tell two scenes of equal meaning apart."""
    if len(scene) == 2:
        first, second = sorted(scene, key=lambda thing: (thing.words, thing.row, thing.column))
        return (first.words, relation(first, second), second.words)
    return tuple(sorted((thing.words, thing.place) for thing in scene))


def split_of(scene: Scene) -> str:
    """Train, val or test, by the content of the scene and not by its arrangement.

    So neither a scene nor its `swapped` variant is in two splits.
    """
    parts = sorted((thing.size, thing.shape) for thing in scene), sorted(thing.color for thing in scene)
    where = {1: None, 2: scene[0].row == scene[-1].row, 3: sorted(thing.place for thing in scene)}[len(scene)]
    share = hashlib.sha256(repr((parts, where)).encode()).digest()[0] % 20
    return {0: "val", 1: "test", 2: "test"}.get(share, "train")


def has_held_out_pair(scene: Scene) -> bool:
    """Does it have a colour-shape pair that training never shows?"""
    return any((thing.color, thing.shape) in HELD_OUT_PAIRS for thing in scene)


def is_describable(scene: Scene) -> bool:
    """No two objects look alike; two objects share a row or a column, so that they have one relation."""
    diagonal = len(scene) == 2 and scene[0].row != scene[1].row and scene[0].column != scene[1].column
    return len({thing.words for thing in scene}) == len(scene) and not diagonal


def draw_scene(rng: random.Random, held_out: bool = False, count: int | None = None) -> Scene:
    """A random scene of any split. held_out: with at least one held-out pair, otherwise without any."""
    n = count or rng.choice((1, 2, 2, 3))
    while True:
        scene = tuple(
            Thing(rng.choice(tuple(SIZES)), rng.choice(tuple(COLORS)), rng.choice(SHAPES), *cell)
            for cell in rng.sample(CELLS, n)
        )
        if has_held_out_pair(scene) == held_out and is_describable(scene):
            return scene


def swapped(scene: Scene, rng: random.Random) -> Scene:
    """Another meaning in the same words: two objects swap places or colours; a single one moves."""
    if len(scene) == 1:
        (a,) = scene
        row, column = rng.choice([cell for cell in CELLS if cell != (a.row, a.column)])
        return (replace(a, row=row, column=column),)
    a, b, *others = scene
    if rng.random() < 0.5 or a.color == b.color:
        return (replace(a, row=b.row, column=b.column), replace(b, row=a.row, column=a.column), *others)
    return (replace(a, color=b.color), replace(b, color=a.color), *others)


def altered(scene: Scene, rng: random.Random) -> Scene:
    """Another meaning by one or two words: one object changes size, colour, shape or place."""
    number, what = rng.randrange(len(scene)), rng.choice(("size", "color", "shape", "place"))
    thing, taken = scene[number], {(thing.row, thing.column) for thing in scene}
    if what == "place":
        row, column = rng.choice([cell for cell in CELLS if cell not in taken])
        other = replace(thing, row=row, column=column)
    else:
        values = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}[what]
        other = replace(thing, **{what: rng.choice([value for value in values if value != getattr(thing, what)])})
    return (*scene[:number], other, *scene[number + 1 :])


def captions(scene: Scene, held_out: bool = False) -> list[str]:
    """Captions of the scene in all training wordings, or in the held-out ones."""
    parts = {}
    for letter, thing in zip("abc", scene):
        parts |= {letter: thing.words, f"at_{letter}": thing.place}
    if len(scene) == 2:
        parts |= {"rel": relation(*scene), "inv": relation(*scene[::-1])}
    wordings = (HELD_OUT_WORDINGS if held_out else WORDINGS)[len(scene)]
    return [wording.format(**parts) for wording in wordings]


class Question(NamedTuple):
    """A question in several wordings, and its one answer."""

    kind: str
    wordings: list[str]
    answer: str


def questions(scene: Scene, held_out: bool = False) -> list[Question]:
    """Questions with one answer, which the captions contain; in the wordings that the language models of assets/tiny
    were trained on, or in the held-out ones."""

    def ask(kind: str, answer: str, **parts) -> Question:
        wordings = (HELD_OUT_QUESTIONS if held_out else QUESTIONS)[kind]
        return Question(kind, [wording.format(**parts) for wording in wordings], answer)

    asked = [ask("count", ("one", "two", "three")[len(scene) - 1])]
    for thing in scene:
        if sum(other.shape == thing.shape for other in scene) == 1:
            asked += [ask("color", thing.color, shape=thing.shape), ask("size", thing.size, shape=thing.shape)]
            if len(scene) != 2:  # captions of two objects give their relation, not their places
                asked.append(ask("place", thing.place, shape=thing.shape))
        if sum(other.color == thing.color for other in scene) == 1:
            asked.append(ask("shape", thing.shape, color=thing.color))
    if len(scene) == 2:
        rel = relation(*scene)
        for (a, b), answer in ((scene, "yes"), (scene[::-1], "no")):
            parts = {"a": a.words[2:], "b": b.words[2:]}
            asked.append(ask("relation", b.words, rel=relation(b, a), **parts))
            asked.append(ask("yes or no", answer, rel=rel, **parts))
    return asked


def draw(scene: Scene, rng: random.Random, size: int = 64) -> Image.Image:
    """The scene as an RGB image, size x size: on plain light grey, each object a little off its cell's centre."""
    scale = 2  # drawn larger and reduced, for smooth edges
    cell = size * scale / 2
    image = Image.new("RGB", (size * scale, size * scale), (rng.randint(150, 205),) * 3)
    canvas = ImageDraw.Draw(image)
    for thing in scene:
        radius = SIZES[thing.size] * cell / 2 * rng.uniform(0.9, 1.05)
        x = (thing.column + 0.5) * cell + rng.uniform(-0.05, 0.05) * cell
        y = (thing.row + 0.5) * cell + rng.uniform(-0.05, 0.05) * cell
        color = tuple(max(0, min(255, channel + rng.randint(-12, 12))) for channel in COLORS[thing.color])
        if thing.shape == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        else:
            canvas.polygon([(x + radius * dx, y + radius * dy) for dx, dy in OUTLINES[thing.shape]], fill=color)
    return image.reduce(scale)


# Corners of the shapes inside a circle of radius 1, y downwards.
OUTLINES = {
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": ((0, -1), (0.95, 0.8), (-0.95, 0.8)),
    "diamond": ((0, -1), (0.7, 0), (0, 1), (-0.7, 0)),
    "star": (
        *((0, -1), (0.26, -0.36), (0.95, -0.31), (0.42, 0.14), (0.59, 0.81)),
        *((0, 0.44), (-0.59, 0.81), (-0.42, 0.14), (-0.95, -0.31), (-0.26, -0.36)),
    ),
    "cross": (
        *((-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3)),
        *((0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3)),
    ),
}


@cache
def distinct_scenes(split: str, plan: tuple[tuple[str, int], ...]) -> tuple[list[Scene], list[str]]:
    """Scenes of a small split, all of different meaning, and the subset of each; plan: (subset, count) pairs."""
    rng, seen, scenes, subsets = random.Random(f"{split} 0 scenes"), set(), [], []
    for subset, count in plan:
        while subsets.count(subset) < count:
            scene = draw_scene(rng, held_out=subset == "held-out pairs", count=2 if subset == "swapped" else None)
            group = [scene, swapped(scene, rng)] if subset == "swapped" else [scene]
            keys = {meaning(member) for member in group}
            fits = all(split_of(member) == split for member in group)
            fits &= subset != "swapped" or not any(has_held_out_pair(member) for member in group)
            if fits and len(keys) == len(group) and not keys & seen:
                seen |= keys
                scenes += group
                subsets += [subset] * len(group)
    return scenes, subsets


class ShapesWorld:
    """One split: images with captions and questions, by number.

    In training, images 0 and 1, 4 and 5, 8 and 9, ... are twins, which differ by a swap or in one object. Without them
    hardly any batch would contain such a pair, and a model would learn which words occur but not their order. The
    others are single: were all twins, every hard negative of ITM would be a twin, and it would never see easy ones.
    """

    group_size = 2  # consecutive images that stay in one batch

    def __init__(self, split: str = "train", size: int = 64):
        if split not in SPLITS:
            raise ValueError(f"got split {split!r}, expected one of {', '.join(SPLITS)}")
        self.split, self.size = split, size
        plan = {"train": {}, "val": {"plain": len(self)}, "test": TEST_SUBSETS}[split]
        self.scenes, self.subsets = distinct_scenes(split, tuple(plan.items()))  # in training drawn as needed

    def __len__(self) -> int:
        return SPLITS[self.split]

    def rng(self, index: int, purpose: str) -> random.Random:
        """Randomness of one image for one purpose."""
        return random.Random(f"{self.split} {index} {purpose}")

    def scene(self, index: int) -> Scene:
        """The scene of image number `index`."""
        if self.scenes:
            return self.scenes[index]
        if index % 4 == 1:
            scene, rng = self.scene(index - 1), self.rng(index, "twin")
            while True:
                twin = rng.choice((swapped, altered))(scene, rng)
                fits = is_describable(twin) and split_of(twin) == self.split and not has_held_out_pair(twin)
                if fits and meaning(twin) != meaning(scene):
                    return twin
        rng = self.rng(index, "scene")
        while split_of(scene := draw_scene(rng)) != self.split:
            pass
        return scene

    def captions(self, index: int) -> list[str]:
        """In training all wordings, of which one is drawn per step; elsewhere one caption per image."""
        scene = self.scene(index)
        if self.split == "train":
            return captions(scene)
        held_out = self.subset(index) == "held-out wordings"
        return [self.rng(index, "wording").choice(captions(scene, held_out))]

    def subset(self, index: int) -> str:
        """Subset of a test image; outside the test split all are "plain"."""
        return self.subsets[index] if self.subsets else "plain"

    def questions(self, index: int) -> list[tuple[str, str, str]]:
        """(kind, question, answer) of all questions about the image, each in one of its wordings."""
        held_out, rng = self.subset(index) == "held-out wordings", self.rng(index, "questions")
        return [(q.kind, rng.choice(q.wordings), q.answer) for q in questions(self.scene(index), held_out)]

    def image(self, index: int) -> Image.Image:
        """The image."""
        return draw(self.scene(index), self.rng(index, "picture"), self.size)
