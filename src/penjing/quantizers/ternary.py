"""Ternary sums: each plane adds -s, 0 or +s, in 1.6 stored bits (five codes to a byte).

    w = sum over k of s_k * t_k + shift,   t in -1, 0, +1

One plane is 1.6 bits, two are 3.2 (nine levels), three 4.8. Codes of all planes are chosen
together inside the error feedback of `_scalar`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penjing import grids
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _scalar

__all__ = ["families", "fit", "needs"]

needs = frozenset({"gram"})
families = frozenset({"ternary"})


def fit(weight: Tensor, scheme: Scheme, stats: Any = None, *, rounds: int = 3) -> IntegerPlanes:
    """Fit bits / 1.6 planes.

    Args:
        weight: [out, in].
        scheme: bits 1.6, 3.2 or 4.8, group, symmetric (no shift), scale_bits.
        stats: its `gram` [in, in]; without one columns are independent.
        rounds: refits and passes of coordinate descent after the feedback.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width.
    """
    weight = grids.check_weight(weight)
    planes = round(scheme.bits / 1.6)
    letters = _scalar.alphabet([[-1.0, 0.0, 1.0]] * planes)
    centre = torch.ones(planes)
    levels = _scalar.fit(weight, letters, scheme, stats, centre=centre, rounds=rounds)
    return _scalar.to_planes(levels, [3] * planes, [1.6] * planes, scheme, centre)
