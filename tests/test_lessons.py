"""The lessons: their commands run, their numbers stand in course/logs, what they name exists."""

import ast
import importlib
import inspect
import json
import re
from xml.etree import ElementTree

import pytest
from conftest import ROOT
from test_docs import blocks_of, commands

from course import changes, lab, tables
from engine.errors import UserError
from qformer import qformer_mask

COURSE = ROOT / "course"
LESSONS = sorted(COURSE.glob("[01]*.md"))
PARTS = ("Predict", "Run", "See", "Explain", "Exercise", "Going further")
RUNS = {  # (page, experiment)
    (path.name, words[2])
    for path in tables.PAGES
    for words in commands(blocks_of(path.read_text()), "bash")
    if words[:2] == ["python", "course/lab.py"]
}


def lesson(path) -> str:
    return path.stem


def test_there_are_ten_lessons_and_each_has_an_exercise():
    assert [path.name[:2] for path in LESSONS] == [f"{n:02d}" for n in range(1, 11)]
    for number, path in enumerate(LESSONS, start=1):
        assert f"pytest -m exercise_{number}\n" in path.read_text(), path.name


@pytest.mark.parametrize("path", LESSONS, ids=lesson)
def test_a_lesson_says_what_to_read_predict_run_see_explain_and_do(path):
    page = path.read_text()
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert [next(part for part in PARTS if heading.startswith(part)) for heading in headings] == list(PARTS)
    assert "**Goal.**" in page and re.search(r"^\*\*Read\*\* \(\d+ minutes\)\. Paper", page, re.MULTILINE)
    predict = page.split("## Predict")[1].split("## Run")[0]
    assert predict.count("____") >= 3  # places for the answers
    pictures = re.findall(r"^!\[.+\]\((.+)\)", page.split("## See")[1].split("## Explain")[0], re.MULTILINE)
    assert pictures and all((COURSE / picture).exists() for picture in pictures)


@pytest.mark.parametrize("experiment", sorted({experiment for _, experiment in RUNS}))
def test_every_experiment_of_a_page_runs_and_draws(experiment, tmp_path_factory, capsys):
    """With few steps and images; runs that several experiments share are trained once."""
    out = tmp_path_factory.getbasetemp() / "lab"
    lab.main([experiment, "--small", "--out", str(out)])
    out = out / "small"
    assert f"{experiment}.svg" in capsys.readouterr().out
    drawn = ElementTree.parse(out / f"{experiment}.svg").getroot()
    texts = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    shown = json.loads((out / f"{experiment}.json").read_text())
    assert {shown["title"], *shown["bars"], *(shown.get("curves") or shown["rows"])} <= texts


def test_no_experiment_is_left_without_a_page():
    assert {experiment for _, experiment in RUNS} == set(lab.EVERY)


def test_a_picture_stands_for_every_experiment_of_a_lesson():
    for page, experiment in RUNS:
        if page != "results.md":
            assert f"img/{experiment}.svg" in (COURSE / page).read_text(), experiment


@pytest.mark.parametrize("path", tables.PAGES, ids=lesson)
def test_tables_and_outputs_are_those_of_the_logs(path):
    """`python course/tables.py` writes them anew. No other block shows output."""
    page = path.read_text()
    assert tables.with_numbers(page) == page


@pytest.mark.parametrize("path", tables.PAGES, ids=lesson)
def test_code_that_a_page_names_exists(path):
    """`losses.itc_loss`, `QFormer.forward`, `changes.leak_itg`."""
    modules = {p.stem: importlib.import_module(p.stem) for p in ROOT.glob("*.py")}
    modules |= {p.stem: importlib.import_module(f"course.{p.stem}") for p in COURSE.glob("*.py")}
    classes = {name: cls for m in modules.values() for name, cls in inspect.getmembers(m, inspect.isclass)}
    for owner, name in re.findall(r"`(\w+)\.(\w+)(?:\(\))?`", path.read_text()):
        if (where := modules.get(owner) or classes.get(owner)) and name not in ("py", "json", "txt", "svg"):
            assert hasattr(where, name), f"{owner}.{name}"


def test_every_change_is_a_small_visible_difference():
    """A few lines each, and undone when the run is over."""
    for node in ast.parse((COURSE / "changes.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 14, node.name


def test_a_change_ends_with_its_run():
    with changes.leak_itg():
        assert changes.qformer.qformer_mask is not qformer_mask
    assert changes.qformer.qformer_mask is qformer_mask


def test_an_unknown_experiment_is_a_sentence():
    with pytest.raises(UserError, match="leak-itg"):
        lab.main(["leak"])
