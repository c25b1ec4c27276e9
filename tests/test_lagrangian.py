"""The augmented Lagrangian against hand-computed values, and on a problem with a known answer."""

from __future__ import annotations

import pytest
import torch

from penjing.lagrangian import AugmentedLagrangian


def test_the_term_by_hand() -> None:
    limit = AugmentedLagrangian(mu=10.0, multiplier=0.5)
    # (0.5 + 10 * 0.2)^2 - 0.5^2 over 20
    assert float(limit.term(torch.tensor(0.2))) == pytest.approx((2.5**2 - 0.25) / 20)
    # Satisfied with room to spare: the constant, and no slope.
    excess = torch.tensor(-0.3, requires_grad=True)
    term = limit.term(excess)
    term.backward()
    assert float(term.detach()) == pytest.approx(-0.25 / 20)
    assert float(excess.grad) == 0.0  # type: ignore[arg-type]


def test_the_slope_is_the_multiplier_to_come() -> None:
    limit = AugmentedLagrangian(mu=4.0, rate=1.0, multiplier=0.3)
    excess = torch.tensor(0.1, requires_grad=True)
    limit.term(excess).backward()
    limit.update(0.1)
    assert limit.multiplier == pytest.approx(0.7)
    assert float(excess.grad) == pytest.approx(0.7)  # type: ignore[arg-type]


def test_the_multiplier_goes_where_the_excess_says_and_is_never_negative() -> None:
    limit = AugmentedLagrangian(mu=2.0, rate=0.5)
    seen = []
    for excess in (0.1, 0.1, -0.05, -1.0):
        limit.update(excess)
        seen.append(limit.multiplier)
    assert seen == pytest.approx([0.1, 0.2, 0.15, 0.0])


def test_it_finds_the_constrained_minimum_and_its_price() -> None:
    """min (x - 3)^2 under x <= 1: x = 1, and the multiplier is the slope there, 4."""
    x, limit = torch.tensor(0.0, requires_grad=True), AugmentedLagrangian(mu=2.0, rate=0.1)
    for _ in range(600):
        value = (x - 3) ** 2 + limit.term(x - 1)
        (slope,) = torch.autograd.grad(value, x)
        with torch.no_grad():
            x -= 0.05 * slope
        limit.update(float(x.detach()) - 1)
    assert float(x.detach()) == pytest.approx(1.0, abs=1e-3)
    assert limit.multiplier == pytest.approx(4.0, abs=1e-2)
