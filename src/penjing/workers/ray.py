"""Tasks on a Ray cluster: the driver alone keeps what came of them.

A task runs in a process that Ray keeps for the next one, so that it gets ready once. What all
tasks need lies in Ray's object store, which takes it to a node once. A task whose node or
process is lost is begun again elsewhere by Ray itself; a reference has one result.

Ray sends Python objects by cloudpickle, and runs what it is sent: whoever can reach a cluster can
run code on it. A cluster that lets anybody in is therefore refused unless that is asked for.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import InputError, PenjingError, UsageError
from penjing.files import folder_beside
from penjing.workers import Begin, Where, Work
from penjing.workers._ready import (
    TRIES,
    Head,
    Reply,
    do,
    head,
    lost,
    meet,
    ready,
    result_of,
    unsendable,
)

__all__ = ["crew"]

_ADDRESS = re.compile(r"auto|[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+")
_SECONDS = 30.0

# In a worker, which Ray gives to one driver only: its works, or why there is none.
_ready: dict[int, Work | Reply] = {}


@dataclass(frozen=True)
class _Sent:
    """The files of a folder in the object store, each an array of bytes."""

    files: dict[str, Any]

    def open(self, folder: Path) -> Path:
        import ray

        made = Path(tempfile.mkdtemp(prefix="parcel.", dir=folder))
        for name, reference in self.files.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(memoryview(ray.get(reference)))
        return made


def _task(key: int, said: Head, begin: list[Any], piece: Any) -> Reply:
    """One piece, in a worker; `key` says which of the driver's works it is of."""
    if key not in _ready:
        _ready[key] = _prepare(said, begin[0])
    work = _ready[key]
    return work if isinstance(work, Reply) else do(work, piece)


def _prepare(said: Head, begin: Any) -> Work | Reply:
    import ray

    stack = ExitStack()
    atexit.register(stack.close)
    try:
        meet(said)
        # Beside it goes what a worker of before that was killed has left.
        place = Path(tempfile.gettempdir()) / f"penjing-{os.getuid()}"
        place.mkdir(mode=0o700, exist_ok=True)
        folder = stack.enter_context(folder_beside(place / "worker", "ray"))
        try:
            made = ray.get(begin)
        except ray.exceptions.RaySystemError as error:  # it cannot be read here
            raise unsendable(error) from error
        return ready(made, folder)
    except PenjingError as error:
        return Reply(error=error)


class _Ray:
    def __init__(self, threads: int) -> None:
        import ray

        self._ray, self._threads = ray, threads
        nodes = [n["Resources"].get("CPU", 0.0) for n in ray.nodes() if n["Alive"]]
        self.room = sum(int(cores // threads) for cores in nodes)
        if not self.room:
            raise InputError(
                "no node of the cluster has so many cores", got=threads,
                allowed=f"at most {max(nodes, default=0.0):g}", next="give fewer --threads",
            )  # fmt: skip
        self._task = ray.remote(_task).options(
            num_cpus=threads, max_retries=TRIES - 1, retry_exceptions=False
        )
        self._begun = 0
        self._said: tuple[Head, list[Any]] | None = None
        self._numbers: dict[Any, int] = {}

    def ship(self, folder: Path) -> _Sent:
        paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        return _Sent({
            p.relative_to(folder).as_posix(): self._ray.put(np.fromfile(p, np.uint8))
            for p in paths
        })  # fmt: skip

    def start(self, begin: Begin) -> None:
        # Inside a list a reference stays one: a worker reads it once, not with every piece.
        self._said = head(self._threads), [self._ray.put(begin)]
        self._begun += 1

    def give(self, number: int, piece: Any) -> None:
        assert self._said is not None
        said, begin = self._said
        self._numbers[self._task.remote(self._begun, said, begin, piece)] = number

    def take(self) -> tuple[int, Any]:
        (done,), _ = self._ray.wait(list(self._numbers), num_returns=1)
        number = self._numbers.pop(done)
        try:
            reply = self._ray.get(done)
        except self._ray.exceptions.RayTaskError:
            raise  # a defect
        except self._ray.exceptions.RayError as error:
            raise lost(number, str(error).strip().splitlines()[0]) from error
        return number, result_of(reply)


@contextmanager
def crew(where: Where, _: Path) -> Iterator[_Ray]:
    """As `penjing.workers.crew`."""
    address = str(where.ray)
    if importlib.util.find_spec("ray") is None:
        raise UsageError("a cluster needs Ray", next="pip install 'penjing[ray]'")
    if not _ADDRESS.fullmatch(address):
        raise UsageError(
            "address of a Ray cluster", got=address, allowed="HOST:PORT of its head, or auto",
            next="run penjing on a node of the cluster, see docs/cluster.md",
        )  # fmt: skip
    _reach(address)
    if not where.insecure:
        _refuse_open(address)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(
            f"cannot join the Ray cluster {address}", got=str(error).strip().splitlines()[0],
            next="check the address, the token (RAY_AUTH_MODE=token) and TLS, see docs/cluster.md",
        ) from error  # fmt: skip
    try:
        yield _Ray(where.threads)
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Ray itself tries for minutes, and names other addresses than the one that was given.

    Raises:
        InputError: nothing listens there.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at {address}",
            got=getattr(error, "strerror", None) or str(error),
            next="check the address: penjing runs on a node of the cluster, see docs/cluster.md",
        ) from error  # fmt: skip


def _refuse_open(address: str) -> None:
    """Knock without a token.

    Raises:
        InputError: the cluster answers.
    """
    words = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    words += [] if address == "auto" else ["--address", address]
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH_")}
    try:
        done = subprocess.run(
            words, env=plain | {"RAY_AUTH_MODE": "disabled"}, timeout=_SECONDS,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return  # it does not answer; joining it says why
    if done.returncode == 0:
        raise InputError(
            f"the Ray cluster {address} asks for no token: whoever reaches it runs code on it",
            allowed="a cluster started with RAY_AUTH_MODE=token",
            next="see docs/cluster.md, or pass --insecure where its network is closed",
        )  # fmt: skip
