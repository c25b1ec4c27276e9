"""Equalize: channels that several layers share get ranges of their own size, exactly.

All channels of a tensor have one 8-bit grid, and the widest sets it. Where layers alone make and
read the channels (`penjing.channels`: a convolution and the next, or a whole residual stream),

    writers W / s, b / s;   readers W s,    s_j = p_j^alpha / w_j^(1 - alpha), over its mean

p_j the largest value of channel j on calibration data, w_j the largest weight that reads it
(`penjing.migration`); without data p_j is the largest weight that makes the channel, and at alpha
= 0.5 that is cross-layer equalisation (Nagel et al., arXiv 1906.04721, section 4.1) of as many
layers as there are. Nothing is left to compute at run time.

Channels that end in a ReLU6 stay as they are: divided, each would have a clip of its own, which
is no ReLU6, and their range is 0 to 6 already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Stream, Unit
from penjing.channels import Channels, shared_channels
from penjing.errors import UsageError
from penjing.migration import divisors, input_scales
from penjing.recipe import Edit
from penjing.steps._divide import division, is_plain, same
from penjing.steps._select import selected

__all__ = ["Equalize"]


@dataclass(frozen=True)
class Equalize:
    """Divide shared channels by factors of their own.

    Attributes:
        alpha: 0 to even out the weights that read the channels, 1 their values.
        floor: least peak of a channel, relative to the root mean square of all: channels that
            calibration hardly woke may wake on other data.
        targets: globs of the paths of layers that may be changed; without any, all.
    """

    name: ClassVar[str] = "equalize"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset({"range"})

    alpha: float = 0.9
    floor: float = 0.5
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError("alpha", got=self.alpha, allowed="0 to 1")
        if not 0 <= self.floor <= 1:
            raise UsageError("floor", got=self.floor, allowed="0 to 1")

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """New weights and biases of every set of channels that can be divided."""
        model = unit.model
        layers = dict(model.module.named_modules())
        wanted = selected(Unit("", model, layers, None, None), self.targets)
        free = [
            found
            for found in shared_channels(model)
            if all(n in wanted and is_plain(model, n) for n in (*found.writers, *found.readers))
        ]
        names = {name: layers[name] for found in free for name in found.readers}
        if names and unit.batches:
            whole = Unit("", model, names, None, None)
            stats = Stream(model, unit.batches).collect(whole, frozenset({"range"}))
        planned = [(found, self._factors(found, layers, stats)) for found in free]
        # All at once first: one run settles the usual network.
        if planned and not same(model, planned):
            planned = [one for one in planned if same(model, [one])]
        yield from division(model, planned)

    def _factors(
        self, found: Channels, layers: dict[str, nn.Module], stats: dict[str, LayerStats]
    ) -> Tensor:
        """s, float32 [channels]."""
        seen = [stats[n] for n in found.readers if n in stats]
        peaks = [
            input_scales(s.lows, s.highs)
            for s in seen
            if s.lows is not None and s.highs is not None
        ]
        if not peaks:
            peaks = [_weight(layers[n]).abs().flatten(1).amax(1) for n in found.writers]
        read = [_by_input(layers[n]) for n in found.readers]
        return divisors(torch.stack(peaks).amax(0), read, self.alpha, self.floor)


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.float()


def _by_input(layer: nn.Module) -> Tensor:
    """Weights [n, in] by the channel that they read."""
    weight = _weight(layer)
    if getattr(layer, "groups", 1) > 1:  # [in * each, 1, h, w]
        width: int = layer.in_channels  # type: ignore[assignment]
        return weight.reshape(width, -1).T
    return weight.transpose(0, 1).flatten(1).T
