"""Plain text: paragraphs, split on blank lines, are the samples."""

from __future__ import annotations

import re
from pathlib import Path

from penjing.data.dataset import Dataset
from penjing.errors import InputError

__all__ = ["read"]


def read(path: Path) -> Dataset:
    """The paragraphs of a `.txt` file, without labels.

    Raises:
        InputError: no paragraphs, or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8", next="convert the file to UTF-8") from error
    paragraphs = tuple(p.strip() for p in re.split(r"\r?\n[ \t]*\r?\n", text) if p.strip())
    if not paragraphs:
        raise InputError("no samples", got=path, next="the file is empty; add some")
    return Dataset("text", paragraphs, path=str(path))
