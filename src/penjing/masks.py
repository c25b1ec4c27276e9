"""Masks from scores: which connections stay; larger scores stay, exact counts.

    unstructured: the round(sparsity * n) least go, over the whole weight or in each row
    n:m:          of every m consecutive inputs the n largest stay
    blocks RxC:   R outputs by C inputs stay or go together, by the sum of their scores

Among equals the first, row by row, go first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.errors import InputError, UsageError

__all__ = ["Pattern", "blocks", "n_m", "unstructured"]

_ALLOWED = "n:m with 0 < n < m, such as 2:4, or blocks of outputs by inputs, such as 1x4"


@dataclass(frozen=True)
class Pattern:
    """How many connections go, and which may.

    Attributes:
        sparsity: fraction that goes, 0 to 1.
        kept, of: of every `of` inputs `kept` stay, in place of `sparsity`; 0 for any places.
        block: outputs and inputs that stay or go together.
    """

    sparsity: float = 0.5
    kept: int = 0
    of: int = 0
    block: tuple[int, int] = (1, 1)

    @staticmethod
    def parse(text: str | None, sparsity: float | None = None) -> Pattern:
        """The pattern that `2:4` or `1x4` names; None is any places.

        Args:
            text: n:m, which says itself how much goes, or RxC.
            sparsity: fraction that goes, of an n:m at most what it says.

        Raises:
            UsageError: no such pattern, no sparsity where one is needed, or another than n:m's.
        """
        found = re.fullmatch(r"([0-9]{1,9})([:x])([0-9]{1,9})", "1x1" if text is None else text)
        if not found:
            raise UsageError("not a pattern", got=repr(text), allowed=_ALLOWED)
        first, second = int(found[1]), int(found[3])
        if found[2] == ":":
            if not 0 < first < second:
                raise UsageError("not a pattern", got=repr(text), allowed=_ALLOWED)
            said = 1 - first / second
            if sparsity is not None and abs(sparsity - said) > 1e-9:
                raise UsageError(
                    f"sparsity and pattern {text} disagree", got=f"{sparsity:g}",
                    allowed=f"{said:g}", next="leave the sparsity out",
                )  # fmt: skip
            return Pattern(said, first, second)
        if min(first, second) < 1:
            raise UsageError("not a pattern", got=repr(text), allowed=_ALLOWED)
        if sparsity is None:
            about = "no sparsity" if text is None else f"no sparsity for blocks of {text}"
            raise UsageError(about, next="pass --sparsity 0.5, or --pattern 2:4")
        if not 0 <= sparsity <= 1:
            raise UsageError("sparsity", got=sparsity, allowed="0 to 1, or 0% to 100%")
        return Pattern(sparsity, block=(first, second))

    @property
    def width(self) -> int:
        """Consecutive inputs that are decided on together."""
        return self.of or self.block[1]

    def mask(self, scores: Tensor, *, per_row: bool = False) -> Tensor:
        """The largest scores [out, in] that the pattern lets stay; see `unstructured`."""
        if self.of:
            return n_m(scores, self.kept, self.of)
        if self.block != (1, 1):
            return blocks(scores, self.sparsity, self.block, per_row)
        return unstructured(scores, self.sparsity, per_row)

    def leftover(self, out: int, inputs: int) -> str:
        """What of a weight [out, in] fills no group or block and stays; empty for nothing."""
        rows, columns = out % self.block[0], inputs % self.width
        parts = [f"the last {columns} of each row"] if columns else []
        parts += [f"the last {rows} rows"] if rows else []
        kind = f"group of {self.of}" if self.of else f"block of {self.block[0]}x{self.block[1]}"
        return f"{' and '.join(parts)} fill no {kind} and stay" if parts else ""

    def __str__(self) -> str:
        if self.of:
            return f"{self.kept}:{self.of}"
        each = "" if self.block == (1, 1) else f" in blocks of {self.block[0]}x{self.block[1]}"
        return f"{self.sparsity:.0%}{each}"


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


def blocks(
    scores: Tensor, sparsity: float, block: tuple[int, int], per_row: bool = False
) -> Tensor:
    """Mask that removes whole blocks, those with the least sums of scores.

    The last rows and columns, which fill no block, are all kept.

    Args:
        scores: [out, in].
        sparsity: fraction of the whole blocks removed, 0 to 1.
        block: outputs and inputs of a block.
        per_row: the same number in each row of blocks.

    Returns:
        bool [out, in], True is kept.

    Raises:
        UsageError: sparsity outside 0 to 1, or an empty block.
        InputError: NaN scores, or not a matrix.
    """
    _check(scores)
    high, wide = block
    if min(block) < 1:
        raise UsageError("block", got=f"{high}x{wide}", allowed="1x1 or more")
    rows, columns = scores.shape[0] // high, scores.shape[1] // wide
    whole = scores[: rows * high, : columns * wide]
    sums = whole.reshape(rows, high, columns, wide).sum((1, 3))  # [rows, columns]
    kept = unstructured(sums, sparsity, per_row)
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[: rows * high, : columns * wide] = kept.repeat_interleave(high, 0).repeat_interleave(
        wide, 1
    )
    return mask
