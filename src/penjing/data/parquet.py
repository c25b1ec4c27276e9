"""Parquet tables."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet

from penjing.data.dataset import Dataset
from penjing.data.table import PAIR, SCORE, from_rows
from penjing.errors import InputError

__all__ = ["read"]


def read(path: Path, *, text: str, label: str) -> Dataset:
    """The samples of a `.parquet` file; only the columns that are used are read.

    Raises:
        InputError: not a Parquet file, or what `from_rows` says.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            used = [n for n in names if n in (text, label, *PAIR, SCORE)]
            if text not in used and not set(PAIR) <= set(used):
                raise InputError(
                    f"{path}: no column {text!r}",
                    got=", ".join(names),
                    next="name the columns of the text and of the label",
                )
            rows = file.read(columns=used).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is not a Parquet file", got=error) from error
    numbered = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    return from_rows(numbered, text=text, label=label, path=str(path))
