"""Fold: batch norms go into the convolutions they follow, exactly.

In evaluation a batch norm is a scale and a shift of each channel, so the convolution's own
weight and bias can hold it. A pair is found by running the network: the norm's input is the
very tensor that the convolution gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Unit
from penjing.model import Model
from penjing.recipe import Edit

__all__ = ["Fold", "has_norms"]


def has_norms(model: Model) -> bool:
    """Whether there is any batch norm to fold."""
    return any(isinstance(m, nn.BatchNorm2d) for m in model.module.modules())


@dataclass(frozen=True)
class Fold:
    """Fold every batch norm that follows a convolution alone."""

    name: ClassVar[str] = "fold"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()

    targets: tuple[str, ...] = ()

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """One fold a pair."""
        makers: dict[int, str] = {}
        kept: list[Tensor] = []  # alive, so that an id is not used twice
        pairs: list[tuple[str, str]] = []
        handles = []
        for name, module in unit.model.module.named_modules():
            if isinstance(module, nn.Conv2d):

                def made(_: nn.Module, args: object, output: Tensor, name: str = name) -> None:
                    makers[id(output)] = name
                    kept.append(output)

                handles.append(module.register_forward_hook(made))
            elif isinstance(module, nn.BatchNorm2d):

                def met(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                    if id(args[0]) in makers:
                        pairs.append((makers[id(args[0])], name))

                handles.append(module.register_forward_pre_hook(met))
        try:
            with torch.no_grad():
                unit.model.run(unit.model.example)
        finally:
            for handle in handles:
                handle.remove()
        convs, norms = [c for c, _ in pairs], [n for _, n in pairs]
        for conv, norm in pairs:
            if convs.count(conv) == 1 and norms.count(norm) == 1:
                yield Edit("fold", conv, norm, f"holds {norm}, exactly")
