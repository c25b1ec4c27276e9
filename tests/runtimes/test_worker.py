"""The pipe's messages, and the process at its other end."""

import io
import struct

import numpy as np
import pytest

from penjing.errors import InputError
from penjing.runtimes import _worker


def test_messages_round_trip() -> None:
    arrays = {
        "ids": np.arange(6).reshape(2, 3).T,
        "x": np.float32([[1.5]]),
        "none": np.zeros((0, 4), np.float32),
        "flag": np.array(True),
    }
    pipe = io.BytesIO()
    _worker.send(pipe, {"do": "run", "n": 3}, arrays)
    pipe.seek(0)
    header, back = _worker.receive(pipe)
    assert header == {"do": "run", "n": 3}
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)


def test_broken_messages_are_refused() -> None:
    with pytest.raises(EOFError):
        _worker.receive(io.BytesIO(b""))
    with pytest.raises(InputError, match="header"):
        _worker.receive(io.BytesIO(struct.pack(">I", 1 << 30)))
    text = b'{"arrays": [["a", "|O", [1]]]}'
    with pytest.raises(InputError, match="objects"):
        _worker.receive(io.BytesIO(struct.pack(">I", len(text)) + text + b"x" * 8))


def test_peak_memory_grows_with_what_is_held() -> None:
    before = _worker.peak_memory()
    held = np.ones(200_000_000 // 8)
    after = _worker.peak_memory()
    assert held.sum() == 25_000_000
    # The high-water mark may already have been higher than what is held now.
    assert after >= before
    assert after > 200_000_000
