"""Options of verbs whose work can be spread over workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["worker_options"]

F = TypeVar("F", bound=Callable[..., Any])


def worker_options(function: F) -> F:
    """`--workers`, `--ray` and `--insecure`."""
    for option in (
        click.option(
            "--insecure", is_flag=True, help="Accept a Ray cluster that asks for no token."
        ),
        click.option("--ray", metavar="ADDRESS", help="A Ray cluster, HOST:PORT or auto."),
        click.option(
            "--workers",
            type=click.IntRange(1),
            metavar="N",
            help="Processes of this machine, of --threads (1) each.  [default: this one alone]",
        ),
    ):
        function = option(function)
    return function
