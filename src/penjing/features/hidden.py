"""Hidden states through a projection that least squares solves: mean |P s - t|^2 / mean |t - m|^2.

P maps the student's states to the teacher's width and is solved again as the student moves, so no
weights are trained that are thrown away (a closed form of FitNets' regressor, Romero et al.,
arXiv 1412.6550, section 2.2); m is the mean of t.
"""

from __future__ import annotations

from torch import Tensor

from penjing.features._rows import unexplained

__all__ = ["loss", "projection"]

projection = "solved"


def loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scalar, 1 for a student that knows the mean alone.

    Args:
        student: [batch, places, width], projected.
        teacher: of the same shape.
        mask: bool [batch, places], False for padding.
    """
    return unexplained(student, teacher, mask)
