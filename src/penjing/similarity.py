"""How alike the states of two networks are: linear centred kernel alignment.

    CKA = |X^T Y|^2 / (|X^T X| |Y^T Y|), columns centred (Kornblith et al., arXiv 1905.00414, 3)

1 for states that are equal up to a rotation and a scale, whatever their widths.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["linear_cka"]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Between 0 and 1; x [samples, width], y [samples, any width]. 0 where one is constant."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):  # the same from the samples' products
        one, two = x @ x.T, y @ y.T
        shared = float((one * two).sum())
        scale = float(one.norm() * two.norm())
    else:
        shared = float((x.T @ y).square().sum())
        scale = float((x.T @ x).norm() * (y.T @ y).norm())
    return shared / scale if scale else 0.0
