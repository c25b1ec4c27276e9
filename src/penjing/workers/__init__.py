"""Independent pieces of work over workers, each of which has made itself ready once.

A crew is found by its file's name: `serial`, this process; `processes` of this machine; `ray`, a
cluster. What comes of a piece must be a function of the piece alone: then results are the same
whatever the number of workers, for nothing here depends on which of them is done first. A piece
whose worker is lost is done again by another; its result counts once.

How a worker gets ready is a picklable callable: given a folder of its own, it returns the function
that does a piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from penjing.errors import UsageError
from penjing.registry import lookup
from penjing.workers._quiet import quiet

__all__ = ["Begin", "Crew", "Parcel", "Where", "Work", "crew", "in_order", "quiet"]

Work = Callable[[Any], Any]
Begin = Callable[[Path], Work]


class Parcel(Protocol):
    """A folder as a worker gets it."""

    def open(self, folder: Path) -> Path:
        """Where it is in the worker; new files go into `folder`."""


class Crew(Protocol):
    """Workers.

    Attributes:
        room: pieces that are worked on at once.
    """

    @property
    def room(self) -> int: ...

    def ship(self, folder: Path) -> Parcel:
        """A folder for the workers; over a network it goes once to every node."""

    def start(self, begin: Begin) -> None:
        """Say what the work is.

        Raises:
            UsageError: it cannot be sent to a worker.
        """

    def give(self, number: int, piece: Any) -> None:
        """Add a piece."""

    def take(self) -> tuple[int, Any]:
        """Number and result of a finished piece, whichever is first; waits for it.

        Raises:
            PenjingError: of the work; or no worker could do the piece.
        """


@dataclass(frozen=True)
class Where:
    """Where work is done: in this process, unless `workers` or `ray` says otherwise.

    Attributes:
        workers: processes of this machine.
        ray: address of a Ray cluster, `HOST:PORT` or `auto`.
        threads: of a worker; the last bits of sums can depend on them, so the number of workers
            does not change it. Without workers it is not looked at.
        insecure: a cluster that asks for no token is accepted.

    Raises:
        UsageError: both, or no workers.
    """

    workers: int | None = None
    ray: str | None = None
    threads: int = 1
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.ray is not None:
            raise UsageError("workers and a Ray cluster", allowed="one of them")
        if self.workers is not None and self.workers < 1:
            raise UsageError("workers", got=self.workers, allowed="1 or more")
        if self.threads < 1:
            raise UsageError("threads", got=self.threads, allowed="1 or more")

    @property
    def kind(self) -> str:
        """Name of the crew."""
        if self.ray is not None:
            return "ray"
        return "serial" if self.workers is None else "processes"


@contextmanager
def crew(where: Where, folder: Path) -> Iterator[Crew]:
    """The workers; they end with the body.

    Args:
        folder: for files of workers on this machine; removed by the caller.

    Raises:
        UsageError, InputError: no such workers can be had.
    """
    made: Callable[[Where, Path], AbstractContextManager[Crew]]
    made = lookup("workers", where.kind, "crew")
    with made(where, folder) as hands:
        yield hands


def in_order(hands: Crew, pieces: Iterable[Any]) -> Iterator[Any]:
    """Results of pieces in the order of the pieces; a piece is asked for when a worker is free.

    Raises:
        PenjingError: of the work.
    """
    left, flying = enumerate(pieces), 0
    early: dict[int, Any] = {}
    for wanted in itertools.count():
        while wanted not in early:
            while flying < hands.room and (one := next(left, None)) is not None:
                hands.give(*one)
                flying += 1
            if not flying:
                return
            number, early_one = hands.take()
            early[number] = early_one
            flying -= 1
        yield early.pop(wanted)
