"""Recovery: killed it ends with the same bytes; its options do what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.calibrate import Unit
from penjing.hiddens import distance, twins, watched
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps._recovery import Penalty
from penjing.steps.cut import Cut
from penjing.steps.prune import Prune
from penjing.steps.recover import Recover

BATCHES = net.arrays(9)

# Each run is a process of its own, forked from one that has only imported.
SCRIPT = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import safetensors, torch
torch.set_num_threads(1)
import networks as net
from penjing import checkpoint
from penjing.apply import apply
from penjing.recipe import Recipe
from penjing.steps.prune import Prune
from penjing.steps.recover import Recover

checkpoint.EVERY = 0.0
folder = Path(sys.argv[2])
STEPS = 40

def run(journal, output):
    model = net.stack()
    recipe = Recipe((Prune(0.7, "magnitude"),
                     Recover(seconds=0, steps=STEPS, lr=3e-3, patience=15, hidden=1.0,
                             block_steps=5)))
    found = apply(model, recipe, net.arrays(9), journal=journal).model
    digest = hashlib.sha256()
    for name, value in sorted(found.module.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    output.write_text(digest.hexdigest())

def start(journal, output, until=None):
    pid = os.fork()
    if not pid:
        run(journal, output)
        os._exit(0)
    path = journal / "01-training.safetensors"
    while until is not None:
        if path.exists():
            with safetensors.safe_open(path, "pt") as file:
                step = json.loads(file.metadata()["training"])["notes"]["step"]
            if step >= until:
                os.kill(pid, signal.SIGKILL)
                break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert start(folder / "whole", folder / "whole.txt") == 0
for until in (2, 13, 27):
    assert start(folder / "killed", folder / "killed.txt", until) == -signal.SIGKILL
    assert not (folder / "killed.txt").exists()
assert start(folder / "killed", folder / "killed.txt") == 0
assert not list((folder / "killed").glob("*training*"))
"""


def test_killed_at_three_points_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tests), str(tmp_path)]
    subprocess.run(command, check=True, timeout=240)
    texts = [(tmp_path / name).read_text() for name in ("whole.txt", "killed.txt")]
    assert len(texts[0]) == 64
    assert texts[0] == texts[1]


def _recover(**options: object) -> Recover:
    given = {"seconds": 0, "steps": 40, "lr": 3e-3, **options}
    return Recover(**given)  # type: ignore[arg-type]


def _pruned(model: Model) -> Model:
    return apply(model, Recipe((Prune(0.7, "magnitude"),))).model


def test_a_penalty_is_its_formula() -> None:
    weight = torch.tensor([[3.0, -4.0], [0.0, 2.0]])
    assert float(Penalty(l1=0.5)([weight])) == pytest.approx(4.5)
    assert float(Penalty(l2=0.5)([weight, weight])) == pytest.approx(2 * 0.25 * 29)
    assert float(Penalty(group=0.5)([weight])) == pytest.approx(0.5 * 2**0.5 * (5 + 2))
    assert not Penalty()


@pytest.mark.parametrize("kind", ["l1", "l2", "group"])
def test_a_penalty_makes_weights_smaller(kind: str) -> None:
    model = net.stack()
    pruned = _pruned(model)
    sizes = []
    for weight in (0.0, 1e-3):
        unit = Unit("whole", pruned, {}, None, None, model, BATCHES)
        edits = list(_recover(**{kind: weight}).plan(unit, {}))
        values = [e.value for e in edits if isinstance(e.value, Tensor) and e.value.ndim > 1]
        sizes.append(sum(float(v.abs().sum()) for v in values))
    assert sizes[1] < 0.95 * sizes[0]


def test_a_matrix_moves_by_low_rank_and_keeps_its_mask() -> None:
    model = net.stack()
    pruned = apply(model, Recipe((Prune(0.5, "magnitude", targets=("blocks.0.*",)),))).model
    step = _recover(rank=2, steps=80, targets=("blocks.*",))
    found = apply(pruned, Recipe((step,)), BATCHES, original=model)
    free = 0
    for name, parameter in found.model.module.named_parameters():
        more = (parameter - pruned.module.get_parameter(name)).detach()
        if name in pruned.masks:
            assert not parameter[~pruned.masks[name]].any()
        elif parameter.ndim > 1 and name.startswith("blocks."):
            assert int(torch.linalg.matrix_rank(more, rtol=1e-4)) == 2
            free += 1
    assert free >= 2


def test_training_ends_after_looks_without_a_gain_and_keeps_the_best() -> None:
    model = net.stack()
    pruned = _pruned(model)

    def run(patience: int, lr: float) -> str:
        step = _recover(steps=200, patience=patience, lr=lr, schedule="constant")
        done = apply(pruned, Recipe((step,)), BATCHES, original=model).done
        return done[0].why if done else ""

    early, late = run(2, 1e-1), run(0, 1e-1)
    assert int(early.split()[0]) < 200
    assert late == "" or float(early.split()[-1]) <= float(late.split()[-1])


def test_blocks_have_their_twins_after_a_cut() -> None:
    model = net.stack()
    names = model.blocks
    assert twins(model, model.copy()) == tuple((n, n) for n in names)
    gone = (names[0], names[2])
    cut = apply(model, Recipe((Cut(blocks=gone, patch="none"),)), BATCHES).model
    stay = [n for n in names if n not in gone]
    pairs = twins(model, cut)
    assert [was for _, was in pairs] == stay
    for own, was in pairs:
        up = f"{was}.up.weight", f"{own}.up.weight"
        assert torch.equal(model.module.get_parameter(up[0]), cut.module.get_parameter(up[1]))


def test_distance_is_relative_and_without_padding() -> None:
    mask = torch.tensor([[1, 1], [1, 0]])
    wanted = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[1.0, 0.0], [9.0, 9.0]]])
    own = wanted.clone()
    own[0, 0, 0], own[1, 1] = 0.0, 0.0
    found = distance([own, wanted], [wanted, wanted], {"attention_mask": mask})
    assert float(found) == pytest.approx((9 / 30 + 0) / 2)
    assert float(distance([own[:1]], [wanted], {})) == 0  # of another shape


def test_blocks_first_bring_hidden_states_nearer() -> None:
    model = net.stack()
    pruned = _pruned(model)

    def off(student: Model) -> float:
        with torch.no_grad(), watched(model, model.blocks) as wanted:
            model.run(BATCHES[8])
        with torch.no_grad(), watched(student, student.blocks) as own:
            student.run(BATCHES[8])
        return float(distance(own, wanted, {}))

    step = _recover(steps=1, lr=3e-3, block_steps=60)
    alone = _recover(steps=1, lr=3e-3)
    found, short = (
        apply(pruned, Recipe((s,)), BATCHES[:8], original=model).model for s in (step, alone)
    )
    assert off(found) < 0.7 * off(short)
    assert all(not found.module.get_parameter(n)[~m].any() for n, m in pruned.masks.items())
