"""Deterministic gates: each is a free number, and how many are there is counted smoothly.

    |g|_0  ~  sum of (1 + sigma^2) g^2 / (g^2 + sigma^2),   sigma falling from 1 to 0.1

Whatever sigma is, a gate of 0 counts 0 and one of 1 counts 1. At first the count draws on all
gates alike, as an L1 norm does; as sigma falls it lets go of those that the loss holds up, which
may leave 1 to make up for others, and draws the harder on those that are small. It meets the
budget by an augmented Lagrangian. Without noise, what was trained is what is left (after
Deterministic Differentiable Pruning, arXiv 2603.08065, which has a count of its own; an annealed
one: Mohimani et al., IEEE Transactions on Signal Processing 57, 2009).
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.gating import Extent

__all__ = ["Gates", "constraint"]

_WIDE, _NARROW = 1.0, 0.1
# Share of the way on which sigma falls.
_FROM, _TO = 0.2, 0.9
# Of the least important gate at first.
_LOW = 0.8


class Gates:
    """The variable is the gate."""

    rate = 1.0

    def start(self, guess: Tensor) -> Tensor:
        """Nearly whole, the less important a little less."""
        return _LOW + (1 - _LOW) * guess

    def gate(self, variable: Tensor, generator: torch.Generator | None) -> Tensor:
        """The variable."""
        return variable

    def count(self, variable: Tensor, done: float) -> Tensor:
        """Smooth, [n]."""
        fallen = min(1.0, max(0.0, (done - _FROM) / (_TO - _FROM)))
        power, width = variable.square(), (_WIDE * (_NARROW / _WIDE) ** fallen) ** 2
        counts: Tensor = (1 + width) * power / (power + width)
        return counts

    def after(self, variable: Tensor, strength: Tensor, done: float) -> None:
        """Nothing."""

    def score(self, variable: Tensor) -> Tensor:
        """Its size."""
        return variable.abs()


def constraint(extent: Extent, budget: float) -> Gates:
    """Of any weights."""
    return Gates()
