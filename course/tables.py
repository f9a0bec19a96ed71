"""The numbers of the course's pages, from its logs: `python course/tables.py` writes them into course/*.md.

    <!-- lab: NAME -->        the table of course/logs/NAME.json, which `course/lab.py NAME --seeds 3` wrote
    <!-- output: NAME -->     course/logs/NAME.txt, what the command of the lesson printed
    <!-- phenomena: all -->   what was predicted of each change, beside what came out

A test checks that they are current. What runs/lab/ holds after a command is copied there by hand: NAME.json and what it
printed into course/logs/, NAME.svg into course/img/.
"""

import json
import re
import statistics
import sys
from pathlib import Path

COURSE = Path(__file__).parent
sys.path.insert(0, str(COURSE.parent))

from course.draw import spread  # noqa: E402
from tools.results import table  # noqa: E402

PAGES = sorted(COURSE.glob("*.md"))
# (experiment, variant it is compared with, variant, number, prediction)
PHENOMENA = [
    ("leak-itg", "unchanged", "leak-itg", "itg", "falls to its minimum"),
    ("leak-itg", "unchanged", "leak-itg", "captions", "none is right"),
    ("leak-itc", "unchanged", "leak-itc", "itc", "falls"),
    ("leak-itc", "unchanged", "leak-itc", "R@1", "falls towards chance"),
    ("temperature", "unchanged", "temperature-1", "itc", "rises: cosines are too close for a softmax"),
    ("temperature", "unchanged", "temperature-1", "R@1", "falls"),
    ("temperature", "unchanged", "temperature-1", "twins by ITC", "falls to chance, 50"),
    ("negatives", "unchanged", "random-negatives", "itm", "falls: the task is easy"),
    ("negatives", "unchanged", "random-negatives", "twins by ITM", "falls"),
    ("zero-queries", "unchanged", "zero-queries", "first norm", "explodes"),
    ("queries", "unchanged", "1-query", "captions", "falls"),
    ("rerank", "40-steps", "unchanged", "R@1 re-ranked", "rises, more than R@1"),
    ("accumulation", "unchanged", "accumulated", "itc", "falls: fewer candidates are easier"),
    ("accumulation", "unchanged", "accumulated", "R@1", "falls: 7 negatives, not 31"),
    ("accumulation", "unchanged", "gradcache", "R@1", "no difference"),
    ("objectives", "unchanged", "without-itg", "R@1", "no difference so early"),
    ("figure-5", "after", "alone", "answers", "falls"),
    ("figure-5", "after-long", "alone-long", "answers", "falls"),
    ("mean", "unchanged", "mean-over-queries", "R@1", "no difference at this scale"),
    ("parts", "unchanged", "last-block", "R@1", "no difference at this scale"),
    ("parts", "unchanged", "one-feed-forward", "R@1", "no difference at this scale"),
    ("stranger", "opt", "opt-alone", "answers", "falls"),
    ("stranger", "t5", "t5-alone", "answers", "falls"),
]


def lab_table(name: str) -> str:
    """An experiment's numbers as Markdown: a row for each variant, with the seconds of its fastest seed."""
    shown = json.loads((COURSE / f"logs/{name}.json").read_text())
    columns, seconds = shown["columns"], shown.get("seconds", {})
    rows = [(shown["title"], *columns, *(["seconds"] if seconds else []))]
    for variant, found in shown["rows"].items():
        cells = [spread(found[column]) if column in found else "–" for column in columns]
        rows.append((variant, *cells, *([str(min(seconds[variant]))] if seconds else [])))
    return table(*rows)


def phenomena(_: str) -> str:
    """Every prediction beside its numbers. It shows if the means differ by more than twice the larger deviation."""
    rows = [("change", "number", "prediction", "before", "after", "shows", "seconds a seed, both")]
    for experiment, before, after, number, prediction in PHENOMENA:
        shown = json.loads((COURSE / f"logs/{experiment}.json").read_text())
        values = [shown["rows"][variant][number] for variant in (before, after)]
        apart = abs(statistics.mean(values[0]) - statistics.mean(values[1]))
        shows = "yes" if apart > 2 * max(map(statistics.stdev, values)) else "no"
        seconds = sum(min(shown["seconds"][variant]) for variant in (before, after))
        rows.append((f"`{after}`", number, prediction, *map(spread, values), shows, str(seconds)))
    return table(*rows)


def output(name: str) -> str:
    """What a command printed, as a block."""
    return f"```\n{(COURSE / f'logs/{name}.txt').read_text().strip()}\n```"


def with_numbers(page: str) -> str:
    """A page with its tables and outputs made anew."""
    rows = r"(?:\|.*\n)*"
    kinds = {"lab": (lab_table, rows), "phenomena": (phenomena, rows), "output": (output, r"(?:```\n(?:.*\n)*?```\n)?")}
    for kind, (make, old) in kinds.items():
        pattern = rf"(<!-- {kind}: ([\w-]+) -->\n\n){old}"
        page = re.sub(pattern, lambda found, made=make: f"{found[1]}{made(found[2])}\n", page)
    return page


def main() -> None:
    """Rewrite the pages whose numbers are stale."""
    for path in PAGES:
        page = path.read_text()
        if (current := with_numbers(page)) != page:
            path.write_text(current)
            print(f"{path.relative_to(COURSE.parent)} updated")


if __name__ == "__main__":
    main()
