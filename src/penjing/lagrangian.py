"""The augmented Lagrangian of one inequality: minimise f under r <= 0.

    L = f + (max(0, lambda + mu r)^2 - lambda^2) / (2 mu)
    lambda <- max(0, lambda + mu r)

(Hestenes 1969, Powell 1969; for inequalities Rockafellar 1973.) Where r > 0 the multiplier rises
and the pull toward r = 0 with it; where the constraint holds with room to spare it falls to 0 and
there is no pull.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["AugmentedLagrangian"]


@dataclass
class AugmentedLagrangian:
    """What a constraint adds to a loss.

    Attributes:
        mu: of the quadratic term.
        rate: share of mu that a single step moves the multiplier by: one step of gradient descent
            is far from the minimum that the method asks for between two updates.
        multiplier: lambda.
    """

    mu: float = 2.0
    rate: float = 0.1
    multiplier: float = 0.0

    def term(self, excess: Tensor) -> Tensor:
        """What is added for r = `excess`, a scalar."""
        pull = (self.multiplier + self.mu * excess).clamp_min(0)
        return (pull.square() - self.multiplier**2) / (2 * self.mu)

    def update(self, excess: float) -> None:
        """After a step: the multiplier goes where r says."""
        self.multiplier = max(0.0, self.multiplier + self.rate * self.mu * excess)
