"""The hard-concrete distribution against its formulas, by hand and by sampling."""

from __future__ import annotations

import math

import pytest
import torch

from penjing.constraints.hard_concrete import BETA, GAMMA, ZETA, HardConcrete


def test_a_gate_by_hand() -> None:
    # sigmoid(0) = 1/2, stretched from -0.1 to 1.1: in the middle.
    assert float(HardConcrete().gate(torch.zeros(1), None)) == pytest.approx(0.5)
    # sigmoid(2) = 0.8807971, times 1.2 less 0.1
    assert float(HardConcrete().gate(torch.tensor([2.0]), None)) == pytest.approx(
        0.9569565, abs=1e-6
    )
    assert HardConcrete().gate(torch.tensor([-9.0, 9.0]), None).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("odds", [-2.0, 0.0, 1.5])
def test_draws_are_distributed_as_the_formulas_say(odds: float) -> None:
    """P(g = 0), P(g = 1) and the distribution function between, of 40,000 draws."""
    count = 40_000
    variable = torch.full((count,), odds)
    drawn = HardConcrete().gate(variable, torch.Generator().manual_seed(0))

    def below(g: float) -> float:
        """Distribution function of the stretched concrete distribution."""
        s = (g - GAMMA) / (ZETA - GAMMA)
        return 1 / (1 + math.exp(odds - BETA * math.log(s / (1 - s))))

    tolerance = 4 * 0.5 / math.sqrt(count)
    assert float((drawn == 0).float().mean()) == pytest.approx(below(0.0), abs=tolerance)
    assert float((drawn < 1).float().mean()) == pytest.approx(below(1.0), abs=tolerance)
    assert float((drawn <= 0.3).float().mean()) == pytest.approx(below(0.3), abs=tolerance)
    there = float(HardConcrete().count(variable[:1], 0.5))
    assert there == pytest.approx(1 - below(0.0), abs=1e-6)


def test_the_start_is_with_the_probabilities_that_it_says() -> None:
    method = HardConcrete()
    found = method.count(method.start(torch.tensor([0.0, 1.0])), 0.0)
    torch.testing.assert_close(found, torch.tensor([0.8, 0.98]))
