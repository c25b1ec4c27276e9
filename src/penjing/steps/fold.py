"""Fold: batch norms go into the convolutions they follow, exactly.

In evaluation a batch norm is a scale and a shift of each channel, so the convolution's own
weight and bias can hold it. Pairs are found by running the network: see `_following`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from penjing.calibrate import LayerStats, Unit
from penjing.model import Model
from penjing.recipe import Edit
from penjing.steps._following import pairs_of
from penjing.steps._select import selected

__all__ = ["Fold", "has_norms"]


def has_norms(model: Model) -> bool:
    """Whether there is any batch norm to fold."""
    return any(isinstance(m, nn.BatchNorm2d) for m in model.module.modules())


@dataclass(frozen=True)
class Fold:
    """Fold every batch norm that follows a convolution alone.

    Attributes:
        targets: globs of convolution paths; without any, all of them.
    """

    name: ClassVar[str] = "fold"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()

    targets: tuple[str, ...] = ()

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """One fold a pair."""
        wanted = selected(
            Unit("", unit.model, dict(unit.model.module.named_modules()), None, None), self.targets
        )
        for conv, norm in pairs_of(unit.model, _is_norm, wanted.__contains__):
            yield Edit("fold", conv, norm, f"holds {norm}, exactly")


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and module.track_running_stats
