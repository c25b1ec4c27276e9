"""Mean squared error: mean over all elements of (student - teacher)^2."""

from __future__ import annotations

from torch import Tensor

__all__ = ["loss"]


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar; both of one shape."""
    return (student.float() - teacher.float()).square().mean()
