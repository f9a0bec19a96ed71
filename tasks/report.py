"""The page of a run, report.html: curves, what the model does on a few images, parts, configuration; in one file,
without a script, and with a policy that forbids every request. Several runs are drawn over each other."""

import html
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from config import FLAGS, ONCE, TrainConfig, dashed
from engine.errors import expect
from engine.files import read_json, whole
from engine.log import rows_of
from engine.progress import clock
from tasks.charts import chart, mean_curve, thinned

STYLE = Path(__file__).parent.parent / "assets/report.css"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
COLORS = 6  # in the style
LOSSES = {"itc": "ITC, contrast", "itm": "ITM, matching", "itg": "ITG, captioning", "lm": "language model"}
OTHERS = {"lr": "learning rate", "norm": "gradient norm", "temperature": "temperature", "images_per_s": "images/s"}
FREE = {*ONCE, "seed", "tensorboard"}  # flags in which runs of one mean may differ


@dataclass
class Run:
    """What a run has written."""

    folder: Path
    name: str
    header: dict  # of its log: config, machine
    last: dict  # the row of the last step
    curves: dict  # of its numbers by name
    score: str  # the number by which its validations are compared; empty without one
    best: dict  # the row of the best validation
    samples: dict  # see samples.py; empty if it has none yet

    def levels(self, name: str) -> dict[str, float]:
        """What a number is compared with: floor and chance of a loss, the control of a validation."""
        if name == self.score:
            return dict([self.best["control"]] if "control" in self.best else [])
        return dict(zip(("floor", "chance"), self.samples.get("bounds", {}).get(name, ())))


def read_run(folder: Path, rows: list[dict] | None = None) -> Run:
    """A run, finished or in progress. rows: of its log, if they have been read."""
    log, samples = folder / "log.jsonl", folder / "samples.json"
    expect(log.is_file(), f"{folder} has no log.jsonl: expected the folder of a run, such as runs/stage1")
    rows = rows_of(log) if rows is None else rows
    headers, steps, validations = ([row for row in rows if key in row] for key in ("config", "loss", "validation"))
    expect(headers and steps, f"{log} has no step yet: wait for the first line of the training")
    score = next((key for row in validations for key in row if key not in ("step", "validation", "control")), "")
    best = max((row for row in validations if score in row), key=lambda row: row[score], default={})
    found = read_json(samples) if samples.is_file() else {}
    names = [name for name in (*LOSSES, *OTHERS) if name in steps[-1] and (name != "temperature" or "itc" in steps[-1])]
    curves = thinned(steps, names) | thinned(validations, [score])
    return Run(folder, folder.resolve().name, headers[-1], steps[-1], curves, score, best, found)


def write_report(runs: list[Run], out: Path) -> None:
    """The page of some runs, whole or not at all; samples and parts are those of the first."""
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.folder)) for run in runs]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = sorted((flag, value) for flag, value in run.header["config"].items() if flag not in FREE)
        groups.setdefault(json.dumps(config), []).append(run)
    over = f"got {len(groups)} runs that differ by more than --seed, expected at most {COLORS}: leave some out"
    expect(len(groups) <= COLORS, over)
    with whole(out) as partial:  # a file's name need not be UTF-8
        partial.write_text(page([*groups.values()], runs), encoding="utf-8", errors="replace")


def page(groups: list[list[Run]], runs: list[Run]) -> str:
    """The page as HTML. groups: the runs, those together that differ by their seed only."""
    first, title = runs[0].samples, html.escape(", ".join(run.name for run in runs))
    swatch = '<svg width="14" height="14" class="c{}" aria-hidden="true"><rect width="14" height="14"/></svg>'
    told = [(swatch.format(color), sentence(run)) for color, group in enumerate(groups) for run in group]
    note = "Line: the mean of neighbouring steps; band: their smallest and largest. Floor: under label smoothing."
    if len(groups) < len(runs):
        note += f" Runs that differ by their seed only, up to {max(map(len, groups))}, are one curve: mean and range."
    scores = {run.score: run.score.replace("_", " ") for run in runs if run.score}
    seen = f"At step {first.get('step', 0):,}, of images that the model was not trained on."
    none = "This run has none, before its first validation or without images for one (--val-data, --val-photos)."
    none += f" Of an older run, python train.py --resume --out {html.escape(str(runs[0].folder))} makes them."
    cells = [(line[:18], line[18:33], line[33:48], line[48:]) for line in first.get("parts", "").splitlines()]
    of = f" ({html.escape(runs[0].name)})" * (len(runs) > 1)
    final = html.escape(first.get("evaluation") or "")
    parts = [
        f"<h1>{title}</h1><ul>{''.join(f'<li>{color} {said}</li>' for color, said in told)}</ul>",
        section("Losses", charts(groups, LOSSES), note),
        section("Optimization", charts(groups, OTHERS)),
        section("Validation", charts(groups, scores)),
        section("Final evaluation" + of, f"<pre>{final}</pre>" if final else ""),
        section("Samples" + of, *((cards(first), seen) if first.get("shown") else (none,))),
        section("Retrieval" + of, grids(first), "The first five images for a text; the right one is framed."),
        section("Where the queries look" + of, attention(first), "Cross-attention: the mean over heads and blocks."),
        section("Model" + of, table(cells)),
        section("Configuration", flags(runs), "What was given or chosen by the recipe; then the defaults."),
    ]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
    head += f"<title>{title}</title><style>{STYLE.read_text()}</style>"
    lines = ["<!DOCTYPE html>", f'<html lang="en"><head>{head}</head><body>', *parts, "</body></html>\n"]
    return "\n".join(lines)


def section(title: str, body: str, note: str = "") -> str:
    """A section of the page, or nothing if it has no body."""
    return f'<section><h2>{title}</h2><p class="soft">{note}</p>{body}</section>' if body else ""


def sentence(run: Run) -> str:
    """What a run is, how far it is, and its best validation beside its control, as HTML."""
    cfg, score, unit = run.header["config"], run.score, "" if run.score == "CIDEr" else " %"
    said = f"stage {cfg['stage']}, step {run.last['step']:,} of {cfg['steps']:,}, on {run.header['machine']}, "
    said += f"{clock(run.last['trained_s'])} of training; "
    if not score:
        return f"<b>{html.escape(run.name)}</b>: {html.escape(said)}no validation so far"
    beside = "".join(f" ({name} {value:.1f}{unit})" for name, value in run.levels(score).items())
    said += f"best validation: {score.replace('_', ' ')} {run.best[score]:.1f}{unit}{beside}"
    return f"<b>{html.escape(run.name)}</b>: {html.escape(said)} at step {run.best['step']:,}"


def charts(groups: list[list[Run]], names: dict[str, str]) -> str:
    """A chart for each number (name in the log -> title) that any run has; levels if all runs have the same."""
    drawn, last = "", max(run.last["step"] for group in groups for run in group)
    for name, title in names.items():
        found = [[run.curves[name] for run in group if name in run.curves] for group in groups]
        levels = [run.levels(name) for group in groups for run in group if run.levels(name)]
        levels = levels[0] if levels and all(each == levels[0] for each in levels) else {}
        if any(found):
            lines = {color: mean_curve(each) for color, each in enumerate(found) if each}
            drawn += chart(title, lines, last, levels, log=name == "norm")
    return f'<div class="charts">{drawn}</div>' * bool(drawn)


# --- samples ---------------------------------------------------------------------------------------------------------


def cards(found: dict) -> str:
    """Images with what the model says about them."""
    made = ""
    for one in found["shown"]:
        pairs = [("the model", one["caption"])] if "caption" in one else []
        for question, answer, right in one.get("questions", ()):
            pairs.append((question, answer + (" \N{CHECK MARK}" if answer == right else f" (reference: {right})")))
        pairs += [("reference", text) for text in one["references"]]
        told = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(said)}</dd>" for name, said in pairs)
        made += f"<div>{tile(found['pictures'][str(one['image'])], '', 'an image')}<dl>{told}</dl></div>"
    return f'<div class="shown">{made}</div>'


def grids(found: dict) -> str:
    """For each text the first five images, by ITC and re-ranked, the right one framed."""
    made = ""
    for row in found.get("retrieval", ()):
        made += f'<h3>{html.escape(row["text"])}</h3><div class="pair">'
        for way, name in (("ITC", "by ITC"), ("ITM", "re-ranked by ITM+ITC")):
            if way in row:
                hits = [(found["pictures"][str(image)], image == row["image"]) for image in row[way][:5]]
                place = f"{name}: the right one at {row[way].index(row['image']) + 1} of {len(row[way])}"
                tiles = (tile(jpeg, "right" * own, f"image {n}") for n, (jpeg, own) in enumerate(hits, start=1))
                made += f'<div><p class="soft">{place}</p><div class="row">{"".join(tiles)}</div></div>'
        made += "</div>"
    return made


def attention(found: dict) -> str:
    """Images beside maps of where the queries look."""
    rows = [{"the image": found["pictures"][str(one["image"])]} | one["maps"] for one in found.get("attention", ())]
    return "".join(f'<div class="row">{"".join(tile(p, name, name) for name, p in row.items())}</div>' for row in rows)


def tile(jpeg: str, caption: str, alt: str) -> str:
    """A picture, framed if its caption is "right"."""
    image = f'<img src="data:image/jpeg;base64,{jpeg}" alt="{alt}{", the right one" * (caption == "right")}">'
    return f'<figure class="{caption}">{image}<figcaption>{caption}</figcaption></figure>'


# --- tables ----------------------------------------------------------------------------------------------------------


def flags(runs: list[Run]) -> str:
    """Tables of the flags of these stages: those that are not at their defaults, and, folded, the others."""
    configs, names = [run.header["config"] for run in runs], ("flag", *(run.name for run in runs))
    stages, changed, others = {config["stage"] for config in configs}, [names], [names]
    for flag, default in asdict(TrainConfig()).items():
        values = [config.get(flag, default) for config in configs]
        told = [", ".join(value) if isinstance(value, list) else value for value in values]
        if flag not in ONCE and stages & {*FLAGS[flag].metadata["stages"]} and values != [None] * len(runs):
            (others if values == [default] * len(runs) else changed).append((dashed(flag), *told))
    return f"{table(changed)}<details><summary>flags at their defaults</summary>{table(others)}</details>"


def table(rows: list[tuple]) -> str:
    """Rows of cells as a table, whose first row and first column are headers."""
    cells = [["" if cell is None else html.escape(str(cell).strip()) for cell in row] for row in rows]
    head = "".join(f'<th scope="col">{cell}</th>' for row in cells[:1] for cell in row)
    body = [f'<tr><th scope="row">{first}</th><td>{"</td><td>".join(rest)}</td></tr>' for first, *rest in cells[1:]]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>" * bool(rows)
