"""The header of a GGUF file, every count checked against the file's size before it is believed.

    magic, version, tensor count, key count; keys; tensor infos; padding; data

The `gguf` package's reader loops over whatever array length the file states, for hours if need be.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from penjing.errors import InputError
from penjing.readers._files import regular

__all__ = ["Header", "TensorInfo", "read_header"]

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its torch shape (outermost first), type, and bytes in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    length: int


@dataclass(frozen=True)
class Header:
    """Keys (arrays by their length only) and tensors by name."""

    keys: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def broken(self, what: str, got: object) -> InputError:
        return InputError(f"{self.path}: {what}", got=got, next="copy or convert it again")

    def skip(self, count: int) -> int:
        if count > self.size - self.at:
            raise self.broken("the header wants more bytes than the file has", count)
        start, self.at = self.at, self.at + count
        return start

    def scalar(self, code: str) -> Any:
        width = struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", self.data, self.skip(width))[0]

    def text(self) -> str:
        length = self.scalar("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", "replace")

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.broken("unknown type of a key", kind)
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING and count * 8 <= self.size - self.at:
            for _ in range(count):
                self.skip(self.scalar("Q"))
        else:
            raise self.broken("an array that cannot be", f"{count} of type {kind}")
        return count


def read_header(path: Path) -> Header:
    """Parse and check; no tensor data is read.

    Raises:
        InputError: not GGUF 2 or 3 (little endian), or counts, names or offsets that cannot be.
    """
    regular(path)
    if path.stat().st_size < 24:
        raise InputError(f"{path} is not a GGUF file", got=f"{path.stat().st_size} B")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        magic, version = cursor.scalar("4s"), cursor.scalar("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise InputError(f"{path} is not GGUF 2 or 3", got=f"{magic!r} version {version}")
        tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
        # A tensor takes at least 24 bytes of header, a key 12.
        if tensor_count * 24 + key_count * 12 > cursor.size:
            raise cursor.broken("counts do not fit the file", f"{tensor_count}, {key_count}")
        keys: dict[str, Any] = {}
        for _ in range(key_count):
            name = cursor.text()
            if name in keys:
                raise cursor.broken("a key twice", name)
            keys[name] = cursor.value()
        infos = [_info(cursor) for _ in range(tensor_count)]
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise cursor.broken("alignment", alignment)
        origin = -(-cursor.at // alignment) * alignment
        return Header(keys, _placed(infos, origin, alignment, cursor))


def _info(cursor: _Cursor) -> tuple[str, TensorInfo]:
    name, dims = cursor.text(), cursor.scalar("I")
    if not 1 <= dims <= 4:
        raise cursor.broken(f"dimensions of {name}", dims)
    shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
    kind, offset = cursor.scalar("I"), cursor.scalar("Q")
    if kind not in set(GGMLQuantizationType):
        raise cursor.broken(f"type of {name}", kind)
    block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    count = 1
    for n in shape:
        count *= n
    if count <= 0 or shape[-1] % block:
        raise cursor.broken(f"shape of {name}", shape)
    length = count // block * width
    return name, TensorInfo(shape, GGMLQuantizationType(kind), offset, length)


def _placed(
    infos: list[tuple[str, TensorInfo]], origin: int, alignment: int, cursor: _Cursor
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    end = origin
    for name, info in sorted(infos, key=lambda item: item[1].start):
        start = origin + info.start
        if name in tensors:
            raise cursor.broken("a tensor twice", name)
        if info.start % alignment or start < end or start + info.length > cursor.size:
            raise cursor.broken(f"{name} overlaps, is misaligned or ends past the file", info.start)
        end = start + info.length
        tensors[name] = TensorInfo(info.shape, info.kind, start, info.length)
    if not tensors:
        raise cursor.broken("no tensors", 0)
    return tensors
