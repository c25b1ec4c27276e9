"""JSON lines: one object a line, blank lines skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from penjing.data.dataset import Dataset
from penjing.data.table import from_rows
from penjing.errors import InputError

__all__ = ["read"]


def read(path: Path, *, text: str, label: str) -> Dataset:
    """The samples of a `.jsonl` file.

    Raises:
        InputError: a line that is not a JSON object (with its number), or what `from_rows` says.
    """
    return from_rows(_rows(path), text=text, label=label, path=str(path))


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path} line {number}: not JSON",
                    got=line[:60].decode("utf-8", "replace").strip(),
                    allowed='one object a line, e.g. {"text": "..."}',
                ) from error
            if not isinstance(row, dict):
                raise InputError(
                    f"{path} line {number}: not a JSON object",
                    got=type(row).__name__,
                    allowed='e.g. {"text": "..."}',
                )
            if "\\u" in line.decode("utf-8-sig") and not _encodable(row):
                raise InputError(
                    f"{path} line {number}: half of a surrogate pair, which is no text",
                    got=line[:60].decode("utf-8", "replace").strip(), next="repair the line",
                )  # fmt: skip
            yield f"line {number}", row


def _encodable(row: object) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
