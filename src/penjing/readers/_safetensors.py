"""Read a safetensors file, its header checked first for what the library lets through.

The library checks offsets, shapes and lengths. It accepts a header that does not begin
with `{`, the same name twice, no tensors at all, and a million entries at a gigabyte of
memory; these are refused here before the library sees the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from penjing.errors import InputError
from penjing.readers._files import regular

__all__ = ["read_names", "read_safetensors"]

_LONGEST_HEADER = 32_000_000
_MOST_TENSORS = 100_000


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise InputError("a name twice", got=next(n for n in names if names.count(n) > 1))
    return table


def read_names(path: Path, root: Path | None = None) -> dict[str, Any]:
    """The header's entries by tensor name, without `__metadata__`; no tensor is read.

    Raises:
        InputError: the header is not what the format asks for.
    """
    regular(path, root)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > size - 8:
            raise InputError(
                f"{path} is not a whole safetensors file", got=f"{size} B", next="copy it again"
            )
        if length > _LONGEST_HEADER:
            raise InputError(
                f"header of {path}", got=f"{length} B", allowed=f"<= {_LONGEST_HEADER} B"
            )
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise InputError(f"{path} is not a safetensors file", got="a header that is no JSON object")
    if (count := raw.count(b'"data_offsets"')) > _MOST_TENSORS:
        raise InputError(f"tensors in {path}", got=count, allowed=f"<= {_MOST_TENSORS}")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except InputError as error:
        raise InputError(f"header of {path} has {error.what}", got=error.got) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"header of {path} is not JSON", got=type(error).__name__) from error
    header.pop("__metadata__", None)
    if not header:
        raise InputError(f"{path} has no tensors", next="give the file that holds the weights")
    return dict(header)


def read_safetensors(path: Path, root: Path | None = None) -> dict[str, Tensor]:
    """Every tensor of the file, memory-mapped, by name.

    Raises:
        InputError: not a sound safetensors file.
    """
    read_names(path, root)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path} is not a sound safetensors file", got=error) from error
