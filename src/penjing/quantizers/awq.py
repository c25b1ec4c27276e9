"""Round to nearest on the grid of least error on the data: what AWQ does behind its divisors.

    argmin over scale, zero point of  sum over the group of H_jj (w_j - scale (q_j - zero))^2

(Lin et al., AWQ, arXiv 2306.00978.) The multiplication of the weights by divisors of their inputs
comes before, on the whole network: `penjing.migration.activation_aware`, `penjing.channels`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from penjing import grids
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers._clip import search
from penjing.quantizers._feedback import check_gram

__all__ = ["families", "fit", "needs"]

needs = frozenset({"gram"})
families = frozenset({"integer"})


def fit(weight: Tensor, scheme: Scheme, stats: Any = None) -> IntegerPlanes:
    """Round each weight to the nearest point of its group's best grid.

    Args:
        weight: [out, in], as it multiplies the divided input.
        scheme: bits, group, symmetric, scale_bits.
        stats: its `gram` [in, in]; without one all inputs count alike.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width or with NaN.
    """
    weight = grids.check_weight(weight)
    gram = check_gram(weight, stats)
    grid = search(weight, scheme, None if gram is None else gram.diagonal())
    return grids.to_planes(grid.codes(weight), grid)
