"""8-bit grids of layer inputs, with or without the division of their channels.

Channels are divided only where that does less harm on inputs that the divisors were not made
from: with few input vectors (one an image behind a pooling) each channel's peak is a matter of
chance, and dividing by it leaves no room above any. Divisors and both ranges of one half of a
sample are tried on the other: sum over rows of ||(x - grid(x / s) s) W^T||^2, s the divisors or 1.

`auto` takes of all observers the one whose grid changes the layer's output least on a sample
of its inputs: sum over rows of ||(x - grid(x)) W^T||^2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats
from penjing.errors import UsageError
from penjing.histogram import Histogram
from penjing.migration import divisors, input_scales
from penjing.recipe import ActivationRange
from penjing.registry import choices, lookup

__all__ = ["activation_range", "migrations", "readers"]

_ROWS = 1024


def migrations(
    layers: dict[str, nn.Module], groups: list[list[str]], stats: dict[str, LayerStats],
    alpha: float, floor: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Divisors [in] of the inputs of `layers`; those of a group of `readers` share them."""
    found: dict[str, Tensor] = {}
    for several in groups:
        group = [path for path in several if path in layers]
        if not group:
            continue
        own = stats[group[0]]
        weights = [layers[path].weight.detach().float() for path in group]  # type: ignore[operator]
        if own.rows is not None and not _helps(own.rows[:: _step(own.rows)], weights, alpha, floor):
            continue
        peak = input_scales(own.lows, own.highs)  # type: ignore[arg-type]
        found |= dict.fromkeys(group, divisors(peak, weights, alpha, floor))
    return found


def readers(layers: dict[str, nn.Module], stats: dict[str, LayerStats]) -> list[list[str]]:
    """Linear layers with statistics, those that read one input together."""
    groups: list[list[str]] = []
    for path, layer in layers.items():
        own = stats.get(path)
        if not isinstance(layer, nn.Linear) or own is None or own.lows is None:
            continue
        for group in groups:
            if _same_input(stats[group[0]], own):
                group.append(path)
                break
        else:
            groups.append([path])
    return groups


def _helps(rows: Tensor, weights: list[Tensor], alpha: float, floor: float) -> bool:
    """Whether divisors of every second row [n, in] do less harm to the rows between them."""
    seen, unseen = rows[::2], rows[1::2]
    if not len(unseen):
        return True
    scale = divisors(input_scales(seen.amin(0), seen.amax(0)), weights, alpha, floor)

    def harm(channels: Tensor) -> float:
        low, high = (seen / channels).aminmax()
        grid = _grid(float(low), float(high), None)
        return sum(_output_error(unseen / channels, grid, w * channels) for w in weights)

    return harm(scale) < harm(torch.ones_like(scale))


def _same_input(one: LayerStats, other: LayerStats) -> bool:
    pairs = ((one.lows, other.lows), (one.highs, other.highs), (one.rows, other.rows))
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def activation_range(
    stats: LayerStats,
    path: str,
    observer: str = "minmax",
    *,
    channels: Tensor | None = None,
    weight: Tensor | None = None,
) -> ActivationRange:
    """The 8-bit grid of a layer's input, zero exactly representable.

    Args:
        stats: of the input.
        path: of the layer, for messages.
        observer: a name of `penjing.observers`, or `auto`, which needs `weight`.
        channels: [in], what the input is divided by first.
        weight: [out, in] or [out, in / groups, ...], as it multiplies the undivided input; of
            all layers that read it, one after the other, which then have one grid.

    Raises:
        UsageError: no data.
    """
    if not stats.count:
        raise UsageError(f"{path} saw no calibration data", next="give --data")
    low, high, rows = stats.low, stats.high, stats.rows
    if channels is not None and stats.lows is not None and stats.highs is not None:
        low, high = float((stats.lows / channels).min()), float((stats.highs / channels).max())
        rows = None if rows is None else rows / channels
        weight = None if weight is None else weight * channels
    if observer == "minmax" or rows is None:
        return _grid(low, high, channels)
    histogram = Histogram()
    histogram.add(rows)
    histogram.low, histogram.high = low, high
    if observer != "auto" or weight is None:
        name = "minmax" if observer == "auto" else observer
        low, high = lookup("observers", name, "fit")(histogram, 8)
        return _grid(low, high, channels)
    ends = [lookup("observers", name, "fit")(histogram, 8) for name in _names()]
    found = [_grid(low, high, channels) for low, high in ends]
    some = rows[:: _step(rows)]
    return min(found, key=lambda grid: _output_error(some, grid, weight))


def _names() -> list[str]:
    # The whole range first: of equals the one that clips nothing.
    return sorted(choices("observers"), key=lambda name: (name != "minmax", name))


def _grid(low: float, high: float, channels: Tensor | None) -> ActivationRange:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return ActivationRange(scale, round(-low / scale), channels)


def _step(rows: Tensor) -> int:
    return max(1, len(rows) // _ROWS)


def _output_error(rows: Tensor, grid: ActivationRange, weight: Tensor) -> float:
    codes = (torch.round(rows / grid.scale) + grid.zero_point).clamp(0, 255)
    change = (codes - grid.zero_point) * grid.scale - rows  # [n, in]
    if weight.flatten(1).shape[1] == rows.shape[1]:
        return float((change @ weight.flatten(1).T).double().square().sum())
    # A kernel reads a neighbourhood: errors of its places count as independent.
    if weight.shape[1] == rows.shape[1]:
        power = weight.double().square().sum((0, *range(2, weight.ndim)))  # [in]
    else:
        own = weight.shape[1]  # inputs of a group
        parts = weight.double().square().flatten(2).sum(2)  # [out, own]
        power = parts.reshape(rows.shape[1] // own, -1, own).sum(1).flatten()  # [in]
    return float((change.double().square() @ power).sum())
