from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from penjing.errors import InputError
from penjing.readers import weights

ARRAYS = {"a.b.weight": np.arange(6.0).reshape(2, 3), "a.c": np.ones(3), "train": np.zeros((2, 2))}


def _save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    tensors = {k: torch.from_numpy(v).contiguous() for k, v in arrays.items()}
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
def test_names_with_dots_round_trip(tmp_path: Path, suffix: str) -> None:
    model = weights.read(_save(tmp_path / f"w{suffix}", ARRAYS))
    found = {name: p.detach().numpy() for name, p in model.parameters()}
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == np.float32
    assert model.interface == "weights"
    with pytest.raises(InputError, match="cannot be run"):
        model.run({})


def test_a_lone_array_and_integers(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.float16([[1.5, -2]]))
    assert [p.tolist() for _, p in weights.read(tmp_path / "w.npy").parameters()] == [[[1.5, -2.0]]]
    path = _save(tmp_path / "i.npz", {"i": np.array([1, 2], np.int64)})
    assert weights.read(path).module.get_parameter("i").dtype == torch.int64


def test_bad_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", w=np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "objects.npy", np.array([print], dtype=object))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "text.npz").write_text("no zip")
    _save(tmp_path / "nan.npz", {"w": np.array([np.nan])})
    _save(tmp_path / "clash.safetensors", {"a": np.ones(1), "a.b": np.ones(1)})
    _save(tmp_path / "dots.safetensors", {"a..b": np.ones(1)})
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "loop.npy").symlink_to("loop.npy")
    for path in sorted(tmp_path.iterdir()):
        assert weights.recognises(path)
        with pytest.raises(InputError):
            weights.read(path)
