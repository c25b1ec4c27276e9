"""Finished trials, kept so that a killed search goes on as if nothing had happened.

A file of JSON lines: what the search is, then a line for every finished trial, synced when it is
finished. A line that a kill has torn is the last one and is dropped: its trial is made again. One
process writes; a lock on a file beside it tells the others who.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from penjing.errors import InputError

__all__ = ["Journal", "Outcome", "Record", "Store", "alone", "check_same", "in_turn"]


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        state: `complete`; `pruned`, given up before the end; `refused`, by a step or on the way.
        values: of the objectives, less is better; empty unless complete.
        limits: how far above each limit, 0 and less is within.
        early: the first objective on a first part of the samples, of a pruned trial.
        figures: what was measured, JSON-ready.
        why: it is not complete.
    """

    state: Literal["complete", "pruned", "refused"]
    values: tuple[float, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)
    early: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    why: str = ""

    @property
    def within(self) -> bool:
        """Complete and within all limits."""
        return self.state == "complete" and all(v <= 0 for v in self.limits.values())


@dataclass(frozen=True)
class Record:
    """A finished trial.

    Attributes:
        number: 0, 1, ...
        params: by name, see `penjing.tune.space`.
        seconds: it took.
        same: number of an earlier trial with the same parameters, whose outcome this is.
    """

    number: int
    params: dict[str, float | str]
    outcome: Outcome
    seconds: float = 0.0
    same: int | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; `of_json` is its inverse, to the last bit."""
        table = asdict(self) | asdict(self.outcome)
        del table["outcome"]
        return table

    @staticmethod
    def of_json(table: dict[str, Any]) -> Record:
        """Of what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: of something else.
        """
        names = ("state", "values", "limits", "early", "figures", "why")
        outcome = Outcome(**{n: table[n] for n in names} | {"values": tuple(table["values"])})
        if not all(math.isfinite(v) for v in (*outcome.values, *outcome.limits.values())):
            raise ValueError("not finite")
        return Record(
            int(table["number"]), dict(table["params"]), outcome, table["seconds"], table["same"]
        )


class Store(Protocol):
    """Where finished trials are kept, in the order in which they were finished."""

    @property
    def records(self) -> list[Record]: ...

    def append(self, record: Record) -> None:
        """Keep one more; it is there whatever happens afterwards."""


def check_same(kept: dict[str, Any], asked: dict[str, Any], where: str) -> None:
    """Refuse to go on with another search.

    Raises:
        InputError: it names what differs.
    """
    differ = [name for name in {**kept, **asked} if kept.get(name) != asked.get(name)]
    if differ:
        name = differ[0]
        raise InputError(
            f"{where} holds another search: {name} differs",
            got=asked.get(name), allowed=kept.get(name),
            next="give the same options, or begin anew elsewhere",
        )  # fmt: skip


def in_turn(numbers: Sequence[int], concurrency: int) -> bool:
    """Whether trials can have been finished in this order, of `concurrency` at once: each once,
    and none before one that its proposal depends on."""
    done: set[int] = set()
    whole = 0  # all below are done
    for number in numbers:
        if number in done or not 0 <= number < whole + concurrency:
            return False
        done.add(number)
        while whole in done:
            whole += 1
    return True


class Journal:
    """Records in a file.

    Args:
        path: of the file; it is made.
        search: what the search is, JSON-ready; a file of another one is refused.
        concurrency: of the search.

    Raises:
        InputError: of another search, damaged, or not to be written.
    """

    def __init__(self, path: Path, search: dict[str, Any], concurrency: int = 1) -> None:
        self.path, self.records = path, list[Record]()
        search = json.loads(json.dumps(search))
        lines = self._lines()
        if not lines:
            self._write({"format": 1, "search": search})
            return
        try:
            head = json.loads(lines[0])
            if head["format"] != 1:
                raise ValueError
            kept, entries = dict(head["search"]), [json.loads(line) for line in lines[1:]]
            self.records = [Record.of_json(entry) for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error
        check_same(kept, search, str(path))
        if not in_turn([r.number for r in self.records], concurrency):
            raise self._damaged()

    def _damaged(self) -> InputError:
        return InputError(f"{self.path} is damaged", next="remove it, and the search begins anew")

    def append(self, record: Record) -> None:
        """Write and sync one line.

        Raises:
            InputError: the disk is full.
        """
        self._write(record.to_json())
        self.records.append(record)

    def _lines(self) -> list[bytes]:
        """Whole lines; what follows the last of them is taken off the file."""
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self.path, whole)
        except OSError as error:
            raise InputError(f"cannot read {self.path}", got=error.strerror) from error
        return data[:whole].splitlines()

    def _write(self, table: dict[str, Any]) -> None:
        text = json.dumps(table, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with open(self.path, "ab") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}", got=error.strerror,
                next="free disk space and run again; finished trials are kept",
            ) from error  # fmt: skip


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold a lock that ends with this process, whatever ends it.

    Args:
        path: of the lock file; it is made.
        what: is locked, for people.

    Raises:
        InputError: another process holds it; the message has its number.
    """
    handle = _locked(path, what)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _locked(path: Path, what: str) -> int:
    """The open lock file, locked."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(f"cannot write {path}", got=error.strerror) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(handle)
            os.close(handle)
            raise InputError(
                f"{what} is being searched by another process", got=f"process {holder}",
                next="wait for it, or stop it: the search then goes on where it is",
            ) from error  # fmt: skip
        # The one before may have ended and removed the file after it was opened here.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
            return handle
        os.close(handle)


def _holder(handle: int) -> str:
    """Number of the process that has the lock; it writes it a moment after it got it."""
    for _ in range(20):
        if text := os.pread(handle, 32, 0).decode(errors="replace").strip():
            return text
        time.sleep(0.05)
    return "unknown"
