"""Fractions of layers that are ranked against each other: against one sort of all scores."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.errors import UsageError
from penjing.gradients import fisher, gradients
from penjing.recipe import Recipe
from penjing.steps.prune import Prune

LAYERS = [f"blocks.{i}.{n}" for i in range(3) for n in ("up", "down")]


def _left(model: net.Model) -> dict[str, float]:
    return {n: 1 - float(m.float().mean()) for n, m in model.masks.items()}


def _under(scores: dict[str, np.ndarray], wanted: float) -> dict[str, float]:
    """Of each layer what is among the least of all, within a tenth of the wanted."""
    low, high = -80.0, 40.0
    total = sum(s.size for s in scores.values())
    for _ in range(100):
        middle = (low + high) / 2
        found = {p: np.clip((np.log(s) <= middle).mean(), max(0, wanted - 0.1), wanted + 0.1)
                 for p, s in scores.items()}  # fmt: skip
        enough = sum(found[p] * s.size for p, s in scores.items()) >= wanted * total
        low, high = (low, middle) if enough else (middle, high)
    return found


@pytest.mark.parametrize("criterion", ["admm", "fast", "sparsegpt", "fisher", "taylor"])
def test_the_whole_loses_what_was_asked(criterion: str) -> None:
    model, batches = net.stack(), net.arrays(3)
    step = Prune(0.6, criterion, ranking="global")
    done = apply(model, Recipe((step,)), batches).model
    masks = done.masks.values()
    kept, total = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
    assert len(done.masks) == 6
    assert 1 - kept / total == pytest.approx(0.6, abs=6 / total)
    parts = _left(done)
    assert max(parts.values()) > 0.62
    assert min(parts.values()) > 0.49


def test_fisher_by_one_sort_of_all_scores() -> None:
    model, batches = net.stack(), net.arrays(3)
    found = gradients(model, batches)
    scores = {}
    for path in LAYERS:
        weight = model.module.get_submodule(path).weight.detach()
        scores[path] = (weight.square() * found[path].square).double().numpy() + 1e-30
    step = Prune(0.5, "fisher", ranking="global").settled(model, batches)
    wanted = _under(scores, 0.5)
    assert step.ranking == "layer"
    assert set(step.fractions) == set(LAYERS)
    for path, part in step.fractions.items():
        assert part == pytest.approx(wanted[path], abs=0.01)


def test_a_pruner_by_what_the_loss_rises_by() -> None:
    """F_ii w^2 / [H^-1]_jj of centred inputs, by numpy."""
    model, batches = net.stack(), net.arrays(3)
    slopes = fisher(model, batches)
    scores = {}
    for path in LAYERS:
        rows: list[torch.Tensor] = []
        layer = model.module.get_submodule(path)
        handle = layer.register_forward_pre_hook(lambda _, a, r=rows: r.append(a[0].flatten(0, 1)))
        with torch.no_grad():
            for batch in batches:
                model.run(batch)
        handle.remove()
        x = torch.cat(rows).double().numpy()
        gram = np.cov(x.T, bias=True)
        inverse = np.linalg.inv(gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram)))
        weight = layer.weight.detach().double().numpy()
        f = slopes[path].diagonal().numpy()
        scores[path] = f[:, None] * weight**2 / np.diag(inverse)
    wanted = _under(scores, 0.7)
    found = Prune(0.7, "admm", ranking="global").settled(model, batches).fractions
    for path, part in found.items():
        assert part == pytest.approx(wanted[path], abs=0.01)


def test_a_layer_that_the_loss_does_not_see_loses_most() -> None:
    model, batches = net.stack(), net.arrays(3)
    with torch.no_grad():
        model.module.blocks[1].down.weight *= 1e-4
    found = Prune(0.5, "admm", ranking="global").settled(model, batches).fractions
    assert found["blocks.1.down"] == pytest.approx(0.6, abs=1e-3)
    assert found["blocks.1.up"] == pytest.approx(0.6, abs=1e-3)


def test_of_much_that_goes_half_of_what_stays_on_average_stays_everywhere() -> None:
    model, batches = net.stack(), net.arrays(3)
    with torch.no_grad():
        model.module.blocks[1].down.weight *= 1e-4
    found = Prune(0.95, "admm", ranking="global").settled(model, batches).fractions
    assert max(found.values()) == found["blocks.1.down"] == pytest.approx(0.975, abs=1e-3)
    sizes = {path: model.module.get_submodule(path).weight.numel() for path in found}
    gone = sum(part * sizes[path] for path, part in found.items())
    assert gone / sum(sizes.values()) == pytest.approx(0.95, abs=1e-3)


def test_the_settled_step_is_written_and_read() -> None:
    model, batches = net.stack(), net.arrays(3)
    step = Prune(0.5, "fast", ranking="global").settled(model, batches)
    recipe = Recipe.from_toml(Recipe((step,)).to_toml(), {"prune": Prune})
    first, again = (apply(model, r, batches).model for r in (Recipe((step,)), recipe))
    assert net.same(first, again)


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "wanda"}, {"criterion": "magnitude"}, {"pattern": "2:4", "criterion": "admm"},
        {"criterion": "admm", "fractions": {"x": 1.0}},
    ],
)  # fmt: skip
def test_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Prune(0.5, ranking="global", **options)


def test_without_data_it_is_said() -> None:
    with pytest.raises(UsageError, match="needs data"):
        apply(net.stack(), Recipe((Prune(0.5, "admm", ranking="global"),)))
