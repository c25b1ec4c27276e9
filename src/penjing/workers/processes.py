"""Processes of this machine, each with a pipe; one that dies is replaced.

They are fresh, so that they share nothing with the driver but what they are sent. What goes
through the pipes is pickled: between a process and its own children, never from a file.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import IO, Any

from penjing.workers import Begin, Parcel, Where
from penjing.workers._parcel import Here
from penjing.workers._ready import TRIES, Head, head, lost, result_of, unsendable

__all__ = ["crew"]


@dataclass
class _Process:
    """One of them, and the number of the piece that it works on."""

    folder: Path
    log: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    number: int | None = None

    def __post_init__(self) -> None:
        self.pipe, far = Pipe()
        package = str(Path(__file__).parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "penjing.workers._process", str(far.fileno())],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, pass_fds=[far.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        far.close()

    def end(self) -> str:
        """Kill it; its last words."""
        self.process.kill()
        status = self.process.wait()
        self.pipe.close()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        self.log.close()
        reason = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"{reason}; {lines[-1]}" if lines else reason


class _Processes:
    def __init__(self, count: int, threads: int, folder: Path) -> None:
        self.room, self._threads, self._folder = count, threads, folder
        self._said: tuple[Head, bytes] | None = None
        self._pieces: dict[int, bytes] = {}
        self._waiting: deque[int] = deque()
        self._deaths: dict[int, int] = {}
        self._processes: list[_Process] = []

    def ship(self, folder: Path) -> Parcel:
        return Here(folder)

    def start(self, begin: Begin) -> None:
        self._said = head(self._threads), _packed(begin)

    def give(self, number: int, piece: Any) -> None:
        self._pieces[number] = _packed(piece)
        self._waiting.append(number)

    def take(self) -> tuple[int, Any]:
        while True:
            self._hand_out()
            busy = {p.pipe: p for p in self._processes if p.number is not None}
            for pipe in wait(list(busy)):
                process = busy[pipe]  # type: ignore[index]
                try:
                    reply = process.pipe.recv()
                except (EOFError, OSError):
                    self._bury(process)
                    continue
                number, process.number = process.number, None
                assert number is not None
                del self._pieces[number]
                return number, result_of(reply)

    def _hand_out(self) -> None:
        """Every piece that waits to a process that has none, as long as there are any."""
        idle = [p for p in self._processes if p.number is None]
        while self._waiting and (idle or len(self._processes) < self.room):
            process = idle.pop() if idle else self._new()
            process.number = self._waiting[0]
            try:
                process.pipe.send_bytes(self._pieces[process.number])
            except OSError:  # it died while it had nothing to do
                process.number = None
                self._bury(process)
                continue
            self._waiting.popleft()

    def _new(self) -> _Process:
        assert self._said is not None
        process = _Process(Path(tempfile.mkdtemp(prefix="worker.", dir=self._folder)))
        self._processes.append(process)
        process.pipe.send((self._said[0], str(process.folder)))
        process.pipe.send_bytes(self._said[1])
        return process

    def _bury(self, process: _Process) -> None:
        """Its piece is the next that another one gets.

        Raises:
            InputError: so many have died of it that another would too.
        """
        self._processes.remove(process)
        words, number = process.end(), process.number
        if number is None:
            return
        self._deaths[number] = self._deaths.get(number, 0) + 1
        if self._deaths[number] == TRIES:
            raise lost(number, words)
        self._waiting.appendleft(number)

    def close(self) -> None:
        """End them all."""
        for process in self._processes:
            process.end()


def _packed(value: Any) -> bytes:
    """Pickled.

    Raises:
        UsageError: it cannot be.
    """
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise unsendable(error) from error


@contextmanager
def crew(where: Where, folder: Path) -> Iterator[_Processes]:
    """As `penjing.workers.crew`."""
    made = _Processes(where.workers or 1, where.threads, folder)
    try:
        yield made
    finally:
        made.close()
