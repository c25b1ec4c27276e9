"""Reading and writing weight files: hostile ones are refused, and nothing in them runs."""

import io
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from penjing.errors import InputError, UsageError
from penjing.weightfiles import Tensors, read, write


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def huge_npy() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": (10**15,)}
    )
    return file.getvalue()


def bad_files(folder: Path) -> dict[str, str]:
    """File name to the message it must give."""
    marker = folder / "ran"
    np.save(folder / "object.npy", np.array([Bomb(marker)]), allow_pickle=True)
    np.savez(folder / "object.npz", a=np.array([Bomb(marker)], dtype=object))
    torch.save({"a": Bomb(marker)}, folder / "reduce.pth")
    torch.save({"a": Bomb(marker)}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.ones(1).expand(10**12)}, folder / "stride.pth")
    torch.save({"state_dict": {"a": torch.ones(1)}}, folder / "nested.pth")
    torch.save({"a": torch.eye(2).to_sparse()}, folder / "sparse.pth")
    torch.save({"a": torch.ones(100, 100)}, folder / "whole.pth")
    with (
        zipfile.ZipFile(folder / "whole.pth") as source,
        zipfile.ZipFile(folder / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    (folder / "cut.pth").write_bytes((folder / "whole.pth").read_bytes()[:2000])
    (folder / "huge.npy").write_bytes(huge_npy())
    (folder / "empty.npy").write_bytes(b"")
    with zipfile.ZipFile(folder / "huge.npz", "w") as archive:
        archive.writestr("a.npy", huge_npy())
    np.save(folder / "whole.npy", np.ones(100))
    (folder / "cut.npy").write_bytes((folder / "whole.npy").read_bytes()[:-1])
    np.save(folder / "text.npy", np.array(["a"]))
    for suffix in ("npz", "safetensors"):
        (folder / f"junk.{suffix}").write_bytes(b"PK\x03\x04 no more than this")
    (folder / "long.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    (folder / "folder.npy").mkdir()
    return {
        "object.npy": "Python objects",
        "object.npz": "Python objects",
        "reduce.pth": "Python objects",
        "legacy.pth": "not a zip archive",
        "stride.pth": "claims more than is stored",
        "nested.pth": "not a state dict",
        "sparse.pth": "not a plain tensor",
        "deflated.pth": "compressed",
        "cut.pth": "not a zip archive",
        "huge.npy": "cut short",
        "empty.npy": "not a whole .npy",
        "huge.npz": "cut short",
        "cut.npy": "cut short",
        "text.npy": "no numbers",
        "junk.npz": "not a whole .npz",
        "junk.safetensors": "not a whole .safetensors",
        "long.safetensors": "not a whole .safetensors",
        "folder.npy": "no such file",
        "missing.npz": "no such file",
    }


def test_bad_files_are_refused_quickly_and_run_nothing(tmp_path: Path) -> None:
    for name, message in bad_files(tmp_path).items():
        started = time.monotonic()
        with pytest.raises(InputError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - started < 2, name
    assert not (tmp_path / "ran").exists()


def test_a_zip_bomb_is_refused_by_its_claim(tmp_path: Path) -> None:
    # The directory's 5000 entries say 4 GiB each; nothing is unpacked.
    np.savez(tmp_path / "a.npz", *[np.ones(1)] * 5000)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    entry = data.find(b"PK\x01\x02")
    while entry >= 0:
        data[entry + 24 : entry + 28] = (2**32 - 2).to_bytes(4, "little")
        entry = data.find(b"PK\x01\x02", entry + 4)
    (tmp_path / "a.npz").write_bytes(bytes(data))
    with pytest.raises(InputError, match="does not fit in memory"):
        read(tmp_path / "a.npz")


def test_formats_have_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.npy, \.npz, \.safetensors"):
        read(tmp_path / "model.bin")
    with pytest.raises(UsageError, match="format of a weight file"):
        write(tmp_path / "model.bin", Tensors({}))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    shared = torch.randn(3, 4)
    tensors = {
        "a": shared,
        "b": shared,
        "t": torch.randn(4, 3).T,
        "i": torch.arange(3),
        "e": torch.zeros(0, 2),
        "../x\x1b[31m": torch.ones(1),
    }
    write(tmp_path / f"x{suffix}", Tensors(tensors))
    found = read(tmp_path / f"x{suffix}").tensors
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [p.name for p in tmp_path.iterdir()] == [f"x{suffix}"]


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    brain = Tensors({"a": torch.ones(2, dtype=torch.bfloat16)})
    for suffix in (".npy", ".npz"):
        with pytest.raises(InputError, match=r"numpy's formats.*safetensors"):
            write(tmp_path / f"x{suffix}", brain)
    write(tmp_path / "x.safetensors", brain)
    assert torch.equal(read(tmp_path / "x.safetensors").tensors["a"], brain.tensors["a"])
    strings = Tensors({"a": torch.ones(1)}, raw={"s": np.array(["x"])})
    with pytest.raises(InputError, match=r"cannot hold.*\.npz"):
        write(tmp_path / "y.safetensors", strings)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
