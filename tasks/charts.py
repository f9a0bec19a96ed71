"""Curves of log.jsonl, and charts of them as SVG whose colours are those of the page (assets/report.css)."""

import html
import math

import numpy as np

POINTS = 150  # of a curve, however long the run is
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 210, 52, 12, 14, 26


def thinned(rows: list[dict], names: list[str]) -> dict[str, np.ndarray]:
    """Curves (4, n) of numbers of the log: of each of n <= POINTS equal parts of its finite values the last step, and
    the mean, the minimum and the maximum. A number that no row has is left out."""
    steps, found = np.array([row["step"] for row in rows], dtype=np.float64), {}
    for name in names:
        y = np.array([row.get(name) for row in rows], dtype=np.float64)
        x, y = steps[finite := np.isfinite(y)], y[finite]
        if len(x):
            starts = np.arange(0, len(x), -(-len(x) // POINTS))
            ends = np.append(starts[1:], len(x))
            sums, lowest, highest = (f.reduceat(y, starts) for f in (np.add, np.minimum, np.maximum))
            found[name] = np.stack((x[ends - 1], sums / (ends - starts), lowest, highest))
    return found


def mean_curve(curves: list[np.ndarray]) -> np.ndarray:
    """The mean of several curves and their range, as far as the shortest goes; one alone as it is."""
    if len(curves) == 1:
        return curves[0]
    x = min((points[0] for points in curves), key=lambda steps: steps[-1])
    y = np.stack([np.interp(x, points[0], points[1]) for points in curves])
    return np.stack((x, y.mean(axis=0), y.min(axis=0), y.max(axis=0)))


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Some round numbers from low to high."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
        if len(found) > 6:
            return [value for value in found if math.log10(value).is_integer()]
        if len(found) > 1:  # else a part of a decade, where linear ones fit as well
            return found
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * digit for digit in (1, 2, 5, 10) if unit * digit >= rough)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def chart(title: str, curves: dict[int, np.ndarray], last: float, levels: dict[str, float], log: bool = False) -> str:
    """A figure. curves: colour -> its curve; last: the step at its right end; levels: heights of dashed lines by name;
    log: a logarithmic axis, of numbers above 0."""
    heights = np.concatenate([[*levels.values()], *(points[1:].ravel() for points in curves.values())])
    log = log and heights.min() > 0
    scale, low, high = np.log10 if log else np.asarray, heights.min(), heights.max()
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = (low / 1.1, high * 1.1) if log else (low - margin, high + margin)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(step):
        return LEFT + (right - LEFT) * step / last

    def down(height):
        return bottom - (bottom - TOP) * (scale(height) - scale(low)) / (scale(high) - scale(low))

    def line(x, y) -> str:
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across(x), down(y)))

    parts = [f'<text class="x" x="{across(tick):.1f}" y="{HEIGHT - 8}">{tick:,.6g}</text>' for tick in ticks(0, last)]
    for tick in ticks(low, high, log):
        parts.append(f'<path class="grid" d="M{LEFT} {down(tick):.1f}H{right}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{down(tick) + 4:.1f}">{tick:,.6g}</text>')
    for color, (x, mean, lowest, highest) in curves.items():
        if (highest > lowest).any():
            parts.append(f'<polygon class="c{color}" points="{line(x, highest)} {line(x[::-1], lowest[::-1])}"/>')
        parts.append(f'<polyline class="c{color}" points="{line(x, mean)}"/>')
        if len(x) <= 20:
            dots = zip(across(x), down(mean))
            parts += [f'<circle class="c{color}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in dots]
    for name, height in levels.items():
        y, label = down(height), html.escape(f"{name} {height:.3g}")
        beside = y + 12 if y > HEIGHT / 2 else y - 4  # where the curve is not
        parts.append(f'<path class="level" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="at" x="{right}" y="{beside:.1f}">{label}</text>')
    ends = "; ".join(f"{points[1, -1]:.4g} at step {points[0, -1]:,.0f}" for points in curves.values())
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{title}: {ends}")}">'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}{''.join(parts)}</svg></figure>"
