"""What a sparsity constraint is: numbers that are learned and multiply what may go, one for each.

A gate of 1 leaves its weight, neuron or layer as it is, a gate of 0 takes it out. The methods are
the files of `penjing.constraints`; `constraint(extent, budget)` makes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Constraint", "Extent", "smooth_count"]


@dataclass(frozen=True, eq=False)
class Extent:
    """How large the weights are that each gate multiplies.

    Attributes:
        l1, l2: [n], their sum of sizes and their norm, each over its mean in one layer, so that
            layers compare.
    """

    l1: Tensor
    l2: Tensor


class Constraint(Protocol):
    """What a method makes of its variables, one for each gate.

    Attributes:
        rate: learning rate of the variables over that of a gate itself.
    """

    rate: float

    def start(self, guess: Tensor) -> Tensor:
        """Variables [n] to begin with, for importances in 0 to 1, 1 the most important."""

    def gate(self, variable: Tensor, generator: torch.Generator | None) -> Tensor:
        """What multiplies [n]; without a generator what is left when the learning is over."""

    def count(self, variable: Tensor, done: float) -> Tensor:
        """How far each is still there [n], 0 to 1; `done` is the share of the way, 0 to 1.

        Without a gradient where the budget works through `after` alone.
        """

    def after(self, variable: Tensor, strength: Tensor, done: float) -> None:
        """Change the variables in place after a gradient step.

        Args:
            strength: [n], the multiplier of the budget times the length of the step that each
                variable makes for a gradient of 1.
        """

    def score(self, variable: Tensor) -> Tensor:
        """Order in which they go [n]; larger means keep."""


def smooth_count(gate: Tensor, width: float) -> Tensor:
    """gate^2 / (gate^2 + width^2), which is 0 at 0 and nearly 1 from a few widths on."""
    power = gate.square()
    return power / (power + width**2)
