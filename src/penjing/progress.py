"""Progress on stderr with the time left: shown on a terminal, once work lasts over two seconds.

Off a terminal nothing is ever written, so that logs and `--json` output stay clean.
Bars nest: an inner one joins the display of the outer one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import pairwise
from threading import Timer
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["curve", "sparkline", "task", "track"]

T = TypeVar("T")
DELAY = 2.0  # seconds before anything is shown

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # characters of a loss curve

# Two live displays on one terminal overwrite each other, so nested bars share this one.
_shown: list[Progress] = []


@contextlib.contextmanager
def _display() -> Iterator[Progress]:
    """The display of the outermost bar; it starts by itself after `DELAY` seconds."""
    if _shown:
        yield _shown[0]
        return
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )
    timer = Timer(DELAY, progress.start)
    timer.daemon = True
    timer.start()
    _shown.append(progress)
    try:
        yield progress
    finally:
        _shown.clear()
        timer.cancel()
        # A timer that fired a moment ago may still be starting the display.
        timer.join()
        progress.stop()


def track(iterable: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Yield from `iterable` under a bar with the time left.

    Args:
        iterable: what to go through.
        description: a short noun phrase, e.g. `calibration`.
        total: number of items; `len(iterable)` where it has one.
    """
    if not sys.stderr.isatty():
        yield from iterable
        return
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with _display() as progress:
        bar = progress.add_task(description, total=total)
        try:
            for item in iterable:
                yield item
                progress.advance(bar)
        finally:
            progress.remove_task(bar)


@contextlib.contextmanager
def task(description: str) -> Iterator[None]:
    """Show `description` and the elapsed time while the body runs."""
    if not sys.stderr.isatty():
        yield
        return
    with _display() as progress:
        bar = progress.add_task(description, total=None)
        try:
            yield
        finally:
            progress.remove_task(bar)


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """Values as a line of bars, each the mean of its part of them; the lowest is the smallest."""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)] if count else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((mean - low) / step)] for mean in means)


@contextlib.contextmanager
def curve(description: str) -> Iterator[Callable[[float, float], None]]:
    """A bar with the loss and its curve so far; give each step's share of the way and its loss."""
    if not sys.stderr.isatty():
        yield lambda done, loss: None
        return
    losses: list[float] = []
    with _display() as progress:
        bar = progress.add_task(description, total=1.0)

        def show(done: float, loss: float) -> None:
            losses.append(loss)
            text = f"{description}  loss {loss:.4g}  {sparkline(losses)}"
            progress.update(bar, completed=done, description=text)

        try:
            yield show
        finally:
            progress.remove_task(bar)
