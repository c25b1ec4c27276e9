"""Work for workers. A file of its own: their processes import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from penjing.errors import InputError
from penjing.workers import Parcel, quiet


@dataclass(frozen=True)
class Begin:
    """Squares, kept in a folder so that it shows who did what, and how often."""

    log: Path
    parcel: Parcel | None = None

    def __call__(self, folder: Path) -> Callable[[Any], Any]:
        factor = 1
        if self.parcel is not None:
            factor = int((self.parcel.open(folder) / "in" / "factor.txt").read_text())
        (self.log / f"ready-{os.getpid()}").touch()
        return partial(square, self.log, factor)


def square(log: Path, factor: int, piece: Any) -> int:
    number, kind = piece
    if kind == "slow-first":  # the first pieces end last
        time.sleep(max(0.0, 0.3 - 0.1 * number))
    if kind == "brief":
        time.sleep(0.1)
    if kind == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "deadly-once" and not (log / "died").exists():
        (log / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "wrong":
        raise InputError("seven", got=Path("there"), allowed=[1, 2], next="another")
    if kind == "defect":
        raise ZeroDivisionError("a defect")
    if kind == "timed":
        with quiet():
            _note(log / "timed", number, 0.1)
        return number
    if kind == "beside-timed":
        _note(log / "beside", number, 0.15)
        return number
    with open(log / "done", "a") as file:
        file.write(f"{number}\n")
    return factor * number * number


def _note(path: Path, number: int, seconds: float) -> None:
    """From when to when."""
    began = time.monotonic()
    time.sleep(seconds)
    with open(path, "a") as file:
        file.write(f"{began} {time.monotonic()}\n")


def unready(folder: Path) -> Any:
    raise InputError("not today", got=folder.name)
