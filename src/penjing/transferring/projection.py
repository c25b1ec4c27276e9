"""Linear maps from a student's hidden states to its teacher's width.

solved    least squares on what was seen so far, each batch's weight falling by a tenth with
          every one after it; constant for the gradient
learned   trained along, starting where the first batch solves it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from penjing.linalg import affine_ridge

__all__ = ["Projection"]

_KEPT = 0.9
_RIDGE = 0.01


class Projection:
    """One map; it knows its widths from the first batch.

    Args:
        learned: trained, or solved.
    """

    def __init__(self, learned: bool) -> None:
        self.learned = learned
        self.weight: Tensor | None = None  # [teacher, student]
        self.bias: Tensor | None = None  # [teacher]
        self._sums: list[Any] = []

    def parameters(self) -> list[Tensor]:
        """What is trained; nothing before the first batch."""
        if not self.learned or self.weight is None or self.bias is None:
            return []
        return [self.weight, self.bias]

    def __call__(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None, fit: bool = True
    ) -> Tensor:
        """The student's states [batch, places, width] in the teacher's width.

        Args:
            fit: whether a solved one learns from the batch.
        """
        student = student.float()
        if self.weight is None or (fit and not self.learned):
            self._solve(student.detach(), teacher.detach().float(), mask)
        assert self.weight is not None
        return nn.functional.linear(student, self.weight, self.bias)

    def _solve(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
        with torch.autocast(student.device.type, enabled=False), torch.no_grad():
            x, y = (z.flatten(0, 1) if mask is None else z[mask] for z in (student, teacher))
            new = [len(x), x.sum(0), y.sum(0), (x.T @ x).double(), (x.T @ y).double()]
            kept = self._sums or [0] * len(new)
            self._sums = [_KEPT * a + b for a, b in zip(kept, new, strict=True)]
            count, x_sum, y_sum, gram, cross = self._sums
            weight, bias = affine_ridge(count, x_sum, y_sum, gram, cross, _RIDGE)
            self.weight, self.bias = weight.float(), bias.float()
        if self.learned:
            self._sums = []
            for own in self.parameters():
                own.requires_grad_(True)
