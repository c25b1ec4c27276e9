"""Deterministic gates: each is a free number, and how many are there is counted smoothly.

    |g|_0  ~  sum of g^2 / (g^2 + sigma^2),   sigma falling from 0.5 to 0.05

The count meets the budget by an augmented Lagrangian. A gate well above sigma is not drawn down,
unlike by an L1 norm, and may leave 1 to make up for others; as sigma falls, those in between
decide. Without noise, what was trained is what is left (after Deterministic Differentiable Pruning,
arXiv 2603.08065; the smooth count as in Mohimani et al., IEEE TSP 2009, which has another form).
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.gating import Extent, smooth_count

__all__ = ["Gates", "constraint"]

_WIDE, _NARROW = 0.5, 0.05


class Gates:
    """The variable is the gate."""

    rate = 1.0

    def start(self, guess: Tensor) -> Tensor:
        """The less important, the nearer to sigma."""
        return _WIDE + (1 - _WIDE) * guess

    def gate(self, variable: Tensor, generator: torch.Generator | None) -> Tensor:
        """The variable."""
        return variable

    def count(self, variable: Tensor, done: float) -> Tensor:
        """Smooth, [n]."""
        return smooth_count(variable, _WIDE * (_NARROW / _WIDE) ** done)

    def after(self, variable: Tensor, strength: Tensor, done: float) -> None:
        """Nothing."""

    def score(self, variable: Tensor) -> Tensor:
        """Its size."""
        return variable.abs()


def constraint(extent: Extent, budget: float) -> Gates:
    """Of any weights."""
    return Gates()
