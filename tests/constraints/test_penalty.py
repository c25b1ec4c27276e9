"""Proximal operators against brute force over the penalty that each is of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penjing import registry
from penjing.gating import Extent

# Two groups of weights, each scaled by a gate.
GROUPS = [np.array([3.0, -4.0]), np.array([0.5, 0.1])]
EXTENT = Extent(
    torch.tensor([np.abs(g).sum() for g in GROUPS]).float(),
    torch.tensor([np.linalg.norm(g) for g in GROUPS]).float(),
)
PENALTIES = {
    "lasso": lambda w: np.linalg.norm(w, axis=1),
    "l1": lambda w: np.abs(w).sum(1),
    "l2": lambda w: 0.5 * np.square(w).sum(1),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("strength", [0.02, 0.1, 0.4])
def test_a_step_minimises_the_penalty_of_the_scaled_weights(name: str, strength: float) -> None:
    method = registry.lookup("constraints", name, "constraint")(EXTENT, 0.5)
    values = torch.tensor([1.0, -0.6])
    found = values.clone()
    method.after(found, torch.full((2,), strength), 0.5)
    grid = np.linspace(-1.5, 1.5, 60_001)
    for place, group in enumerate(GROUPS):
        cost = (grid - float(values[place])) ** 2 / 2
        cost += strength * PENALTIES[name](np.outer(grid, group))
        assert float(found[place]) == pytest.approx(grid[cost.argmin()], abs=1e-4)


def test_the_group_lasso_of_vectors_is_that_of_their_gates() -> None:
    """The operator on whole vectors, W max(0, 1 - t / |W|), for gates that are their lengths."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(6, 5, generator=generator)
    lengths = vectors.norm(dim=1)
    ones = torch.ones(6)
    method = registry.lookup("constraints", "lasso", "constraint")(Extent(ones, ones), 0.5)
    for t in (0.5, 2.0, 3.0):
        gate = lengths.clone()
        method.after(gate, torch.full((6,), t), 0.0)
        wanted = vectors * (1 - t / lengths).clamp_min(0).unsqueeze(1)
        torch.testing.assert_close(vectors / lengths.unsqueeze(1) * gate.unsqueeze(1), wanted)

        # And it is the minimum: nothing near it is better.
        def cost(w: torch.Tensor, t: float = t) -> torch.Tensor:
            return (w - vectors).square().sum(1) / 2 + t * w.norm(dim=1)

        for _ in range(200):
            other = wanted + 0.05 * torch.randn(6, 5, generator=generator)
            assert bool((cost(other) >= cost(wanted) - 1e-5).all())


def test_growing_presses_all_then_the_least_alone() -> None:
    # By how much of each is left, not by how large it is.
    extent = Extent(torch.ones(4), torch.tensor([1.0, 9.0, 1.0, 1.0]))
    method = registry.lookup("constraints", "growing", "constraint")(extent, 0.5)
    values = torch.tensor([1.0, 0.45, 0.2, 0.8])
    early, late = values.clone(), values.clone()
    method.after(early, torch.full((4,), 0.25), 0.1)
    torch.testing.assert_close(early, values / 1.25)
    method.after(late, torch.full((4,), 0.25), 0.9)
    torch.testing.assert_close(late, torch.tensor([1.0, 0.36, 0.16, 0.8]))


@pytest.mark.parametrize("name", PENALTIES)
def test_they_go_in_the_order_of_what_is_left_of_the_weights(name: str) -> None:
    method = registry.lookup("constraints", name, "constraint")(EXTENT, 0.5)
    torch.testing.assert_close(
        method.score(torch.tensor([0.1, -1.0])), torch.tensor([0.1, 1.0]) * EXTENT.l2
    )
    # A count without a slope: the budget works through the steps alone.
    count = method.count(torch.tensor([0.1, 1.0], requires_grad=True), 0.5)
    assert not count.requires_grad
    torch.testing.assert_close(count, torch.tensor([0.5, 1 / 1.01]))
