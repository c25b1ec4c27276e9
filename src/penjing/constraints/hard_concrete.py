"""Hard-concrete gates: drawn at random in training, 0 or 1 with a probability that is learned.

    s = sigmoid((log u - log(1 - u) + a) / beta),  u uniform in 0 to 1
    g = min(1, max(0, s (zeta - gamma) + gamma))
    P(g > 0) = sigmoid(a - beta log(-gamma / zeta))

(Louizos et al., arXiv 1712.01312, section 2.2, equations 11 to 13, with its beta = 2/3, gamma =
-0.1, zeta = 1.1.) The expected number that are there meets the budget by an augmented Lagrangian,
as in CoFi (Xia et al., arXiv 2204.00408).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penjing.gating import Extent

__all__ = ["HardConcrete", "constraint"]

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
# P(g > 0) of the most and the least important at first.
_SURE, _DOUBTFUL = 0.98, 0.8


class HardConcrete:
    """The variable is a, the log odds."""

    rate = 5.0

    def start(self, guess: Tensor) -> Tensor:
        """Log odds with which they are there with a probability between two bounds."""
        odds = torch.logit(_DOUBTFUL + (_SURE - _DOUBTFUL) * guess)
        return odds + BETA * math.log(-GAMMA / ZETA)

    def gate(self, variable: Tensor, generator: torch.Generator | None) -> Tensor:
        """A draw; without a generator the one at u = 1/2, the temperature left out."""
        if generator is None:
            concrete = torch.sigmoid(variable)
        else:
            u = torch.rand(variable.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
            concrete = torch.sigmoid((torch.logit(u).to(variable) + variable) / BETA)
        return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def count(self, variable: Tensor, done: float) -> Tensor:
        """P(g > 0), [n]."""
        return torch.sigmoid(variable - BETA * math.log(-GAMMA / ZETA))

    def after(self, variable: Tensor, strength: Tensor, done: float) -> None:
        """Nothing."""

    def score(self, variable: Tensor) -> Tensor:
        """The log odds."""
        return variable


def constraint(extent: Extent, budget: float) -> HardConcrete:
    """Of any weights."""
    return HardConcrete()
