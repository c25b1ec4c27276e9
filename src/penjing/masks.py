"""Masks from scores: which connections stay; larger scores stay, exact counts.

    unstructured: the round(sparsity * n) least go, over the whole weight or in each row
    n:m:          of every m consecutive inputs the n largest stay

Among equals the first, row by row, go first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.errors import InputError, UsageError

__all__ = ["Pattern", "n_m", "parse_pattern", "unstructured"]


def parse_pattern(text: str) -> tuple[int, int]:
    """`2:4` is (2, 4): two of four stay.

    Raises:
        UsageError: not n:m with 0 < n < m.
    """
    kept, _, of = str(text).partition(":")
    if not (kept.isascii() and kept.isdigit() and of.isascii() and of.isdigit()):
        raise UsageError("not a pattern", got=repr(text), allowed="n:m such as 2:4")
    n, m = int(kept), int(of)
    if not 0 < n < m:
        raise UsageError("not a pattern", got=repr(text), allowed="n:m with 0 < n < m, such as 2:4")
    return n, m


@dataclass(frozen=True)
class Pattern:
    """How many connections go, and which may.

    Attributes:
        sparsity: fraction that goes, 0 to 1.
        kept, of: of every `of` inputs `kept` stay, in place of `sparsity`; 0 for any places.
    """

    sparsity: float = 0.5
    kept: int = 0
    of: int = 0

    def mask(self, scores: Tensor, *, per_row: bool = False) -> Tensor:
        """The largest scores [out, in] that the pattern lets stay; see `unstructured`."""
        if self.of:
            return n_m(scores, self.kept, self.of)
        return unstructured(scores, self.sparsity, per_row)

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}" if self.of else f"{self.sparsity:.0%}"


def _check(scores: Tensor) -> None:
    if scores.ndim != 2:
        raise InputError("scores", got=tuple(scores.shape), allowed="[out, in]")
    if bool(torch.isnan(scores).any()):
        raise InputError("scores have NaN", next="check the weights and the calibration data")


def unstructured(scores: Tensor, sparsity: float, per_row: bool = False) -> Tensor:
    """Mask that removes the least scores.

    Args:
        scores: [out, in].
        sparsity: fraction removed, 0 to 1.
        per_row: the same number in each row, round(sparsity * in).

    Returns:
        bool [out, in], True is kept.

    Raises:
        UsageError: sparsity outside 0 to 1.
        InputError: NaN scores or not a matrix.
    """
    _check(scores)
    if not 0 <= sparsity <= 1:
        raise UsageError("sparsity", got=sparsity, allowed="0 to 1")
    rows = scores if per_row else scores.reshape(1, -1)
    count = round(sparsity * rows.shape[1])
    if not count or not rows.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = rows.kthvalue(count, dim=1, keepdim=True).values  # [rows, 1]
    below, equal = rows < threshold, rows == threshold
    missing = count - below.sum(1, keepdim=True)
    removed = below | (equal & (equal.cumsum(1) <= missing))
    return ~removed.reshape(scores.shape)


def n_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps the n largest of every m consecutive inputs.

    The last in % m inputs, which fill no group, are all kept.

    Args:
        scores: [out, in].
        n: kept of each group, 0 < n < m.
        m: inputs of a group.

    Returns:
        bool [out, in], True is kept.

    Raises:
        UsageError: not 0 < n < m.
        InputError: NaN scores or not a matrix.
    """
    _check(scores)
    if not 0 < n < m:
        raise UsageError("pattern", got=f"{n}:{m}", allowed="n:m with 0 < n < m")
    whole = scores.shape[1] // m * m
    grouped = scores[:, :whole].reshape(len(scores), -1, m)  # [out, groups, m]
    least = grouped.argsort(dim=-1, stable=True)[..., : m - n]
    kept = torch.ones_like(grouped, dtype=torch.bool).scatter_(-1, least, False)
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[:, :whole] = kept.reshape(len(scores), whole)
    return mask
