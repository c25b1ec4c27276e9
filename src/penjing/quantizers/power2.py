"""Powers of two: a code looks up 0 or a signed power of two, so a product is a shift of bits.

    w = s * t[code] + shift,   t = 0, +-1, +-2, +-4, ... with 2**bits entries

(Zhou et al., Incremental Network Quantization, arXiv 1702.03044.) The table is known by its name
and not stored. Codes are chosen inside the error feedback of `_scalar`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penjing import codebooks, grids
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _scalar

__all__ = ["families", "fit", "needs"]

needs = frozenset({"gram"})
families = frozenset({"power2"})


def fit(weight: Tensor, scheme: Scheme, stats: Any = None, *, rounds: int = 3) -> IntegerPlanes:
    """Fit one plane of looked-up powers of two.

    Args:
        weight: [out, in].
        scheme: bits 2 to 4, group, symmetric (no shift), scale_bits.
        stats: its `gram` [in, in]; without one columns are independent.
        rounds: refits and passes of coordinate descent after the feedback.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width.
    """
    weight = grids.check_weight(weight)
    bits = int(scheme.bits)
    name = f"power2-{bits}"
    table = codebooks.table(name)  # [entries, 1]
    letters = table.float().T.contiguous()
    levels = _scalar.fit(weight, letters, scheme, stats, rounds=rounds)
    planes = _scalar.to_planes(levels, [len(table)], [bits], scheme, torch.zeros(1))
    return replace(planes, tables=table.unsqueeze(0), table_names=(name,))
