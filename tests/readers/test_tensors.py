from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from penjing.errors import InputError
from penjing.readers._tensors import read_pickle


def test_state_dicts_are_read_and_unwrapped(tmp_path: Path) -> None:
    state = {"a.b": torch.arange(3.0)}
    for content in (state, {"state_dict": state, "epoch": 3}, {"model": state}):
        torch.save(content, tmp_path / "w.pth")
        assert torch.equal(read_pickle(tmp_path / "w.pth")["a.b"], torch.arange(3.0))


def test_bombs_modules_and_fragments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    good = tmp_path / "good.pth"
    torch.save({"w": torch.zeros(1000)}, good)

    def squeezed() -> None:
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for item in old.infolist():
                new.writestr(item.filename, old.read(item))

    cases = [
        (squeezed, "compressed"),
        (lambda: torch.save({"w": torch.zeros(1).expand(2**40)}, path), "larger than the file"),
        (lambda: torch.save(torch.nn.Linear(2, 2), path), "weights-only"),
        (lambda: path.write_bytes(good.read_bytes()[:600]), "weights-only"),
        (lambda: path.write_bytes(b""), "weights-only"),
        (lambda: torch.save([torch.zeros(1)], path), "no state dict"),
        (lambda: torch.save({"w": torch.zeros(1), "x": 1}, path), "x in .* is not a tensor"),
        (lambda: torch.jit.script(torch.nn.Linear(2, 2)).save(str(path)), "compressed"),
    ]
    for write, message in cases:
        write()
        with pytest.raises(InputError, match=message):
            read_pickle(path)
