"""Comma-separated values with a header line; `.tsv` is the same with tabs."""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from penjing.data.dataset import Dataset
from penjing.data.table import from_rows
from penjing.errors import InputError

__all__ = ["read"]


def read(path: Path, *, text: str, label: str) -> Dataset:
    """The samples of a `.csv` or `.tsv` file.

    Raises:
        InputError: a line whose number of fields is not the header's, text that is not UTF-8,
            or what `from_rows` says.
    """
    with _long_fields():
        return from_rows(_rows(path), text=text, label=label, path=str(path))


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    # The csv module refuses fields over 128 KiB unless told, and a document may be longer.
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        try:
            for fields in reader:
                if not fields:
                    continue
                if header is None:
                    header = _checked(fields, path)
                    continue
                if len(fields) != len(header):
                    raise InputError(
                        f"{path} line {reader.line_num}: malformed",
                        got=f"{len(fields)} fields",
                        allowed=f"{len(header)}, as in the header",
                    )
                yield f"line {reader.line_num}", dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise InputError(f"{path} line {reader.line_num}: malformed", got=error) from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} after line {reader.line_num}: not UTF-8", next="convert the file to UTF-8"
            ) from error


def _checked(header: list[str], path: Path) -> list[str]:
    names = [name.strip() for name in header]
    if len(set(names)) != len(names):
        raise InputError(f"{path}: a column name occurs twice", got=", ".join(names))
    return names
