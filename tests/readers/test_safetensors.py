"""The bad-input set of the format: every file is refused within two seconds, by a typed error."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penjing.errors import InputError
from penjing.readers._safetensors import read_safetensors


def _file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(start: int = 0, end: int = 8, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


ONE, EIGHT = {"w": _entry()}, bytes(8)
TWICE = b'{"w":' + json.dumps(_entry()).encode() + b',"w":' + json.dumps(_entry()).encode() + b"}"
BAD: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "truncated header": lambda: _file(ONE, EIGHT)[:20],
    "length 2^63": lambda: _file(ONE, EIGHT, 2**63),
    "longer than the file": lambda: _file(ONE, EIGHT, 10_000),
    "huge header": lambda: _file(b"{" + b" " * 101_000_000),
    "not UTF-8": lambda: _file(b'{"\xff":1}'),
    "not JSON": lambda: _file(b"{nonsense}"),
    "leading space": lambda: _file(b" " + json.dumps(ONE).encode(), EIGHT),
    "nesting": lambda: _file(b'{"a":' + b"[" * 200_000),
    "truncated data": lambda: _file(ONE, bytes(7)),
    "trailing bytes": lambda: _file(ONE, bytes(9)),
    "overlap": lambda: _file({"a": _entry(), "b": _entry(4, 12)}, bytes(12)),
    "hole": lambda: _file({"a": _entry(), "b": _entry(12, 20)}, bytes(20)),
    "reversed offsets": lambda: _file({"w": _entry(8, 0)}, EIGHT),
    "negative offset": lambda: _file({"w": _entry(-8, 0)}, EIGHT),
    "shape overflow": lambda: _file({"w": _entry(shape=(2**40, 2**40))}, EIGHT),
    "shape does not match": lambda: _file({"w": _entry(shape=(3,))}, EIGHT),
    "unknown dtype": lambda: _file({"w": _entry(dtype="F33")}, EIGHT),
    "duplicate key": lambda: _file(TWICE, EIGHT),
    "metadata": lambda: _file({"__metadata__": {"a": 1}, "w": _entry()}, EIGHT),
    "no tensors": lambda: _file({}),
    "entry is no object": lambda: _file({"w": 3}, EIGHT),
    "a million entries": lambda: _file(
        b"{" + b",".join(
            b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(400_000)
        ) + b"}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(BAD[case]())
    start = time.perf_counter()
    with pytest.raises(InputError):
        read_safetensors(path)
    assert time.perf_counter() - start < 2


def test_odd_names_are_only_names(tmp_path: Path) -> None:
    names = ["../../x", "a\0b", "\x1b[31m", "<img src=x>", "é"]
    save_file({n: torch.full((1,), i) for i, n in enumerate(names)}, tmp_path / "w.safetensors")
    tensors = read_safetensors(tmp_path / "w.safetensors")
    assert {n: int(t) for n, t in tensors.items()} == {n: i for i, n in enumerate(names)}
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
