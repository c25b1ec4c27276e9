"""Residual integers: a second plane of few bits codes what the first one left.

    w = s1 * (code1 - c1) + s2 * (code2 - c2) + shift,   c = (2**bits - 1) / 2

4 bits are 2 + 2, 3 are 2 + 1, 2 are 1 + 1. Codes of both planes are chosen together, the nearest
of all sums, inside the error feedback of `_scalar`; so the planes need not be one fine grid.
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
families = frozenset({"residual"})


def fit(weight: Tensor, scheme: Scheme, stats: Any = None, *, rounds: int = 3) -> IntegerPlanes:
    """Fit two planes.

    Args:
        weight: [out, in].
        scheme: bits (split evenly, the first plane has the odd one), group, symmetric (no
            shift), scale_bits.
        stats: its `gram` [in, in]; without one columns are independent.
        rounds: refits and passes of coordinate descent after the feedback.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width.
    """
    weight = grids.check_weight(weight)
    bits = int(scheme.bits)
    sizes = [2 ** (bits - bits // 2), 2 ** (bits // 2)]
    letters = _scalar.alphabet([[code - (n - 1) / 2 for code in range(n)] for n in sizes])
    centre = torch.tensor([(n - 1) / 2 for n in sizes])
    levels = _scalar.fit(weight, letters, scheme, stats, centre=centre, rounds=rounds)
    return _scalar.to_planes(levels, sizes, [bits - bits // 2, bits // 2], scheme, centre)
