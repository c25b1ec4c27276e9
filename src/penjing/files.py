"""A folder or a file that is either whole or not there.

Written beside its final place, synced, renamed; the manifest of a folder is its last file.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from penjing.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_output", "disk_errors", "fingerprint", "folder_beside", "held", "holds_work",
    "kept_in", "read_json", "sha256", "sync", "whole_file", "whole_folder", "write_json",
    "write_tensors",
]  # fmt: skip


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(paths: Iterable[Path]) -> str:
    """SHA-256 over the SHA-256 of each file, in order; names do not count."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_output(output: Path, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Raises:
        InputError: it exists, is one of the inputs, or its folder cannot be written.
    """
    for source in inputs:
        if output.exists() and source.exists() and output.resolve() == source.resolve():
            raise InputError("the output is the input", got=output, next="choose another -o")
    if output.exists() and not overwrite:
        raise InputError(
            "the output exists", got=output, next="choose another -o, or pass --overwrite"
        )
    parent = output.absolute().parent
    if not parent.is_dir():
        raise InputError("the output's folder does not exist", got=parent, next="create it")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(
            "the output's folder cannot be written", got=f"{parent} ({error.strerror})"
        ) from error


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Failures to write `output`, a full disk above all, as errors for users."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {output}",
            got=getattr(error, "strerror", None) or error,
            next="free disk space or choose another -o; the output was not made",
        ) from error


@contextlib.contextmanager
def folder_beside(output: Path, kind: str) -> Iterator[Path]:
    """Yield an empty folder beside `output`; at the end it is gone, whatever happens.

    What a killed process left of the same output and kind goes too.
    """
    parent, prefix = output.absolute().parent, f".{output.name}.{kind}."
    for old in parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError), held(old):
            shutil.rmtree(old)
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with held(made):
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """A lock on a file or a folder that ends with this process.

    Raises:
        OSError: another process holds it, or there is no such path.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `output`; rename it to `output` when the body succeeds.

    A `manifest.json` must be written by the body; it is synced last. When the body fails
    the folder is removed and `output` is as it was.
    """
    output = output.absolute()
    check_output(output, overwrite)
    with disk_errors(output), folder_beside(output, "new") as beside:
        beside.chmod(0o755)
        yield beside
        files = sorted(p for p in beside.rglob("*") if p.is_file())
        for path in sorted(files, key=lambda p: p.name == "manifest.json"):
            sync(path)
        sync(beside)
        check_output(output, overwrite)  # another run may have been faster
        if output.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
            output.rename(old / "was")
            beside.rename(output)
            shutil.rmtree(old)
        else:
            beside.rename(output)
        sync(output.parent)


def whole_file(output: Path, write: Callable[[Path], object], overwrite: bool = False) -> None:
    """Write one file through `write(path)`, whole or not at all."""
    output = output.absolute()
    check_output(output, overwrite)
    with disk_errors(output):
        handle, name = tempfile.mkstemp(
            prefix=f".{output.stem}.", suffix=output.suffix, dir=output.parent
        )
        os.close(handle)
        beside = Path(name)
        try:
            write(beside)
            beside.chmod(0o644)
            sync(beside)
            check_output(output, overwrite)
            beside.replace(output)
            sync(output.parent)
        finally:
            beside.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str], what: str
) -> None:
    """Replace a safetensors file, whole or not at all; what was there stays until then.

    Args:
        notes: of its header.
        what: for the error: what it is.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    from safetensors.torch import save_file  # torch takes a second

    beside = path.with_suffix(".part")
    try:
        save_file(dict(tensors), beside, dict(notes))
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise InputError(
            f"cannot write {what} {path}",
            got=error,
            next=f"free disk space or name another folder, and run again; {kept_in(path.parent)}",
        ) from error


def holds_work(folder: Path) -> bool:
    """Whether a journal or a cache has something whole, or a checkpoint, to go on from."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.shards/*/notes.json"))


def kept_in(folder: Path) -> str:
    """The same as a clause for errors."""
    there = f"what was finished before is kept in {folder}"
    return there if holds_work(folder) else "nothing is kept"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, NaN refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, limit: int = 10_000_000) -> Any:
    """Read a JSON file of at most `limit` bytes.

    Raises:
        InputError: missing, too large, too deep or not JSON.
    """
    if not path.is_file():
        raise InputError("no such file", got=path)
    if path.stat().st_size > limit:
        raise InputError(f"{path} is too large", got=path.stat().st_size, allowed=f"<= {limit} B")
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON", got=type(error).__name__) from error
