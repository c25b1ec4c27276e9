"""Hints: mean |P s - t|^2 / mean |t - m|^2, P a projection that is trained along with the student.

P maps the student's states to the teacher's width; m is the mean of t (FitNets, Romero et al.,
arXiv 1412.6550, section 2.2).
"""

from __future__ import annotations

from torch import Tensor

from penjing.features._rows import unexplained

__all__ = ["loss", "projection"]

projection = "learned"


def loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scalar, 1 for a student that knows the mean alone.

    Args:
        student: [batch, places, width], projected.
        teacher: of the same shape.
        mask: bool [batch, places], False for padding.
    """
    return unexplained(student, teacher, mask)
