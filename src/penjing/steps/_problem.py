"""What a layer gave as a least-squares problem, for steps that change its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats
from penjing.linalg import asymmetric_target

__all__ = ["Fit", "Problem"]


@dataclass(frozen=True, eq=False)
class Fit:
    """What a layer becomes: its matrix, zero where it read what went, and its bias."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer's outputs as least squares: about their means where it has a bias to hold them."""

    weight: Tensor  # [out, in], what is aimed at
    gram: Tensor
    original: Tensor
    bias: Tensor | None
    was: Tensor | None  # means of the inputs, before and now
    now: Tensor | None

    @classmethod
    def of(
        cls, layer: nn.Module, weight: Tensor, stats: LayerStats, alpha: float = 0.5,
        *, means: bool = True,
    ) -> Problem:  # fmt: skip
        """A layer's, with its weight [out, in].

        Args:
            stats: `gram`, with `cross` the target is part of the way toward what the layer gave in
                the network before (`penjing.linalg.asymmetric_target`): `alpha` of it.
            means: a bias holds them.
        """
        gram, cross, bias = stats.gram, stats.cross, getattr(layer, "bias", None)
        assert gram is not None
        now, was = stats.mean, stats.mean if stats.was is None else stats.was
        if not means or bias is None or now is None or was is None:
            bias = now = was = None
        else:
            around = gram - torch.outer(now, now)
            # What never changes is the bias's to make; rounding must not make a channel of it.
            live = around.diagonal() > 1e-9 * gram.diagonal()  # [in]
            gram = around * torch.outer(live, live)
            cross = None if cross is None else (cross - torch.outer(was, now)) * live
        aim = weight if cross is None else asymmetric_target(weight, gram, cross, alpha)
        return cls(aim, gram, weight, None if bias is None else bias.detach(), was, now)

    def fit(self, weight: Tensor) -> Fit:
        """With another matrix, and the bias that keeps the mean of the output."""
        if self.bias is None or self.was is None or self.now is None:
            return Fit(weight, None)
        lost = self.original.double() @ self.was - weight.double() @ self.now
        return Fit(weight, (self.bias.double() + lost).float())
