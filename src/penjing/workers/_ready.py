"""What a worker does, wherever it is: get ready once, then piece after piece."""

from __future__ import annotations

import platform
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.errors import InputError, PenjingError, UsageError
from penjing.registry import adopt, user_modules
from penjing.workers._quiet import working

if TYPE_CHECKING:
    from penjing.workers import Begin, Work

__all__ = ["TRIES", "Head", "Reply", "do", "head", "lost", "meet", "ready", "result_of",
           "unsendable"]  # fmt: skip

# A piece that ends so many workers is not given to another.
TRIES = 3


@dataclass(frozen=True)
class Head:
    """What a worker is told before anything else, of plain values."""

    threads: int
    versions: Mapping[str, str]
    path: tuple[str, ...]
    modules: Mapping[str, str]


@dataclass(frozen=True)
class Reply:
    """What came of a piece: a value, an error for users, or the trace of a defect."""

    value: Any = None
    error: PenjingError | None = None
    defect: str = ""


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {n: version(n) for n in ("penjing", "torch")}


def head(threads: int) -> Head:
    """Of this process."""
    return Head(threads, _versions(), tuple(sys.path), user_modules())


def meet(said: Head) -> None:
    """Become a worker of who said this.

    Raises:
        InputError: other versions here.
    """
    import torch

    if (here := _versions()) != dict(said.versions):
        name = next(n for n in here if here[n] != said.versions.get(n))
        raise InputError(
            f"a worker on {platform.node()} has another {name}", got=here[name],
            allowed=said.versions.get(name), next="install the same on every node",
        )  # fmt: skip
    torch.set_num_threads(said.threads)
    sys.path += [place for place in said.path if place not in sys.path]
    adopt(said.modules)


def ready(begin: Begin, folder: Path) -> Work:
    """The function that does a piece."""
    with working():
        return begin(folder)


def do(work: Work, piece: Any) -> Reply:
    """Do a piece."""
    try:
        with working():
            return Reply(work(piece))
    except PenjingError as error:
        return Reply(error=error)
    except Exception:
        return Reply(defect=traceback.format_exc())


def result_of(reply: Reply) -> Any:
    """The value.

    Raises:
        PenjingError: of the work.
        RuntimeError: a defect.
    """
    if reply.error is not None:
        raise reply.error
    if reply.defect:
        raise RuntimeError(f"in a worker:\n{reply.defect}")
    return reply.value


def lost(number: int, words: str) -> InputError:
    """The error of a piece that no worker lived through."""
    return InputError(
        f"piece {number} of the work ended {TRIES} workers", got=words,
        next="free memory, or give fewer workers; what is finished is kept",
    )  # fmt: skip


def unsendable(error: Exception) -> UsageError:
    """The error of work that cannot be pickled, or not be read again."""
    return UsageError(
        "the work cannot be sent to a worker", got=f"{type(error).__name__}: {error}",
        allowed="functions of importable modules, or file.py:function",
        next="write the function into a file, or work without workers",
    )  # fmt: skip
