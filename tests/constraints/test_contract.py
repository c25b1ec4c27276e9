"""Every constraint: whole at first, and with its budget on a problem with a known order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penjing import registry
from penjing.gating import Constraint, Extent
from penjing.lagrangian import AugmentedLagrangian
from penjing.training import descend

NAMES = registry.choices("constraints")
COUNT = 40
EXTENT = Extent(torch.ones(COUNT), torch.ones(COUNT))
# What each is worth: the loss of taking it out.
WORTH = torch.linspace(0.0, 1.0, COUNT)[torch.randperm(COUNT, generator=torch.manual_seed(0))]


def _made(name: str) -> Constraint:
    made: Constraint = registry.lookup("constraints", name, "constraint")(EXTENT, 0.5)
    return made


def _learned(name: str, optimizer: str = "adamw") -> tuple[Tensor, Tensor]:
    """Scores and gates after 300 steps on sum of worth (1 - gate)^2 over its whole."""
    method, limit = _made(name), AugmentedLagrangian()
    variable = method.start(torch.full((COUNT,), 0.5)).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    excess = torch.tensor(0.0)

    def value(_: object, done: float) -> Tensor:
        nonlocal excess
        gate = method.gate(variable, generator)
        loss = (WORTH * (1 - gate).square()).sum() / WORTH.sum()
        excess = method.count(variable, done).mean() - (1 - 0.5 * min(1.0, 2 * done))
        return loss + limit.term(excess) if excess.requires_grad else loss

    rate = {"adamw": 0.02, "sgd": 0.4}[optimizer] * method.rate
    for step in descend([{}], [([variable], rate)], value, steps=300, optimizer=optimizer):
        with torch.no_grad():
            limit.update(float(excess.detach()))
            length = torch.as_tensor(step.length(variable)) * limit.multiplier / COUNT
            method.after(variable, length.expand(COUNT).clamp_max(3 * rate), step.done)
    with torch.no_grad():
        return method.score(variable).detach().clone(), method.gate(variable, None).detach().clone()


@pytest.mark.parametrize("name", NAMES)
def test_at_first_nothing_is_gone_and_what_matters_less_is_not_nearer_to_stay(name: str) -> None:
    method = _made(name)
    variable = method.start(torch.linspace(0, 1, COUNT))
    gate, count = method.gate(variable, None), method.count(variable, 0.0)
    assert gate.shape == count.shape == (COUNT,)
    assert float(gate.min()) > 0.4
    assert float(gate.max()) == pytest.approx(1.0, abs=0.02)  # hard-concrete: 0.99
    assert bool((count.diff() >= -1e-6).all())
    assert 0.4 < float(count.min()) <= float(count.max()) <= 1
    assert bool((method.score(variable).diff() >= -1e-6).all())


@pytest.mark.parametrize("name", NAMES)
def test_without_noise_it_is_the_same_twice_and_zero_takes_out(name: str) -> None:
    method = _made(name)
    variable = method.start(torch.linspace(0, 1, COUNT))
    assert torch.equal(method.gate(variable, None), method.gate(variable, None))
    variable = torch.full((COUNT,), -20.0 if name == "hard-concrete" else 0.0)
    assert not method.gate(variable, None).any()
    assert float(method.count(variable, 1.0).max()) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_what_is_worth_least_goes(name: str) -> None:
    score, gate = _learned(name)
    stays = torch.zeros(COUNT, dtype=torch.bool)
    stays[score.topk(COUNT // 2).indices] = True
    wanted = torch.zeros(COUNT, dtype=torch.bool)
    wanted[WORTH.topk(COUNT // 2).indices] = True
    # Random choices would agree on half of them.
    assert float((stays == wanted).float().mean()) > 0.85
    if name in ("gates", "growing"):  # and the cut at the end takes little more away
        assert float(gate[~stays].abs().mean()) < 0.2
        assert float(gate[stays].mean()) > 0.7


def test_plain_gradient_descent_learns_too() -> None:
    score, _ = _learned("gates", "sgd")
    assert float(WORTH[score.topk(COUNT // 2).indices].mean()) > 0.7
