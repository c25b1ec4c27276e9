"""A histogram that grows with its data: counts do not depend on how the data came in.

2 * HALF bins of equal width over [-reach, reach); reach is a power of two. When a value lies
beyond, reach doubles and neighbouring bins are added up, which moves no value across an edge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penjing.errors import InputError

__all__ = ["HALF", "Histogram"]

HALF = 4096
"""Bins on each side of zero: 16 to 32 a step of an 8-bit grid over the whole range."""

# Smaller values share the bins of this one: doubling starts somewhere.
_LEAST = 2.0**-60


class Histogram:
    """Counts of values.

    Attributes:
        counts: int64 [2 * HALF].
        reach: the bins cover [-reach, reach).
        low, high: exact range of what was added; 0 where nothing was.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * HALF, dtype=torch.int64)
        self.reach = 0.0
        self.low = self.high = 0.0

    def add(self, values: Tensor) -> None:
        """Count values of any shape.

        Raises:
            InputError: NaN or infinite values.
        """
        if not values.numel():
            return
        flat = values.detach().reshape(-1).double()
        low, high = float(flat.amin()), float(flat.amax())
        most = max(abs(low), abs(high), _LEAST)
        if math.isnan(low + high) or not math.isfinite(2 * most):
            raise InputError("values of a histogram are NaN or infinite")
        reach = math.ldexp(1.0, math.frexp(most)[1])  # most < reach <= 2 most
        if not self.reach:
            self.reach, self.low, self.high = reach, low, high
        self.low, self.high = min(self.low, low), max(self.high, high)
        while self.reach < reach:
            pairs = self.counts.reshape(-1, 2).sum(1)  # [HALF]
            self.counts = torch.nn.functional.pad(pairs, (HALF // 2, HALF // 2))
            self.reach *= 2
        place = torch.floor(flat * (HALF / self.reach)).long() + HALF
        self.counts += torch.bincount(place, minlength=2 * HALF)

    @property
    def width(self) -> float:
        """Of a bin."""
        return self.reach / HALF

    @property
    def centres(self) -> Tensor:
        """Middle of each bin, float64 [2 * HALF]."""
        return (torch.arange(-HALF, HALF, dtype=torch.float64) + 0.5) * self.width
