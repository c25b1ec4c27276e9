"""Data to calibrate and to evaluate on: files to samples, samples to batches.

The extension says the format: `.jsonl`, `.csv`, `.tsv`, `.parquet`, `.npz`, `.txt`, or a folder
of images. Bad data is an InputError before any work, and the order is that of the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from penjing.data import csv, images, jsonl, npz, parquet, txt
from penjing.data.dataset import Dataset, Kind, check_disjoint, split
from penjing.data.encode import align, encode, prepare, windows
from penjing.errors import InputError, UsageError

__all__ = [
    "Dataset",
    "Kind",
    "align",
    "check_disjoint",
    "encode",
    "prepare",
    "read",
    "split",
    "windows",
]


def read(
    path: str | os.PathLike[str],
    *,
    text: str = "text",
    label: str = "label",
    limit: int | None = None,
) -> Dataset:
    """Read a data file, or a folder of images.

    Tables have a column `text`, or `text_a` and `text_b`; and, where there are labels, `label`
    (`score` for pairs). Labels that are strings become classes in sorted order.

    Args:
        path: file or folder.
        text: column of the text.
        label: column (or array) of the labels.
        limit: at most so many samples, spread evenly over the file, because files are often
            sorted by class.

    Raises:
        InputError: a missing or empty file, an unknown extension, a malformed line or array.
        UsageError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError("limit of samples", got=limit, allowed="1 or more")
    place = Path(path)
    dataset = _read(place, text, label)
    return dataset if limit is None else dataset.spread(limit)


def _read(path: Path, text: str, label: str) -> Dataset:
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            return images.read(path)
        if not path.is_file():
            raise InputError("no such data file", got=path, next="check the path")
        if path.stat().st_size == 0:
            raise InputError("no samples", got=path, next="the file is empty; add some")
        if suffix in (".jsonl", ".ndjson"):
            return jsonl.read(path, text=text, label=label)
        if suffix in (".csv", ".tsv"):
            return csv.read(path, text=text, label=label)
        if suffix == ".parquet":
            return parquet.read(path, text=text, label=label)
        if suffix == ".npz":
            return npz.read(path, label=label)
        if suffix == ".txt":
            return txt.read(path)
    except OSError as error:
        raise InputError("cannot read data", got=f"{path} ({error.strerror})") from error
    raise InputError(
        "unknown format of data",
        got=path,
        allowed=".jsonl .csv .tsv .parquet .npz .txt or a folder of images",
    )
