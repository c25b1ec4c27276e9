"""Wanda: score = |w| * root mean square of its input (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from penjing.errors import InputError

__all__ = ["needs", "score"]

needs = frozenset({"gram"})


def score(weight: Tensor, stats: Any = None) -> Tensor:
    """|weight| * norm, [out, in]; larger means keep.

    Compare within rows: the paper's mask takes the same number out of every row.

    Args:
        weight: [out, in].
        stats: its `norm` [in], or the diagonal of its `gram` [in, in].

    Raises:
        InputError: neither is there, or of another width.
    """
    norm: Tensor | None = getattr(stats, "norm", None)
    gram: Tensor | None = getattr(stats, "gram", None)
    if norm is None and gram is not None:
        norm = gram.diagonal().sqrt()
    if norm is None:
        raise InputError(
            "the criterion wanda needs calibration data",
            got="none",
            next="pass --data, or use --criterion magnitude",
        )
    if tuple(norm.shape) != (weight.shape[1],):
        raise InputError("norm of the inputs", got=tuple(norm.shape), allowed=(weight.shape[1],))
    return weight.detach().abs() * norm.to(weight.dtype)  # [out, in]
