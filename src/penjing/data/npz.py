"""Named arrays whose first axis counts the samples; `labels`, `label` or `y` are the labels."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from penjing.data.dataset import Dataset
from penjing.data.labels import integer_labels
from penjing.errors import InputError

__all__ = ["read"]

LABELS = ("labels", "label", "y")


def read(path: Path, *, label: str) -> Dataset:
    """The samples of a `.npz` file, each a dict of arrays without the first axis.

    Args:
        path: the file.
        label: name of the array of labels, tried before `labels`, `label` and `y`.

    Raises:
        InputError: not an `.npz`, pickled objects, no arrays of samples, lengths that differ,
            NaN or Inf, labels that are not a line of integers or strings.
    """
    arrays = _load(path)
    target = next((name for name in (label, *LABELS) if name in arrays), None)
    if label not in (*LABELS, target):
        raise InputError(f"{path}: no array {label!r}", got=", ".join(arrays))
    values = None if target is None else arrays.pop(target)
    if not arrays:
        raise InputError(f"{path}: no array of samples", got=target or "no arrays")
    lengths = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if values is not None:
        lengths[str(target)] = len(values) if values.ndim else 0
    if len(set(lengths.values())) != 1:
        raise InputError(
            f"{path}: arrays differ in their number of samples",
            got=", ".join(f"{name} {n}" for name, n in lengths.items()),
            allowed="one first axis, the samples",
        )
    count = next(iter(lengths.values()))
    if not count:
        raise InputError("no samples", got=path, next="the arrays are empty; add some")
    samples = tuple({name: array[i] for name, array in arrays.items()} for i in range(count))
    if values is None:
        return Dataset("arrays", samples, path=str(path))
    if values.ndim != 1:
        raise InputError(
            f"{path}: labels {target}", got=f"shape {values.shape}", allowed=f"({count},)"
        )
    places = [f"label {i}" for i in range(1, count + 1)]
    labels, classes = integer_labels(values.tolist(), places, str(path))
    return Dataset("arrays", samples, labels, classes, str(path))


def _load(path: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path):
            pass
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                arrays[name] = file[name]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise InputError(
            f"{path} cannot be read as .npz",
            got=error,
            allowed="arrays of numbers saved by numpy.savez; pickled objects are never loaded",
        ) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufUS":
            raise InputError(
                f"{path}: array {name}",
                got=getattr(array, "dtype", "not an array"),
                allowed="numbers",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise InputError(f"{path}: array {name} has NaN or Inf", got=f"{bad} values")
    return arrays
