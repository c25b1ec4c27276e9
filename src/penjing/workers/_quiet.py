"""Time is measured without neighbours: one worker at a time, while the others of its machine wait.

A worker holds its machine's lock shared while it works. Who measures gives that up and takes it
alone: it waits until every other worker has ended its piece, or measures too. A gate in front of
it keeps new pieces out meanwhile, or they would never all have ended. The kernel frees both locks
when a process dies.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["quiet", "working"]

_held: list[int] = []  # the lock of this process, while it works


def _open(name: str) -> int:
    # One user's, on one machine: also of the processes of two Ray nodes that share it.
    path = Path(tempfile.gettempdir()) / f"penjing-{os.getuid()}-{name}.lock"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _enter(lock: int, how: int) -> None:
    """Take the lock, after those who stood at the gate before."""
    gate = _open("gate")
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(lock, how)
    finally:
        os.close(gate)


@contextmanager
def working() -> Iterator[None]:
    """A worker works in the body; it begins when nobody measures on this machine."""
    lock = _open("work")
    try:
        _enter(lock, fcntl.LOCK_SH)
        _held.append(lock)
        yield
    finally:
        _held.clear()
        os.close(lock)


@contextmanager
def quiet() -> Iterator[None]:
    """No other worker of this machine works in the body. Outside a worker it changes nothing."""
    if not _held:
        yield
        return
    (lock,) = _held
    # Given up first: of two who wait for each other to end, neither would measure.
    fcntl.flock(lock, fcntl.LOCK_UN)
    _enter(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)
        _enter(lock, fcntl.LOCK_SH)
