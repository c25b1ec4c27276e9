"""A group of units as its criteria see it: the weights that make them, and what reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penjing.errors import InputError

__all__ = ["Reading", "View", "shares"]


@dataclass(frozen=True, eq=False)
class Reading:
    """A layer that reads the units.

    Attributes:
        columns: int64 [units, size], inputs of each unit.
        stats: statistics of its inputs (`penjing.layerstats.LayerStats`).
    """

    columns: Tensor
    stats: Any

    def effects(self) -> Tensor:
        """[samples, units] float64, first-order change of the loss without a unit.

        Raises:
            InputError: there are no gradients.
        """
        gradient = getattr(self.stats, "gradient", None)
        if gradient is None:
            raise InputError(
                "the criterion needs gradients on calibration data", got="none",
                next="give --data, or use --criterion gram",
            )  # fmt: skip
        found: Tensor = gradient.effects.double()[:, self.columns]  # [samples, units, size]
        return found.sum(-1)


@dataclass(frozen=True, eq=False)
class View:
    """A group.

    Attributes:
        made: [units, weights] each, of every weight that makes them a row a unit.
        gains: [units, size] each, of every batch norm that scales them.
        readings: of every layer that reads them.
    """

    made: tuple[Tensor, ...]
    gains: tuple[Tensor, ...]
    readings: tuple[Reading, ...]


def shares(parts: Iterable[Tensor]) -> Tensor:
    """Sum over tensors [units], not negative, of each one's shares of its total; float64."""
    made = [part.double() / part.double().sum().clamp_min(1e-30) for part in parts]
    return torch.stack(made).sum(0)
