"""Two processes under torchrun end where one does that takes both their batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing import together
from penjing.apply import apply
from penjing.recipe import Recipe
from penjing.steps.prune import Prune
from penjing.steps.recover import Recover

STEP = {"seconds": 0, "lr": 3e-3, "hidden": 1.0, "precision": "float32", "patience": 15}

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import networks as net
from safetensors.torch import save_file
from penjing import together
from penjing.apply import apply
from penjing.recipe import Recipe
from penjing.steps.prune import Prune
from penjing.steps.recover import Recover

folder = Path(sys.argv[2])
model = net.stack()
with together.group():
    assert together.count() == 2
    assert together.agreed(float(together.rank() + 5)) == 5
    assert together.total(float(together.rank() + 1)) == 3
    step = Recover(steps=12, **eval(sys.argv[3]))
    recipe = Recipe((Prune(0.7, "magnitude"), step))
    done = apply(model, recipe, net.arrays(9), journal=folder / "journal")
    tensors = {n: p.detach().contiguous() for n, p in done.model.module.named_parameters()}
    loss = torch.tensor(done.done[-1].note["loss"], dtype=torch.float64)
    save_file({**tensors, "loss": loss}, folder / f"{together.rank()}.safetensors")
"""


def test_alone_nothing_changes() -> None:
    with together.group():
        assert (together.rank(), together.count()) == (0, 1)
        assert together.agreed(2.5) == together.total(2.5) == 2.5


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run([*command, repr(STEP)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    step = Recover(steps=12, accumulate=2, **STEP)  # type: ignore[arg-type]
    recipe = Recipe((Prune(0.7, "magnitude"), step))
    alone = apply(net.stack(), recipe, net.arrays(9))
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert float(first["loss"]) == pytest.approx(alone.done[-1].note["loss"], rel=1e-5)
    start = dict(net.stack().module.named_parameters())
    for name, parameter in alone.model.module.named_parameters():
        assert torch.equal(first[name], second[name])
        moved = float((parameter - start[name]).detach().norm())
        assert float((first[name] - parameter).detach().norm()) <= 1e-3 * moved
