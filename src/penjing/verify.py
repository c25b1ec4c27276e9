"""Verify an artifact: its hashes, its structure, and that its exported files agree with it.

Every check is made, whatever the others found, as far as it can be; a check that needs what
another found broken fails with that reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.errors import InputError, PenjingError, UsageError
from penjing.export import READ_BACK, TARGETS, deviation, file_of, tolerance
from penjing.files import read_json, sha256
from penjing.load import load
from penjing.model import Model
from penjing.result import Result

__all__ = ["Check", "verify"]


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what, e.g. a file's name in the folder, `structure`, `parity onnx`.
        ok: whether it is as it should be; what could not be tried here is not.
        detail: a clause: what was found.
    """

    name: str
    ok: bool
    detail: str


def verify(folder: str | Path, *, threads: int = 1) -> list[Check]:
    """Check an artifact.

    Args:
        folder: that penjing wrote.
        threads: for running the exported files.

    Returns:
        In order: each file of the manifest, files that are in no manifest, `structure`,
        `results.json` if present, `parity` of each exported file present.

    Raises:
        InputError: no artifact there, so there is nothing to check.
    """
    place = Path(folder)
    if not (place / "manifest.json").is_file():
        raise InputError("no manifest.json", got=place, next="give a folder that penjing wrote")
    manifest = read_json(place / "manifest.json")
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(entries, dict):
        raise InputError(f"{place}/manifest.json lists no files", next="export the model again")
    checks = [_file(place, str(name), entry) for name, entry in sorted(entries.items())]
    checks += _surplus(place, set(entries))
    try:
        model: Model | None = load(place)
        checks.append(Check("structure", True, "loads as a torch module"))
    except PenjingError as error:
        model = None
        checks.append(Check("structure", False, str(error)))
    if (place / "results.json").is_file():
        checks.append(_results(place / "results.json"))
    for target in (*TARGETS, *READ_BACK):
        path = place / file_of(target)
        if path.exists():
            checks.append(_parity(model, target, path, threads))
    return checks


def _file(place: Path, name: str, entry: Any) -> Check:
    path = place / name
    if not path.resolve().is_relative_to(place.resolve()):
        return Check(name, False, "lies outside the folder")
    if not path.is_file():
        return Check(name, False, "is missing")
    if not isinstance(entry, dict) or not {"size", "sha256"} <= set(entry):
        return Check(name, False, "has no size and hash in the manifest")
    if (size := path.stat().st_size) != entry["size"]:
        return Check(name, False, f"has {size} bytes, not {entry['size']}")
    if sha256(path) != entry["sha256"]:
        return Check(name, False, "has another SHA-256 than the manifest says")
    return Check(name, True, f"{size} bytes, SHA-256 as the manifest says")


def _surplus(place: Path, listed: set[str]) -> list[Check]:
    found = {p.relative_to(place).as_posix() for p in place.rglob("*") if not p.is_dir()}
    surplus = sorted(found - listed - {"manifest.json"})
    return [Check(name, False, "is in no manifest") for name in surplus]


def _results(path: Path) -> Check:
    try:
        result = Result.from_json(read_json(path))
        size = result.after.size_bytes
        if size <= 0 or result.after.latency_ms.median <= 0:
            return Check("results.json", False, "a size or a latency that is not positive")
    except InputError as error:
        return Check("results.json", False, str(error))
    except (KeyError, TypeError, AttributeError) as error:
        return Check("results.json", False, f"not well-formed: {type(error).__name__}: {error}")
    return Check("results.json", True, f"well-formed, {result.metric} in {result.runtime}")


def _parity(model: Model | None, target: str, path: Path, threads: int) -> Check:
    name = f"parity {target}"
    if model is None:
        return Check(name, False, "the torch module to compare with does not load")
    try:
        found = deviation(model, target, path, threads=threads)
    except UsageError as error:
        return Check(name, False, f"could not be tried: {error}")
    except PenjingError as error:
        return Check(name, False, str(error))
    allowed = tolerance(model, target, found)
    # NaN compares false, so it fails.
    return Check(name, found <= allowed, f"deviation {found:.3g}, allowed {allowed:g}")
