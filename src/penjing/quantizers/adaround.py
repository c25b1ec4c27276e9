"""AdaRound: up or down, learnt for every weight of a layer at once (Nagel et al., 2004.10568).

    argmin over V of  tr(E H E^T) + strength * sum of (1 - |2 h(V) - 1|^beta)
    Q = s (clip(floor(w / s) + h(V) + z) - z),   h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)

by Adam, errors E = Q - W in units of the row's mean scale, H over its mean diagonal. The whole
data is in H, so there are no batches and no chance. V begins where Q = W; the regularizer joins
after a fifth of the rounds, beta goes from 20 down to 2 and drives every h to 0 or 1.

The grid stays as it was, and no weight moves by a whole step: correlated inputs want more. On three
layers of a sentence encoder (groups of 64; 4, 3, 2 bits) the error was 1.1 to 2.1 times that of
`gptq` on the data it learnt from and 1.0 to 1.4 times on other data, in 6 to 10 times the time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from penjing import grids
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _feedback, _rounding

__all__ = ["families", "fit", "needs"]

needs = frozenset({"gram"})
families = frozenset({"integer"})

# The rectified sigmoid reaches a little beyond 0 and 1, so that it can stay on them.
_STRETCH, _BELOW = 1.2, 0.1
_WARM, _FIRST, _LAST = 0.2, 20.0, 2.0


def fit(
    weight: Tensor,
    scheme: Scheme,
    stats: Any = None,
    *,
    rounds: int = 300,
    rate: float = 0.1,
    strength: float = 1.0,
    damping: float = 0.01,
) -> IntegerPlanes:
    """Learn which weights go up.

    Args:
        weight: [out, in].
        scheme: bits, group, symmetric, scale_bits.
        stats: its `gram` [in, in] is H; without one this is round to nearest.
        rounds: of Adam, each a product with H.
        rate: of Adam.
        strength: of the regularizer.
        damping: added to H while learning, as a fraction of its mean diagonal.

    Returns:
        Planes; no row has more error than round to nearest on the same grid.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width or with NaN.
    """
    weight = grids.check_weight(weight)
    metrics = _rounding.metrics(weight, stats, damping)
    grid = grids.mse(weight, scheme, None if metrics is None else metrics[0].diagonal())
    codes = grid.codes(weight)
    if metrics is None:
        return grids.to_planes(codes, grid)
    scale, zero = (
        grids.spread(t, grid.group, weight.shape[1]) for t in (grid.scale, grid.zero_point)
    )
    for first in range(0, len(weight), _rounding.ROWS):
        rows = slice(first, first + _rounding.ROWS)
        ends = -zero[rows], scheme.levels - zero[rows]
        found = _learn(weight[rows], scale[rows], ends, metrics[0], rounds, rate, strength)
        found += zero[rows]
        was, now = (
            _feedback.loss((c - zero[rows]) * scale[rows] - weight[rows], metrics[1])
            for c in (codes[rows], found)
        )
        codes[rows] = torch.where((now < was).unsqueeze(1), found.to(torch.uint8), codes[rows])
    return grids.to_planes(codes, grid)


def _learn(
    weight: Tensor,
    scale: Tensor,
    ends: tuple[Tensor, Tensor],
    gram: Tensor,
    rounds: int,
    rate: float,
    strength: float,
) -> Tensor:
    """Codes about the zero point [rows, in]."""
    exact = weight / scale
    unit = scale / scale.mean(1, keepdim=True)
    below = exact.floor()
    values = torch.logit((exact - below + _BELOW) / _STRETCH)
    adam = torch.optim.Adam([values], lr=rate)
    for turn in range(rounds):
        share = torch.sigmoid(values)
        up = share * _STRETCH - _BELOW
        free = (up > 0) & (up < 1)
        up.clamp_(0, 1)
        codes = below + up
        inside = torch.minimum(torch.maximum(codes, ends[0]), ends[1])
        # Of the loss by each up; clipped codes do not move.
        slope = 2 * (((inside - exact) * unit) @ gram) * unit * (codes == inside)
        past = (turn / rounds - _WARM) / (1 - _WARM)
        if past >= 0:
            beta = _LAST + (_FIRST - _LAST) * (1 + math.cos(math.pi * past)) / 2
            side = 2 * up - 1
            slope -= strength * 2 * beta * side.abs().pow(beta - 1) * side.sign()
        values.grad = slope * free * share * (1 - share) * _STRETCH
        adam.step()
    up = (torch.sigmoid(values) * _STRETCH - _BELOW >= 0.5).float()
    return torch.minimum(torch.maximum(below + up, ends[0]), ends[1])
