"""This process does all the work, pieces in the order of their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penjing.workers import Begin, Where, Work
from penjing.workers._parcel import Here

__all__ = ["crew"]


class _Serial:
    room = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begin: Begin | None = None
        self._work: Work | None = None
        self._pieces: dict[int, Any] = {}

    def ship(self, folder: Path) -> Here:
        return Here(folder)

    def start(self, begin: Begin) -> None:
        self._begin, self._work = begin, None

    def give(self, number: int, piece: Any) -> None:
        self._pieces[number] = piece

    def take(self) -> tuple[int, Any]:
        if self._work is None:
            assert self._begin is not None
            self._work = self._begin(self._folder)
        number = min(self._pieces)
        return number, self._work(self._pieces.pop(number))


@contextmanager
def crew(_: Where, folder: Path) -> Iterator[_Serial]:
    """As `penjing.workers.crew`."""
    yield _Serial(folder)
