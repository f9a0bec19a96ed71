"""Progress of what takes longer than two seconds: one updating line on a terminal, now and then a line elsewhere."""

import sys
import time

from engine.distributed import rank


def clock(seconds: float) -> str:
    """ "2h05m", "3m10s", "12s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def progress(items, what: str, total: int | None = None):
    """Yield the items; rank 0 tells on stderr, under the name `what`, what share of `total` is done and the time left.

    total: how many items there will be, by default len(items); without a length they are counted.
    """
    total = total if total is not None or not hasattr(items, "__len__") else len(items)
    live = sys.stderr.isatty()
    started = time.monotonic()
    due, shown = started + (2 if live else 20), False
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now < due or rank() > 0 or done == total:
            continue
        left = f"{done / total:.0%}, {clock((now - started) / done * (total - done))} left" if total else f"{done:,}"
        sys.stderr.write(f"\r\033[K{what}: {left}" if live else f"{what}: {left}\n")
        sys.stderr.flush()
        due, shown = now + (0.2 if live else 20), True
    if live and shown:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()
