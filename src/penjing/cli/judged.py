"""Options of verbs that measure candidates against limits: fit, tune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from penjing.cli.options import (
    RATIO,
    SIZE,
    TIME,
    Leaf,
    data_option,
    size_options,
    together,
)

__all__ = ["judged_options"]

F = TypeVar("F", bound=Callable[..., Any])


def judged_options(*, data: bool, runtime: str) -> Callable[[F], F]:
    """What quality is measured on and by, the limits, and how latency is taken.

    Args:
        data: `--data` is required.
        runtime: the default, for the help.
    """
    return together(
        data_option(required=data, help="Your data: .jsonl .csv .parquet .npz or an image folder."),
        data_option(name="--calibration", help="Calibration data.  [default: split off --data]"),
        click.option(
            "--metric",
            "--task",
            "task",
            type=Leaf("tasks"),
            help="Quality measure.  [default: what fits the model and its data]",
        ),
        click.option("--max-drop", type=RATIO, metavar="1%", help="Quality that may be lost."),
        click.option(
            "--max-size", type=SIZE, metavar="25MB", help="Of the exported model on disk."
        ),
        click.option("--max-latency", type=TIME, metavar="20ms", help="Of one call, median."),
        click.option("--runtime", type=Leaf("runtimes"), help=f"Default: {runtime}."),
        click.option("--within", type=TIME, metavar="30m", help="Time this command may take."),
        click.option("--batch", type=click.IntRange(1), default=1, show_default=True),
        size_options,
        click.option("--seed", type=int, default=0, show_default=True),
        click.option(
            "--confidence", type=click.FloatRange(0.5, 0.999), default=0.95, show_default=True
        ),
    )
