"""Binary codes: each of b planes adds +s/2 or -s/2, so a weight is a signed sum of b scales.

    w = sum over k of s_k * (code_k - 1/2) + shift

(alternating least squares: Xu et al., arXiv 1802.00150; here H-weighted and inside error
feedback, see `_scalar`.) The code that is optimal for a Gaussian at 2 bits is one of these, so
for rotated weights one set of scales a row, symmetric, is enough.

`nested`: plane after plane, each with its own feedback on top of the planes that are fixed;
the first k planes with their own scales are then a good code of k bits. Otherwise all planes are
chosen together, which is better for the whole and worse for its prefixes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penjing import grids
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _scalar
from penjing.scales import centred

__all__ = ["families", "fit", "needs"]

needs = frozenset({"gram"})
families = frozenset({"binary"})


def fit(
    weight: Tensor,
    scheme: Scheme,
    stats: Any = None,
    *,
    nested: bool = False,
    rounds: int = 3,
) -> IntegerPlanes:
    """Fit `bits` planes of one bit.

    Args:
        weight: [out, in].
        scheme: bits, group, symmetric (no shift), scale_bits.
        stats: its `gram` [in, in]; without one columns are independent.
        nested: make prefixes of 2 planes and more good codes of their own; their scales are
            kept in `nested_scales`.
        rounds: refits and passes of coordinate descent after the feedback.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width.
    """
    weight = grids.check_weight(weight)
    bits = int(scheme.bits)
    first = min(2, bits) if nested else bits
    levels = _scalar.fit(
        weight, _letters(first), scheme, stats, centre=_centre(first), rounds=rounds
    )
    kept = {}
    for k in range(first + 1, bits + 1):
        kept[k - 1] = (levels.scale, _stored(levels))
        levels = _scalar.extend(
            weight, levels, _letters(k), scheme, stats, centre=_centre(k), rounds=rounds
        )
    planes = _scalar.to_planes(levels, [2] * bits, [1] * bits, scheme, _centre(bits))
    return replace(planes, nested_scales=kept) if kept else planes


def _letters(planes: int) -> Tensor:
    return _scalar.alphabet([[-0.5, 0.5]] * planes)


def _centre(planes: int) -> Tensor:
    return torch.full((planes,), 0.5)


def _stored(levels: _scalar.Levels) -> Tensor:
    if levels.stored is not None:
        return levels.stored
    return centred(levels.scale, tuple(_centre(len(levels.scale)).tolist()))
