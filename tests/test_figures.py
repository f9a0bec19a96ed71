"""The pictures of the docs are current: drawn anew from the code and the logs, they are the same."""

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from tools import figures


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name.endswith(".svg")])
def test_diagrams_are_current(name):
    assert (figures.FOLDER / name).read_text() == figures.FIGURES[name](), "run python -m tools.figures"


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name.endswith(".png")])
def test_image_sheets_are_current(name):
    """Up to what another version of Pillow or a CPU's rounding changes."""
    stored, drawn = Image.open(figures.FOLDER / name).convert("RGB"), figures.FIGURES[name]()
    assert stored.size == drawn.size, "run python -m tools.figures"
    difference = np.abs(np.asarray(stored, np.float32) - np.asarray(drawn, np.float32))
    assert difference.mean() < 2, "run python -m tools.figures"


def test_every_picture_is_shown_and_small():
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for name in figures.FIGURES:
        assert f"img/{name}" in pages
        assert (figures.FOLDER / name).stat().st_size < 100_000
    assert {path.name for path in figures.FOLDER.iterdir()} == set(figures.FIGURES)
