"""A network divided between processes is trained as a whole one, also after a kill."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing import checkpoint, sharding
from penjing.apply import apply
from penjing.errors import InputError, UsageError
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps.prune import Prune
from penjing.steps.recover import Recover

STEPS = 12
STEP = {"seconds": 0, "steps": STEPS, "lr": 3e-3, "hidden": 1.0, "precision": "float32",
        "patience": 15, "weight_decay": 0.01, "shard": True}  # fmt: skip

# Arguments: folder of the tests, folder of the run, the step, who dies and before which step.
SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import networks as net
from safetensors.torch import save_file
from penjing import checkpoint, sharding, together, training
from penjing.apply import apply
from penjing.recipe import Recipe
from penjing.steps.prune import Prune
from penjing.steps.recover import Recover

checkpoint.EVERY = 0.0
folder, (who, when) = Path(sys.argv[2]), map(int, sys.argv[4:])
shares, made = [], 0
real = training.nn.utils.clip_grad_norm_
def counted(parameters, *rest):
    global made
    made += 1
    if (together.rank(), made) == (who, when):
        os.kill(os.getpid(), signal.SIGKILL)
    shares.append(sum(sharding.is_divided(p) for p in parameters) / len(parameters))
    return real(parameters, *rest)
training.nn.utils.clip_grad_norm_ = counted
with together.group():
    recipe = Recipe((Prune(0.7, "magnitude"), Recover(**eval(sys.argv[3]))))
    done = apply(net.stack(), recipe, net.arrays(9), journal=folder / "journal")
    tensors = {n: p.detach().contiguous() for n, p in done.model.module.named_parameters()}
    more = {"loss": done.done[-1].note["loss"], "made": made, "divided": min(shares)}
    more = {n: torch.tensor(float(v), dtype=torch.float64) for n, v in more.items()}
    save_file({**tensors, **more}, folder / f"{together.rank()}.safetensors")
"""


def _run(folder: Path, processes: int, accumulate: int, dies: tuple[int, int] = (-1, 0)) -> int:
    script = folder / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(script), str(Path(__file__).parent)]
    command += [str(folder), repr({**STEP, "accumulate": accumulate}), *map(str, dies)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if dies[0] < 0:
        assert done.returncode == 0, done.stderr[-3000:]
    return done.returncode


def _alone(accumulate: int) -> tuple[Model, float]:
    step = Recover(**{**STEP, "accumulate": accumulate, "shard": False})  # type: ignore[arg-type]
    done = apply(net.stack(), Recipe((Prune(0.7, "magnitude"), step)), net.arrays(9))
    return done.model, float(done.done[-1].note["loss"])


def _check(found: dict[str, torch.Tensor], model: Model, loss: float) -> None:
    assert float(found["loss"]) == pytest.approx(loss, rel=1e-4)
    start = dict(net.stack().module.named_parameters())
    for name, parameter in model.module.named_parameters():
        moved = float((parameter - start[name]).detach().norm())
        assert float((found[name] - parameter).detach().norm()) <= 1e-3 * moved, name
    for name, mask in model.masks.items():
        assert not found[name][~mask].any()


def test_two_processes_with_half_of_it_each_are_as_one(tmp_path: Path) -> None:
    _run(tmp_path, 2, 1)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert float(first["divided"]) == 1  # every parameter
    _check(first, *_alone(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not [*(tmp_path / "journal").glob("*training*")]


def test_a_kill_of_one_process_costs_no_more_than_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(tmp_path, 2, 1, dies=(1, 7)) != 0
    journal = tmp_path / "journal"
    (kept,) = journal.glob("*.shards/*/notes.json")
    files = sorted(p.name.split("-")[0] for p in kept.parent.iterdir())
    assert files == ["notes.json", "shard", "shard"]
    (kept.parent.parent / "000000099").mkdir()  # one that was not finished
    shutil.copytree(tmp_path, tmp_path / "fewer")

    _run(tmp_path, 2, 1)
    found = load_file(tmp_path / "0.safetensors")
    assert float(found["made"]) == STEPS - 6
    _check(found, *_alone(2))

    # One process reads what one process that took both's batches would have written.
    _stopped_before(7, tmp_path / "one", monkeypatch)
    (same,) = (tmp_path / "one").glob("*.shards")
    held, wanted = (sharding.load(place, []) for place in (kept.parent.parent, same))
    assert held is None  # gone with its run
    held = sharding.load(tmp_path / "fewer" / "journal" / same.name, [])
    assert held is not None
    assert wanted is not None
    assert held[0].keys() == wanted[0].keys()
    assert held[1]["notes"]["order"] == wanted[1]["notes"]["order"]
    for name, tensor in wanted[0].items():
        off = float((held[0][name].double() - tensor.double()).norm())
        assert off <= 1e-4 * float(tensor.double().norm()), name
    _run(tmp_path / "fewer", 1, 1)
    assert float(load_file(tmp_path / "fewer" / "0.safetensors")["made"]) == STEPS - 6


def _stopped_before(step: int, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, broken off."""
    left, real = iter(range(step - 1)), torch.nn.utils.clip_grad_norm_

    def counted(*rest: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*rest)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    step_of_two = Recover(**{**STEP, "accumulate": 2})  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        apply(net.stack(), Recipe((Prune(0.7, "magnitude"), step_of_two)), net.arrays(9),
              journal=journal)  # fmt: skip
    monkeypatch.undo()


def test_a_checkpoint_of_one_process(tmp_path: Path) -> None:
    given = {"parameter.0": torch.randn(3, 2), "optimizer.0.step": torch.tensor(4.0)}
    assert sharding.load(tmp_path, []) is None
    for step in (1, 2):
        sharding.save(tmp_path, step, given, {"step": step})
    assert [p.name for p in tmp_path.iterdir()] == ["000000002"]
    found = sharding.load(tmp_path, [])
    assert found is not None
    assert found[1] == {"step": 2}
    assert all(torch.equal(found[0][n], t) for n, t in given.items())
    assert not any(b"\x80\x04" in p.read_bytes()[:8] for p in tmp_path.rglob("*") if p.is_file())
    (tmp_path / "no folder").write_text("")
    with pytest.raises(InputError, match="cannot write the checkpoint"):
        sharding.save(tmp_path / "no folder", 1, given, {})


def test_what_cannot_be_divided_is_refused() -> None:
    for more in ({"rank": 2}, {"codes": True}, {"l1": 1e-3}, {"optimizer": "adafactor"}):
        with pytest.raises(UsageError, match="with shard"):
            Recover(**{**STEP, **more})  # type: ignore[arg-type]
