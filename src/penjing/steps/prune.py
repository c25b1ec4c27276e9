"""Prune: single connections go away, by importance, through a mask.

A criterion scores each weight; the lowest `sparsity` of each layer go, or, with a pattern n:m,
all but the n best of every m inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from penjing.calibrate import LayerStats, Unit
from penjing.errors import UsageError
from penjing.masks import n_m, parse_pattern, unstructured
from penjing.recipe import Edit
from penjing.registry import choices, lookup
from penjing.steps._select import canonical, matrix_layers

__all__ = ["Prune"]


@dataclass(frozen=True)
class Prune:
    """Remove connections.

    Attributes:
        sparsity: fraction of each layer's weights that go, 0 to 1.
        criterion: a name of `penjing.criteria`, or `file.py:function`.
        pattern: `n:m` keeps n of every m inputs; it overrides `sparsity`.
        targets: globs of layer paths; without any, every layer inside the blocks.
    """

    name: ClassVar[str] = "prune"
    scope: ClassVar[str] = "block"

    sparsity: float = 0.5
    criterion: str = "wanda"
    pattern: str | None = None
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError("sparsity", got=self.sparsity, allowed="0 <= sparsity < 1")
        if self.pattern is not None:
            parse_pattern(self.pattern)
        if ":" not in self.criterion and self.criterion not in choices("criteria"):
            lookup("criteria", self.criterion, "score")

    @property
    def needs(self) -> frozenset[str]:
        """Input norms for every criterion that looks at data."""
        blind = self.criterion in ("magnitude", "random")
        return frozenset() if blind else frozenset({"gram"})

    def layers(self, unit: Unit) -> dict[str, nn.Module]:
        """The layers of a unit that are pruned, by path."""
        return matrix_layers(unit, self.targets)

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """One mask a layer."""
        score = lookup("criteria", self.criterion, "score")
        for path, layer in self.layers(unit).items():
            weight = layer.weight.detach()  # type: ignore[operator]
            matrix = weight.reshape(len(weight), -1).float()  # [out, in]
            own = stats.get(path)
            if self.needs and (own is None or own.norm is None):
                continue  # a grouped convolution has no one input vector
            scores = score(matrix, own)
            if self.pattern is not None:
                mask, how = n_m(scores, *parse_pattern(self.pattern)), self.pattern
            else:
                # Wanda compares the weights of one output only (Sun et al., section 3).
                mask = unstructured(scores, self.sparsity, per_row=self.criterion == "wanda")
                how = f"{self.sparsity:.0%}"
            gone = 1 - float(mask.float().mean())
            yield Edit(
                "mask",
                canonical(unit.model, f"{path}.weight"),
                mask.reshape(weight.shape),
                f"{how} of the connections, least important by {self.criterion}",
                {"sparsity": gone},
            )
