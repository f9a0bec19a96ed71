"""The page of a run shows what the log and the model say, needs nothing but itself, and costs the training nothing."""

import html
import json
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file

import train
from blip2 import Blip2
from config import TrainConfig
from engine.errors import UserError
from losses import ITM_PRIOR, smoothing_floor
from sources import shapes
from sources.mixture import open_images
from tasks import validation
from tasks.charts import POINTS, thinned, ticks
from tasks.report import read_run, write_report
from tasks.samples import HITS, RERANKED, samples
from tools import report

FEW = "--queries 4 --steps 4 --batch 4 --save-every 4 --eval-every 2 --precision fp32 --test-images 12"
FEW = [*TINY, *FEW.split()]
PICTURE = "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAP"


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Of the shapes world, to validate on."""
    monkeypatch.setitem(shapes.SPLITS, "val", 20)


def write_run(folder: Path, steps: int = 40, validations=(), found: dict | None = None, **flags) -> Path:
    """A run folder with a log, as a training writes it; losses fall with the step."""
    folder.mkdir(parents=True)
    config = asdict(TrainConfig(**{"steps": steps, "batch": 8, "lr": 1e-3, "eval_every": 10} | flags))
    rows, rng = [{"config": config, "machine": "cpu, fp32"}], random.Random(config["seed"])
    for step in range(1, steps + 1):
        row = dict(step=step, itc=2.0 - step / steps, itm=0.6, itg=1 + 9 / step + rng.random() / 10, loss=3.0)
        row |= dict(lr=1e-3, norm=20 / step, temperature=0.07, images_per_s=99.0, trained_s=step * 1.0)
        rows.append(row)
    rows += [{"step": s, "validation": {}, "mean_recall": v, "control": ["chance", 1.5]} for s, v in validations]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if found is not None:
        (folder / "samples.json").write_text(json.dumps(found))
    return folder


def drawn(out: Path, *runs: Path) -> str:
    """The page of some runs."""
    report.main([*map(str, runs), "--out", str(out)])
    return out.read_text()


def chart_of(page: str, title: str) -> str:
    """The figure with this title."""
    return next(f for f in re.findall(r"<figure>.*?</figure>", page) if f"<figcaption>{title}</figcaption>" in f)


def scale(places: list[float], values: list[float]):
    """Place -> value, of an axis with such ticks."""
    (a, b), (x, y) = (places[0], places[-1]), (values[0], values[-1])
    return lambda place: x + (place - a) * (y - x) / (b - a)


def axes_of(figure: str, log: bool = False):
    """Two functions, place -> step and place -> height, read off the labels of the ticks."""
    number = lambda text: float(text.replace(",", ""))  # noqa: E731
    steps = re.findall(r'<text class="x" x="([\d.]+)" y="\d+">([^<]+)<', figure)
    grid = [float(y) for y in re.findall(r'class="grid" d="M\d+ ([\d.]+)H', figure)]
    heights = [number(t) for t in re.findall(r'<text class="y"[^>]*>([^<]+)<', figure)]
    heights = [math.log10(h) for h in heights] if log else heights
    return scale([float(x) for x, _ in steps], [number(t) for _, t in steps]), scale(grid, heights)


def points_of(figure: str, shape: str = "polyline", color: int = 0) -> np.ndarray:
    """The places (n, 2) of a curve or a band."""
    text = re.search(rf'<{shape} class="c{color}" points="([^"]*)"', figure)[1]
    return np.array([list(map(float, point.split(","))) for point in text.split()])


# --- curves ----------------------------------------------------------------------------------------------------------


def test_a_curve_is_the_log_s(tmp_path):
    """Every point of a short run, also on the logarithmic axis of the norm."""
    page = drawn(tmp_path / "a.html", write_run(tmp_path / "run"))
    steps = np.arange(1, 41)
    for title, values in (("ITC, contrast", 2.0 - steps / 40), ("gradient norm", np.log10(20 / steps))):
        figure = chart_of(page, title)
        at_step, at_height = axes_of(figure, log=title == "gradient norm")
        x, y = points_of(figure).T
        np.testing.assert_allclose(at_step(x), steps, atol=0.05)
        np.testing.assert_allclose(at_height(y), values, atol=0.02)
    assert "language model" not in page  # stage 1 has none


def test_a_long_log_becomes_few_points_that_keep_its_means_and_extremes(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=250_000)
    values[777] = 50.0
    rows = [{"step": step, "itc": value} for step, value in enumerate(values.tolist(), start=1)]
    rows[5]["itc"] = float("inf")  # the norm of a skipped step
    x, mean, lowest, highest = thinned(rows, ["itc", "lm"])["itc"]
    assert len(x) <= POINTS and x[-1] == 250_000
    assert highest.max() == 50.0 and lowest.min() == values.min()
    np.testing.assert_allclose(mean[-1], values[int(x[-2]) :].mean())
    assert np.isfinite(mean).all() and "lm" not in thinned(rows[:9], ["itc", "lm"])


def test_losses_stand_between_their_floor_and_chance_and_validations_above_their_control(tmp_path):
    bounds = {"itc": (smoothing_floor(8), math.log(8)), "itm": (0.0, ITM_PRIOR), "itg": (0.8, 4.84)}
    run = write_run(tmp_path / "run", validations=[(10, 20.0), (20, 30.0), (30, 25.0)], found={"bounds": bounds})
    page = drawn(tmp_path / "a.html", run)
    for title, levels in (("ITC, contrast", bounds["itc"]), ("ITM, matching", bounds["itm"]), ("mean recall", [1.5])):
        figure = chart_of(page, title)
        _, at_height = axes_of(figure)
        lines = [at_height(float(y)) for y in re.findall(r'class="level" d="M\d+ ([\d.]+)H', figure)]
        np.testing.assert_allclose(lines, levels, atol=0.15 if title == "mean recall" else 0.01)
    assert "step 40 of 40, on cpu, fp32, 40s of training; best validation: mean recall 30.0 % (chance 1.5 %)" in page
    names = re.findall(r'<text class="at"[^>]*>([^<]+)<', chart_of(page, "ITC, contrast"))
    assert names == [f"floor {smoothing_floor(8):.3g}", f"chance {math.log(8):.3g}"]


def test_runs_that_differ_by_their_seed_are_one_mean_with_its_range_and_others_another_curve(tmp_path):
    runs = [write_run(tmp_path / f"seed{seed}", seed=seed, out=f"runs/{seed}") for seed in (0, 1)]
    other = write_run(tmp_path / "slow", steps=20, lr=1e-4)
    page = drawn(tmp_path / "a.html", *runs, other)
    figure, losses = chart_of(page, "ITG, captioning"), []
    for run in runs:
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses.append([row["itg"] for row in rows if "itg" in row])
    at_step, at_height = axes_of(figure)
    np.testing.assert_allclose(at_height(points_of(figure)[:, 1]), np.mean(losses, axis=0), atol=0.03)
    band = at_height(points_of(figure, "polygon")[:, 1])
    np.testing.assert_allclose(band[:40], np.max(losses, axis=0), atol=0.03)
    np.testing.assert_allclose(band[40:][::-1], np.min(losses, axis=0), atol=0.03)
    assert at_step(points_of(figure, color=1)[-1, 0]) == pytest.approx(20, abs=0.1)
    assert 'class="c2" points' not in figure
    assert all(f"<b>{run.name}</b>: stage 1, step " in page for run in (*runs, other))
    assert '<th scope="row">--lr</th><td>0.001</td><td>0.001</td><td>0.0001</td>' in page


def test_more_runs_than_colours_and_folders_that_are_no_run_are_refused(tmp_path):
    runs = [write_run(tmp_path / f"run{n}", lr=10.0**-n) for n in range(1, 8)]
    with pytest.raises(UserError, match="got 7 runs that differ by more than --seed, expected at most 6"):
        drawn(tmp_path / "a.html", *runs)
    with pytest.raises(UserError, match="has no log.jsonl: expected the folder of a run, such as runs/stage1"):
        drawn(tmp_path / "a.html", tmp_path)
    (runs[0] / "log.jsonl").write_text('{"config": {}}\n')
    with pytest.raises(UserError, match="has no step yet: wait"):
        drawn(tmp_path / "a.html", runs[0])
    assert not (tmp_path / "a.html").exists()


def test_a_run_in_progress_has_a_page_and_one_without_samples_says_how_to_get_them(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=30)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 31, "itc": 0.1')  # is being written
    report.main([str(run)])
    page = (run / "report.html").read_text()
    assert "step 30 of 30" in page and "; no validation so far" in page
    assert f"Of an older run, python train.py --resume --out {run} makes them" in page
    assert capsys.readouterr().out == f"{run}/report.html (0.0 MB): open it in a browser\n"


# --- the page alone --------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects the tags, with their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


EVIL = '<script>alert("1")</script>&<img src=x>'


def evil_run(folder: Path) -> Path:
    """A run whose every text is an attack."""
    shown = {"image": 0, "caption": EVIL, "references": [EVIL], "questions": [[EVIL, EVIL, EVIL]]}
    found = {"step": 5, "shown": [shown], "evaluation": EVIL, "parts": f"{'part':18}\n{EVIL}"}
    found |= {"retrieval": [{"text": EVIL, "image": 0, "ITC": [0], "ITM": [0]}]}
    found |= {"attention": [{"image": 0, "maps": {"mean": PICTURE}}], "pictures": {"0": PICTURE}}
    return write_run(folder, validations=[(10, 1.0)], found=found, prompt=EVIL, data=[EVIL])


def test_texts_of_the_data_are_texts_on_the_page(tmp_path):
    page = drawn(tmp_path / "a.html", evil_run(tmp_path / "<script>run"))
    assert "script" not in {tag for tag, _ in Reader(page).tags}
    assert {a["src"][:5] for tag, a in Reader(page).tags if tag == "img"} == {"data:"}
    assert page.count(html.escape(EVIL)) >= 7


def test_the_page_asks_for_nothing_runs_nothing_and_can_be_read_aloud(stage1_run):
    page = (stage1_run / "report.html").read_text()
    tags = Reader(page).tags
    assert not re.search(r"https?:|url\(|@import|javascript:", page)
    assert {tag for tag, _ in tags} & {"script", "iframe", "object", "form"} == set()
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert all(a.get("src", "data:").startswith("data:") and a.get("href", "data:,") == "data:," for _, a in tags)
    policy = [a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert ("html", {"lang": "en"}) in tags and page.count("<title>") == page.count("<h1>") == 1
    assert all(a.get("alt") for tag, a in tags if tag == "img") and all(a.get("scope") for t, a in tags if t == "th")
    assert all(a.get("aria-label") or a.get("aria-hidden") for tag, a in tags if tag == "svg")
    assert len(page.encode()) < 3_000_000


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_shows_it_without_a_complaint(tmp_path, stage1_run):
    """A real one. Its console would name each request, which the page's policy forbids, and each fault."""
    write_report([read_run(stage1_run)], tmp_path / "a.html")
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "a.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<polyline") == 3 + 4 and done.stdout.count("<img") > 8


# --- samples ---------------------------------------------------------------------------------------------------------


def test_the_grid_is_the_order_of_the_scores(stage1_run):
    model, images = Blip2.from_pretrained(stage1_run), open_images(["shapes"], "val", 64)
    found = samples(model, images, "1", ("itc", "itm", "itg"))
    assert [row["image"] for row in found["retrieval"]] == [0, 4, 8, 12, 16]
    encoded = model.encode_image([images[row].open() for row in range(20)])
    for row in found["retrieval"]:
        assert row["text"] == images[row["image"]].captions[0]
        itc, itm = (score(encoded, [row["text"]])[:, 0] for score in (model.itc_scores, model.itm_scores))
        posterior = (itm.logit() + itc / model.temperature)[row["ITM"][:RERANKED]]
        assert (itc[row["ITC"]].diff() <= 1e-6).all() and (posterior.diff() <= 1e-4).all()
        assert sorted(row["ITC"]) == list(range(20))
        assert {*row["ITM"][:RERANKED]} == {*row["ITC"][:RERANKED]} and row["ITM"][RERANKED:] == row["ITC"][RERANKED:]
        assert {str(image) for way in ("ITC", "ITM") for image in row[way][:HITS]} <= found["pictures"].keys()
    assert [one["caption"] for one in found["shown"]] == model.caption(
        [images[o["image"]].open() for o in found["shown"]]
    )


def test_a_model_shows_only_what_it_has_learned(stage1_run, stage2_run, vqa_run):
    images, questions = open_images(["shapes"], "val", 64), open_images(["shapes"], "val", 64, questions=True)
    model = Blip2.from_pretrained(stage1_run)
    model.untrained_heads = ("itm", "itg")
    found = samples(model, images, "1", ("itc",))
    assert "caption" not in found["shown"][0] and not any("ITM" in row for row in found["retrieval"])
    found = samples(Blip2.from_pretrained(stage2_run), images, "2", ("lm",))
    assert not found["retrieval"] and "caption" in found["shown"][0] and len(found["shown"][0]["questions"]) == 2
    found = samples(Blip2.from_pretrained(vqa_run), questions, "vqa", ("lm",))
    world = questions.parts[0]
    assert "caption" not in found["shown"][0] and len(found["attention"]) == 3
    asked = {(question, answer) for _, question, answer in world.questions(found["shown"][1]["image"])}
    assert all((question, right) in asked for question, _, right in found["shown"][1]["questions"])


# --- the training ----------------------------------------------------------------------------------------------------


def test_a_run_with_a_report_and_one_whose_report_fails_have_the_weights_of_one_without(tmp_path, monkeypatch, capsys):
    """Bit for bit, with dropout: mode and random numbers are left as they were. The report is drawn after each
    validation and at the end, which says where; a failure, here amid the samples, is said in a sentence."""

    def train_in(name: str) -> str:
        train.main([*FEW, "--dropout", "0.1", "--out", str(tmp_path / name)])
        return capsys.readouterr().out

    def fail(*_):
        raise OSError(28, "No space left on device")

    assert train_in("with").count(f"report: {tmp_path}/with/report.html") == 1
    with monkeypatch.context() as patch:
        patch.setattr("tasks.samples.jpeg", fail)
        said = train_in("failing")
    assert said.count("report.html was not drawn (OSError: [Errno 28] No space left on device)") == 3
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(validation, "report", lambda *arguments, **_: seen.append(arguments))
        train_in("without")
    assert len(seen) == 3 and not any((tmp_path / run / "report.html").exists() for run in ("failing", "without"))
    expected = load_file(tmp_path / "without/model.safetensors")
    for run in ("with", "failing"):
        weights = load_file(tmp_path / run / "model.safetensors")
        assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_run_without_validation_has_curves_and_parts(tmp_path):
    train.main([*FEW, "--losses", "itm,itg", "--out", str(tmp_path / "run")])
    page = (tmp_path / "run/report.html").read_text()
    assert "ITG, captioning" in page and "ITC, contrast" not in page and "Q-Former" in page and "chance 0.637" in page


def train_on_ranks(rank, flags, mark):
    """mark: a file that is there if the second rank draws too."""
    with pytest.MonkeyPatch.context() as patch:
        if rank > 0:
            patch.setattr(validation, "samples", lambda *_: mark.touch())
        train.main(flags)


def test_two_ranks_draw_one_report_and_wait_for_nothing_else(ranks, tmp_path):
    flags = [*FEW, "--workers", "0", "--micro-batch", "1", "--out", str(tmp_path / "run")]
    ranks(2, train_on_ranks, flags, tmp_path / "mark")
    assert not (tmp_path / "mark").exists()
    page, found = ((tmp_path / "run" / name).read_text() for name in ("report.html", "samples.json"))
    assert "re-ranked by ITM" in page
    assert json.loads(found)["bounds"]["itc"] == [smoothing_floor(2), math.log(2)]  # two ranks of one image each


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_without_its_package_tensorboard_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs the package tensorboard .*: pip install tensorboard, or"):
        train.main([*FEW, "--tensorboard", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run/log.jsonl").exists()


def test_tensorboard_gets_the_numbers_of_the_log_each_once_also_after_a_resume(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    train.main([*FEW, "--tensorboard", "--out", str(run)])
    shutil.rmtree(run / "step-000004")
    train.main([*FEW, "--tensorboard", "--save-every", "2", "--keep", "2", "--out", str(run)])
    shutil.rmtree(run / "step-000004")
    train.main(["--resume", "--out", str(run)])
    seen = events.EventAccumulator(str(run / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for name in ("itc", "itm", "itg", "lr", "norm", "temperature", "images_per_s", "mean_recall"):
        logged = [(row["step"], row[name]) for row in rows if name in row]
        shown = [(event.step, event.value) for event in seen.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in logged]
        np.testing.assert_allclose([value for _, value in shown], [value for _, value in logged], rtol=1e-6)


def test_stage_2_on_captions_of_own_images_has_samples(tmp_path, stage2_run):
    """Their records have no questions to show."""
    records = [{"image": f"{i}.png", "caption": f"a red square {i}"} for i in range(3)]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    for i in range(3):
        Image.new("RGB", (80, 60), (90 * i, 30, 30)).save(tmp_path / f"{i}.png")
    model = Blip2.from_pretrained(stage2_run)
    found = samples(model, open_images([str(tmp_path / "captions.json")], "val", 64), "2", ("lm",))
    assert [one["references"] for one in found["shown"]] == [[record["caption"]] for record in records]
    assert all("caption" in one and "questions" not in one for one in found["shown"])


@pytest.mark.parametrize("low, high", [(2.3, 4.4), (11, 19), (5.2, 8.9), (1, 3e7), (0.3, 40)])
def test_an_axis_has_numbers_also_within_a_decade(low, high):
    marks = ticks(low, high, log=True)
    assert 2 <= len(marks) <= 9 and all(low <= mark <= high for mark in marks)


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path):
    page = drawn(tmp_path / "all.html", write_run(tmp_path / "a/stage1"), write_run(tmp_path / "b/stage1", lr=1e-4))
    assert f"<b>{tmp_path / 'a/stage1'}</b>" in page and f"<b>{tmp_path / 'b/stage1'}</b>" in page
