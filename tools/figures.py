"""The pictures of README.md and docs/, drawn from the code and the logs: `python -m tools.figures` writes docs/img/.

Diagrams are SVG, image sheets PNG. A test draws them anew and compares.
"""

import html
import re
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from blip2 import TINY, Blip2
from engine.log import loss_bounds
from llm import OPT, T5
from model import OBJECTIVES
from qformer import QFormerConfig, qformer_mask
from sources import shapes
from sources.images import open_image
from sources.prompts import FORMATS
from sources.text import BertTokenizer
from tasks.attention_maps import draw_attention
from tools.results import LOGS, ROOT
from vit import PRESETS

FOLDER = ROOT / "docs/img"
FROZEN, TRAINED, QUERY, TEXT, PALE = "#d9d9de", "#fbe3b5", "#4c78a8", "#e0813b", "#f4f4f6"
CURVES = ("#4c78a8", "#e0813b", "#54a24b")
# The house, from the ground up: a file may import only from floors below its own, and within a floor in no circle.
FLOORS = [
    ("losses.py", "generate.py"),
    ("engine/",),
    ("vit.py", "qformer.py", "sources/"),
    ("llm.py", "data.py"),
    ("model.py", "recipes.py", "weights/"),
    ("blip2.py", "config.py"),
    ("tasks/",),
    ("train.py", "eval.py"),
    ("bench.py", "tools/", "docs/"),
]
READ_FIRST = ("vit.py", "qformer.py", "losses.py", "model.py", "train.py")  # the reading path of stage 1


class Canvas:
    """An SVG drawing on white."""

    def __init__(self, width: int, height: int):
        self.size, self.parts = (width, height), []

    def box(self, x: float, y: float, w: float, h: float, fill: str, *lines: str, stroke: str = "#555") -> None:
        """A rectangle with centred lines of text."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" stroke="{stroke}"/>')
        for i, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 16 * (i - (len(lines) - 1) / 2) + 4, line)

    def text(self, x: float, y: float, line: str, anchor: str = "middle", size: int = 12) -> None:
        """A line of text."""
        line = html.escape(line)
        self.parts.append(f'<text x="{x}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{line}</text>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A line with a head."""
        self.parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#555" marker-end="url(#head)"/>')

    def curve(self, points: list[tuple[float, float]], color: str, dashed: bool = False) -> None:
        """A polyline."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"{dash}/>')

    def svg(self) -> str:
        """The file."""
        w, h = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" '
        marker = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        marker = f'<defs>{marker}orient="auto"><path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>'
        parts = [head + 'font-family="sans-serif">', marker, f'<rect width="{w}" height="{h}" fill="white"/>']
        return "\n".join([*parts, *self.parts, "</svg>\n"])


# --- diagrams --------------------------------------------------------------------------------------------------------


def architecture() -> str:
    """Both stages: which part sees what, with shapes; frozen parts grey (paper Figures 1 to 3)."""
    vit, cfg, canvas = PRESETS["eva-g"], QFormerConfig(), Canvas(940, 330)
    P, Q, V, D = vit.tokens(vit.image_size), cfg.num_queries, vit.width, cfg.width
    canvas.text(20, 24, "Stage 1: representation learning", "start", 14)
    canvas.box(20, 190, 90, 50, PALE, "image", f"{vit.image_size} x {vit.image_size}")
    canvas.arrow(110, 215, 150, 215)
    canvas.box(150, 180, 110, 70, FROZEN, "ViT", f"{vit.depth} blocks", "frozen")
    canvas.box(375, 95, 300, 155, TRAINED, stroke="#a77")
    canvas.text(525, 114, f"Q-Former: BERT + queries, {cfg.depth} blocks")
    canvas.box(390, 125, 270, 32, "white", "shared self-attention, one of 3 masks")
    canvas.box(390, 170, 130, 65, "white", "cross-attention", "feed-forward")
    canvas.box(530, 170, 130, 65, "white", "feed-forward")
    canvas.arrow(260, 215, 390, 215)
    canvas.text(317, 205, f"{P} x {V}")
    canvas.box(390, 280, 130, 34, QUERY, f"Q = {Q} queries")
    canvas.box(530, 280, 130, 34, TEXT, "T text tokens")
    canvas.arrow(455, 280, 455, 250)
    canvas.arrow(595, 280, 595, 250)
    for i, (name, what) in enumerate((("ITC", "contrast"), ("ITM", "match?"), ("ITG", "next token"))):
        canvas.box(375 + 103 * i, 36, 94, 38, PALE, name, what)
        canvas.arrow(422 + 103 * i, 95, 422 + 103 * i, 74)
    canvas.text(730, 24, "Stage 2: generative learning", "start", 14)
    canvas.arrow(675, 215, 745, 215)
    canvas.text(710, 205, f"{Q} x {D}")
    canvas.box(745, 190, 70, 50, TRAINED, "Linear")
    canvas.box(740, 80, 180, 50, FROZEN, "OPT, Llama or T5", "frozen")
    canvas.arrow(780, 190, 780, 130)
    canvas.text(788, 165, f"{Q} x L", "start")
    canvas.box(850, 198, 70, 34, TEXT, "prompt")
    canvas.arrow(885, 198, 885, 130)
    canvas.arrow(830, 80, 830, 58)
    canvas.text(830, 50, "caption, answer")
    return canvas.svg()


def masks() -> str:
    """The three masks as grids, from `qformer_mask`: who may attend to whom, queries blue, text orange."""
    canvas, side, real = Canvas(640, 230), 22, [True, True, True, False]
    names, Q = {"itc": "ITC: unimodal", "itm": "ITM: bi-directional", "itg": "ITG: multimodal causal"}, 3
    for panel, (kind, title) in enumerate(names.items()):
        left, top = 40 + 205 * panel, 55
        canvas.text(left + 3.5 * side, 24, title, size=13)
        grid = qformer_mask(kind, torch.tensor([real]), Q)[0, 0].tolist()
        for row, cells in enumerate(grid):
            label = "q" if row < Q else "t" if real[row - Q] else "p"
            canvas.text(left - 10, top + side * row + 16, label)
            canvas.text(left + side * row + side / 2, top - 6, label)
            for key, allowed in enumerate(cells):
                fill = (QUERY if key < Q else TEXT) if allowed else PALE
                canvas.box(left + side * key, top + side * row, side, side, fill, stroke="white")
    return canvas.svg()


def tokens() -> str:
    """Token layout of stage 2 for OPT, T5 and a chat model; orange tokens are predicted."""
    canvas = Canvas(760, 210)

    def sequence(x: float, y: float, *cells: tuple[str, int, str]) -> float:
        for text, width, fill in cells:
            canvas.box(x, y, width, 30, fill, text)
            x += width
        return x

    opt, t5, chat = OPT.prompt_format, T5.prompt_format, FORMATS["chatml"]
    canvas.text(20, 40, "OPT", "start", 13)
    sequence(70, 20, ("Q visual", 120, QUERY), (opt.prompt_start, 50, PALE), ("a red circle left of ...", 190, TEXT),
             (repr(opt.text_end)[1:-1], 40, TEXT))  # fmt: skip
    canvas.text(20, 110, "T5", "start", 13)
    end = sequence(70, 90, ("Q visual", 120, QUERY), ("a red circle", 100, PALE), (t5.prompt_end, 50, PALE))
    canvas.text(205, 80, "encoder", size=11)
    canvas.arrow(end, 105, end + 50, 105)
    sequence(end + 50, 90, ("left of a blue square", 160, TEXT), (t5.text_end, 50, TEXT))
    canvas.text(end + 155, 80, "decoder; the cut is drawn at random", size=11)
    before, after = chat.before_image.replace("\n", "\u21b5"), chat.prompt_end.replace("\n", "\u21b5")
    canvas.text(20, 180, "chat", "start", 13)
    sequence(70, 160, (before, 120, PALE), ("Q visual", 120, QUERY), (after, 210, PALE),
             ("a red circle ...", 110, TEXT), (chat.text_end, 80, TEXT))  # fmt: skip
    return canvas.svg()


def losses() -> str:
    """Loss curves of stage 1 in the shapes world, three seeds, between minimum and chance (dashed)."""
    canvas, bounds = Canvas(760, 220), loss_bounds(OBJECTIVES, 32, BertTokenizer(TINY / "bert").vocab_size)
    line = re.compile(r"step +(\d+)/(\d+) [ |]+itc ([\d.]+) .*?itm ([\d.]+) .*?itg ([\d.]+) ")
    runs = [line.findall((LOGS / f"shapes-seed{seed}.txt").read_text()) for seed in range(3)]
    for panel, (name, (low, high)) in enumerate(bounds.items()):
        left, top, w, h, most = 40 + 245 * panel, 30, 205, 150, high * 1.05
        canvas.text(left + w / 2, 18, name.upper(), size=13)
        canvas.box(left, top, w, h, "white", stroke="#bbb")
        for value in (low, high):
            y = top + h * (1 - value / most)
            canvas.curve([(left, y), (left + w, y)], "#888", dashed=True)
            canvas.text(left - 4, y + 4, f"{value:.2f}", "end", 10)
        for found, color in zip(runs, CURVES):
            values = [(int(row[0]) / int(row[1]), float(row[2 + panel])) for row in found]
            canvas.curve([(left + w * x, top + h * (1 - min(y, most) / most)) for x, y in values], color)
        canvas.text(left + w / 2, top + h + 16, "1,890 steps", size=10)
    return canvas.svg()


def house() -> str:
    """The floors: files and folders import downwards only; orange is the reading path of stage 1."""
    height, width = 34, 560
    canvas = Canvas(width, height * len(FLOORS) + 20)
    for floor, rooms in enumerate(reversed(FLOORS)):
        canvas.text(16, 10 + height * floor + 21, str(len(FLOORS) - 1 - floor), size=11)
        wide = (width - 40) / len(rooms)
        for i, room in enumerate(rooms):
            fill = TRAINED if room in READ_FIRST else PALE
            canvas.box(30 + wide * i, 10 + height * floor, wide, height, fill, room, stroke="#bbb")
    return canvas.svg()


# --- image sheets ----------------------------------------------------------------------------------------------------


def examples() -> Image.Image:
    """Sixteen training images of the shapes world with a caption each; frames mark twins."""
    side, line = 128, 78
    world, page = shapes.ShapesWorld("train", side), Image.new("RGB", (8 * (side + 12), 2 * (side + line)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for index in range(16):
        left, top = 6 + (index // 2) * (side + 12), 6 + (index % 2) * (side + line)
        if index % 4 < 2:  # images 0 and 1, 4 and 5, ... are twins
            draw.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), outline=TEXT, width=2)
        page.paste(world.image(index), (left, top))
        lines = textwrap.wrap(world.captions(index)[0], 26)
        draw.multiline_text((left, top + side + 3), "\n".join(lines), "black", font, spacing=1)
    return page


def attention() -> Image.Image:
    """`eval.py ask --attention` with the word "green", on the image and the model that ship with the code."""
    model, image = Blip2.from_pretrained(TINY / "blip2"), open_image(TINY / "picture.png")
    return draw_attention(model, image, model.caption(image), [], "green")


FIGURES = {
    "architecture.svg": architecture,
    "masks.svg": masks,
    "tokens.svg": tokens,
    "losses.svg": losses,
    "house.svg": house,
    "shapes.png": examples,
    "attention.png": attention,
}


def main(folder: Path = FOLDER) -> None:
    """Write all figures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        drawn = draw()
        if isinstance(drawn, str):
            (folder / name).write_text(drawn)
        else:
            drawn.save(folder / name, optimize=True)


if __name__ == "__main__":
    main()
