"""Which size every layer gets: an integer program whose costs are corrected by what it chose.

Whole networks are made and compared on few samples. What came of them corrects the costs
(`penjing.fit.belief`), by as much as it is more than chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from penjing.fit.belief import Belief
from penjing.fit.solve import Constraint, solve

__all__ = ["TRIES", "Layer", "Size", "searched"]

Size = tuple[int, int]
"""Bits and group; a group of 0 is the whole row."""

# Divergences of less are the float32 arithmetic's, and better is what is so by more than chance.
_NOISE, _BETTER = 1e-6, 0.99
# Of a layer's divergence.
_POWER = 0.8
# Networks made at the most, and only as long as samples are so many that chance is less than this
# part of what they say.
TRIES, _TELLING = 6, 0.2


@dataclass
class Layer:
    """One layer: its divergence alone, and its own error and bits in each size."""

    path: str
    measured: float
    errors: list[float]
    bits: list[float]


def searched(
    layers: Sequence[Layer], sizes: Sequence[Size], run: Callable[[Sequence[int]], Tensor],
    limit: float | None, tries: int,
) -> tuple[tuple[int, ...] | None, dict[tuple[int, ...], float]]:  # fmt: skip
    """The best choice within the limit, by number of size, and the divergence of all that were run.

    Args:
        run: divergences of a choice, by sample.
    """
    bits = [layer.bits for layer in layers]
    first = (0,) * len(layers)
    own = sum(row[0] for row in bits)
    rule = {"bits": Constraint(bits, own if limit is None else limit)}
    plain = run(first)
    made = {first: _mean(plain)}
    belief = Belief(_costs(layers, made[first]), [width for width, _ in sizes])
    belief.learn(first, made[first])
    allowed = [first] if own <= rule["bits"].limit else []
    if allowed and made[first] <= _NOISE:
        return first, made
    blurred = False
    for number in range(tries):
        costs = belief.costs
        if number == 1:  # what fewer bits cost is known least
            costs = np.where([width < sizes[0][0] for width, _ in sizes], np.inf, costs)
        chosen = solve(costs.tolist(), rule, made)
        if chosen is None and number == 1:
            continue
        if chosen is None:
            break
        if number > 1 and allowed:  # worth a try is what may be better, if it can be told
            best = min(allowed, key=belief.said)
            if blurred or belief.said(chosen) - belief.doubt(chosen, best) > belief.said(best):
                break
        found = run(chosen)
        made[chosen], noise = _mean(found), _noise(found, plain)
        belief.learn(chosen, made[chosen], noise)
        if math.isfinite(made[chosen]):
            allowed.append(chosen)
        blurred = blurred or noise > _TELLING * made[chosen]
    # The least that was measured is by chance too often one of few samples; of the uniform size
    # better is what is so by more than that.
    if not allowed:
        return None, made
    best = min(allowed, key=belief.said)
    if first in allowed and belief.said(best) > _BETTER * made[first]:
        best = first
    return best, made


def _mean(values: Tensor) -> float:
    mean = float(values.mean())
    return max(0.0, mean) if math.isfinite(mean) else math.inf


def _noise(values: Tensor, plain: Tensor) -> float:
    """Standard error of a mean beside that of the same samples in the uniform size.

    Of a ratio: Cochran, "Sampling Techniques" (1977), equation 6.13.
    """
    ratio = _mean(values) / max(_mean(plain), 1e-300)
    if len(values) < 2 or not math.isfinite(ratio):
        return 0.0
    return float((values - ratio * plain).std()) / math.sqrt(len(values))


def _costs(layers: Sequence[Layer], uniform: float) -> list[list[float]]:
    """Of every layer in every size, [layers, sizes]; those of the uniform one add up to its own."""
    worst = max((x.measured for x in layers if math.isfinite(x.measured)), default=1.0)
    scales = [min(x.measured, worst) ** _POWER for x in layers]
    whole = (uniform if math.isfinite(uniform) else 1.0) / max(sum(scales), 1e-300)
    return [
        [whole * scale * error / max(x.errors[0], 1e-300) for error in x.errors]
        for x, scale in zip(layers, scales, strict=True)
    ]
