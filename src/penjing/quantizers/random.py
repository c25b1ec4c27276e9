"""Random codes on the min-max grid: what every quantizer must beat. Seed 0, always."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penjing import grids
from penjing.planes import IntegerPlanes, Scheme

__all__ = ["families", "fit", "needs"]

needs: frozenset[str] = frozenset()
families = frozenset({"integer"})


def fit(weight: Tensor, scheme: Scheme, stats: Any = None) -> IntegerPlanes:
    """Codes drawn uniformly from 0 to 2**bits - 1.

    Args:
        weight: [out, in].
        scheme: bits, group, symmetric.
        stats: not used.

    Raises:
        InputError: not a matrix of finite floats.
    """
    weight = grids.check_weight(weight)
    grid = grids.min_max(weight, scheme)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, scheme.levels + 1, weight.shape, generator=generator)
    return grids.to_planes(codes.to(torch.uint8), grid)
