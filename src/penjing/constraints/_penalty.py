"""What penalties on the size of what is gated have in common.

A gradient step on the loss alone, then the proximal operator of the penalty in the metric of that
step: a variable that the optimizer moves twice as far for the same gradient is shrunk by twice as
much (Yun et al., arXiv 2007.07484). The multiplier of the budget is the strength of the penalty: it
rises while too many gates are there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from penjing.gating import smooth_count

__all__ = ["Penalty", "ridge", "soft_threshold"]

# A gate this small is half gone.
_SMALL = 0.1


def soft_threshold(value: Tensor, by: Tensor) -> Tensor:
    """The proximal operator of by |x|: argmin of (x - value)^2 / 2 + by |x|."""
    return value.sign() * (value.abs() - by).clamp_min(0)


def ridge(value: Tensor, by: Tensor) -> Tensor:
    """The proximal operator of by x^2 / 2: argmin of (x - value)^2 / 2 + by x^2 / 2."""
    return value / (1 + by)


class Penalty:
    """The variable is the gate.

    Args:
        operator: proximal, of values and of how strong the penalty on each is.
        weight: [n], of each gate's penalty.
        norm: [n], of what each gate multiplies: they go in the order of gate times norm.
        chosen: which gates are penalised, of their scores and the share of the way; all of them
            by default.
    """

    rate = 1.0

    def __init__(
        self, operator: Callable[[Tensor, Tensor], Tensor], weight: Tensor, norm: Tensor,
        chosen: Callable[[Tensor, float], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._operator, self._weight, self._norm, self._chosen = operator, weight, norm, chosen

    def start(self, guess: Tensor) -> Tensor:
        """Ones: the weights as they are."""
        return torch.ones_like(guess)

    def gate(self, variable: Tensor, generator: torch.Generator | None) -> Tensor:
        """The variable."""
        return variable

    def count(self, variable: Tensor, done: float) -> Tensor:
        """Smooth, [n], without a gradient."""
        return smooth_count(variable.detach(), _SMALL)

    def after(self, variable: Tensor, strength: Tensor, done: float) -> None:
        """The proximal step."""
        moved = self._operator(variable, strength * self._weight)
        if self._chosen is not None:
            moved = torch.where(self._chosen(self.score(variable), done), moved, variable)
        variable.copy_(moved)

    def score(self, variable: Tensor) -> Tensor:
        """Norm of what is left of the weights."""
        return variable.abs() * self._norm
