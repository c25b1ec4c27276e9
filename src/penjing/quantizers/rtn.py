"""Round to nearest on the min-max grid: the null baseline with sense, no data needed.

code = clip(round(w / scale) + zero_point, 0, 2**bits - 1)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from penjing import grids
from penjing.planes import IntegerPlanes, Scheme

__all__ = ["families", "fit", "needs"]

needs: frozenset[str] = frozenset()
families = frozenset({"integer"})


def fit(weight: Tensor, scheme: Scheme, stats: Any = None) -> IntegerPlanes:
    """Round each weight to the nearest point of its group's min-max grid.

    Args:
        weight: [out, in].
        scheme: bits, group, symmetric.
        stats: not used.

    Raises:
        InputError: not a matrix of finite floats.
    """
    weight = grids.check_weight(weight)
    grid = grids.min_max(weight, scheme)
    return grids.to_planes(grid.codes(weight), grid)
