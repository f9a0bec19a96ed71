"""What the experiments show: a table for the terminal, and a picture with curves and bars."""

import math
import statistics
from itertools import cycle

from tools.figures import Canvas

# Told apart by the colour-blind, too.
COLORS = ("#4c78a8", "#e0813b", "#54a24b", "#b279a2", "#9d755d", "#72b7b2", "#ff9da6", "#eeca3b")
WIDE, HIGH, TOP = 330, 190, 56  # of a panel


def number(value: float, like: float) -> str:
    """A value with the digits that fit the size of `like`."""
    if 0 < like < 0.01:
        return f"{value:.0e}"
    return f"{value:,.{0 if like >= 1000 else 1 if like >= 10 else 2}f}"


def spread(values: list[float]) -> str:
    """A number; of several seeds the mean and standard deviation."""
    mean = statistics.mean(values)
    return " ± ".join(number(value, abs(mean)) for value in (mean, *([statistics.stdev(values)] if values[1:] else [])))


def table(shown: dict) -> list[str]:
    """Lines: a title, a row for each variant, a column for each number; below, what frames the curve's loss."""
    columns, labels = shown["columns"], max(map(len, shown["rows"])) + 2
    cells = {name: [spread(row[c]) if c in row else "-" for c in columns] for name, row in shown["rows"].items()}
    widths = [max(map(len, [column, *column_cells])) + 2 for column, *column_cells in zip(columns, *cells.values())]
    lines = [shown["title"], " " * labels + "".join(f"{column:>{w}}" for column, w in zip(columns, widths))]
    lines += [
        f"{name:{labels}}" + "".join(f"{cell:>{w}}" for cell, w in zip(row, widths)) for name, row in cells.items()
    ]
    if bounds := shown.get("bounds"):
        lines.append(f"({shown['curve']}: minimum {bounds[0]:.2f}, chance {bounds[1]:.2f})")
    return lines


def picture(shown: dict) -> str:
    """The curves of all variants, then the chosen columns as bars -> SVG."""
    curves, bars = shown.get("curves"), shown["bars"]
    panels = bool(curves) + len(bars)
    legend = 16 * -(-len(curves or ()) // 3)
    canvas = Canvas(max(620, panels * (WIDE + 60) + 20), TOP + HIGH + 30 + legend)
    canvas.text(20, 22, shown["title"], "start", 14)
    first = ["unchanged"] if "unchanged" in shown["rows"] else []  # has the same colour everywhere
    colors = dict(zip(dict.fromkeys([*first, *(curves or {}), *shown["rows"]]), cycle(COLORS)))
    if curves:
        draw_curves(canvas, 56, shown, colors)
    for number, column in enumerate(bars, start=bool(curves)):
        draw_bars(canvas, 56 + number * (WIDE + 60), column, shown, colors)
    return canvas.svg()


def draw_curves(canvas: Canvas, left: float, shown: dict, colors: dict[str, str]) -> None:
    """A curve for each variant and seed; dashed: the least that is possible, and chance."""
    values = [value for curve in shown["curves"].values() for seed in curve["values"] for value in seed]
    steps = max(curve["step"][-1] for curve in shown["curves"].values())
    bounds = shown.get("bounds") or []
    low, high = min([*values, *bounds]), max([*values, *bounds])
    scale = math.log10 if low > 0 and high / low > 5 else float
    low, high = scale(low), scale(high)
    high = high if high > low else low + 1

    def point(x: float, y: float) -> tuple[float, float]:
        return left + WIDE * x, TOP + HIGH * (1 - (scale(y) - low) / (high - low))

    canvas.box(left, TOP, WIDE, HIGH, "white", stroke="#bbb")
    canvas.text(left, TOP - 10, shown["curve"], "start")
    labelled: list[float] = []
    for value, name in [*zip(bounds, ("minimum", "chance")), (min(values), ""), (max(values), "")]:
        x, y = point(0, value)
        if all(abs(y - other) > 10 for other in labelled):
            labelled.append(y)
            canvas.text(left - 4, y + 4, number(value, value), "end", 10)
        if name:
            canvas.curve([(x, y), point(1, value)], "#999", dashed=True)
            canvas.text(left + WIDE - 4, y - 3, name, "end", 10)
    for name, curve in shown["curves"].items():
        for seed in curve["values"]:
            canvas.curve([point(step / steps, y) for step, y in zip(curve["step"], seed)], colors[name])
    for i, name in enumerate(shown["curves"]):
        x, y = left + (WIDE + 30) / 3 * (i % 3), TOP + HIGH + 24 + 16 * (i // 3)
        canvas.box(x, y, 10, 10, colors[name], stroke="none")
        canvas.text(x + 14, y + 9, name, "start", 10)
    canvas.text(left + WIDE / 2, TOP + HIGH + 14, f"{steps:,} {shown.get('unit', 'steps')}", size=10)


def draw_bars(canvas: Canvas, left: float, column: str, shown: dict, colors: dict[str, str]) -> None:
    """A bar for each variant, of its mean; of several seeds with a line of one standard deviation each way."""
    rows = {name: row[column] for name, row in shown["rows"].items() if column in row}
    chance = 50 if column.startswith("twins") else 0
    scale = WIDE * 0.7 / max(chance, *map(max, rows.values()), 1e-9)
    canvas.text(left, TOP - 10, column, "start")
    high = min(44, HIGH / len(rows))
    for i, (name, values) in enumerate(rows.items()):
        y, mean = TOP + i * high, statistics.mean(values)
        canvas.box(left, y + high * 0.4, max(1, scale * mean), high * 0.45, colors[name], stroke="none")
        canvas.text(left, y + high * 0.33, name, "start", 10)
        apart, middle = statistics.stdev(values) if values[1:] else 0.0, y + high * 0.62
        canvas.curve([(left + scale * max(0, mean - apart), middle), (left + scale * (mean + apart), middle)], "#000")
        canvas.text(left + scale * (mean + apart) + 8, y + high * 0.72, spread(values), "start", 11)
    if chance:
        canvas.curve([(left + scale * chance, TOP), (left + scale * chance, TOP + high * len(rows))], "#999", True)
        canvas.text(left + scale * chance + 4, TOP + high * len(rows) + 12, "chance", "start", 10)
