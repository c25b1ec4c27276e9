"""Round to nearest on a clipped grid: each group's range cut, at both ends, to least squared error.

    argmin over scale, zero point of  sum over the group of h (w - scale (q - zero))^2

with q the nearest codes and h the diagonal of H where it is given, else 1: no data needed
(`_clip`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from penjing import grids
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers._clip import search
from penjing.quantizers._feedback import check_gram

__all__ = ["families", "fit", "needs", "search"]

needs: frozenset[str] = frozenset()
families = frozenset({"integer"})


def fit(
    weight: Tensor, scheme: Scheme, stats: Any = None, *, steps: int = 20, reach: int = 3
) -> IntegerPlanes:
    """Round each weight to the nearest point of its group's best grid.

    Args:
        weight: [out, in].
        scheme: bits, group, symmetric, scale_bits.
        stats: the diagonal of its `gram` [in, in] weighs the squared errors.
        steps, reach: as in `search`.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width or with NaN.
    """
    weight = grids.check_weight(weight)
    gram = check_gram(weight, stats)
    grid = search(weight, scheme, None if gram is None else gram.diagonal(), steps, reach)
    return grids.to_planes(grid.codes(weight), grid)
