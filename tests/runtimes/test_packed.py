"""The runtime on packed planes beside the float one, on an artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from penjing.edits import perform
from penjing.load import load
from penjing.packedlayers import PackedLinear
from penjing.planes import Scheme
from penjing.quantizers import rtn
from penjing.recipe import Edit
from penjing.runtimes import packed
from penjing.runtimes import torch as float_runtime
from penjing.writers.artifact import save

NET = """
import torch
def net():
    n = torch.nn
    return n.Sequential(n.Linear(40, 30), n.ReLU(), n.Linear(30, 20))
def example():
    return torch.ones(2, 40)
"""


def test_the_same_answers_as_the_float_weights(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.ReLU(), torch.nn.Linear(30, 20))
    torch.save(net.state_dict(), tmp_path / "w.pth")
    model = load(f"{tmp_path / 'net.py'}:net", weights=tmp_path / "w.pth")
    planes = rtn.fit(model.module.get_parameter("0.weight").detach(), Scheme(2, 8))
    perform(model, Edit("quantize", "0.weight", planes, "test"))
    save(model, tmp_path / "out")
    session = packed.open(tmp_path / "out" / packed.file, threads=1)
    assert isinstance(session.model.module[0], PackedLinear)
    assert not isinstance(session.model.module[2], PackedLinear)
    x = np.random.default_rng(0).standard_normal((5, 40), dtype=np.float32)
    batch = {next(iter(session.inputs)): x}
    wanted = float_runtime.open(tmp_path / "out", threads=1).run(batch)
    np.testing.assert_allclose(session.run(batch), wanted, atol=1e-5)
