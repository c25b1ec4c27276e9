"""Weights as looked-up vectors of 8 integers: one fit for lattices and for learned codebooks.

    w[o, 8j : 8j + 8] = sum over k of scale[k, o, g] * T_k[codes[k, o, j]]

Start, feedback eight columns at a time (`_feedback.run`), then rounds of least squares for the
scales, and for the tables where they are learned, and coordinate descent over the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from penjing.errors import UsageError
from penjing.planes import Scheme
from penjing.quantizers import _feedback
from penjing.quantizers._refit import solve
from penjing.scales import round_scales

__all__ = ["DIM", "Code", "Vectors", "fit"]

DIM = 8
_FACTORS = (1.0, 0.85, 1.2, 1.5, 2.0, 2.8, 4.0, 6.0)


@dataclass(eq=False)
class Vectors:
    """A weight under way: codes int64 [planes, out, places], scale [planes, out, groups]."""

    codes: Tensor
    scale: Tensor
    group: int
    inputs: int

    def at(self, place: int) -> Tensor:
        """Scales [planes, out] at a place."""
        return self.scale[..., place * DIM // self.group]

    def values(self, tables: Tensor, rows: slice = slice(None)) -> Tensor:
        """What every plane looks up, [planes, out, in], before the scale."""
        found = [table[codes[rows]] for table, codes in zip(tables, self.codes, strict=True)]
        return torch.stack(found).flatten(2)[..., : self.inputs]

    def dequantize(self, tables: Tensor) -> Tensor:
        """[out, in]."""
        scale = self.scale.repeat_interleave(self.group, dim=-1)[..., : self.inputs]
        return (scale * self.values(tables)).sum(0)


class Code(Protocol):
    """What a family defines.

    Attributes:
        tables: float32 [planes, entries, 8].
        shared: all planes have one scale.
        hasty: a quick choice will do.
    """

    tables: Tensor
    shared: bool
    hasty: bool

    def choose(self, target: Tensor, scale: Tensor, metric: Tensor, now: Tensor | None) -> Tensor:
        """Codes [planes, out] for targets [out, 8], scales [planes, out], metric [8, 8].

        `now` are the codes that are there; what is given back need not be better.
        """

    def learn(self, weight: Tensor, found: Vectors, gram: Tensor) -> None:
        """Better tables for the codes that are there; a fixed table stays."""

    def freeze(self, found: Vectors) -> None:
        """Make the tables integers."""


def value(tables: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Sum of the planes' vectors [out, 8] for codes [planes, out], scales [planes, out]."""
    looked = [table[own] for table, own in zip(tables, codes, strict=True)]
    return (torch.stack(looked) * scale.unsqueeze(-1)).sum(0)


def _assigner(
    code: Code, found: Vectors, metrics: _feedback.Factor | Tensor, keep: bool
) -> _feedback.Assign:
    def assign(columns: Tensor, place: int) -> Tensor:
        own = slice(place * DIM, (place + 1) * DIM)
        metric = metrics[own, own] if isinstance(metrics, Tensor) else metrics.metric(place)
        scale, now = found.at(place), found.codes[..., place]
        safe = torch.where(scale > 0, scale, 1.0)
        codes = code.choose(columns, safe, metric, now if keep else None)
        made = value(code.tables, codes, scale)
        if keep:
            before = value(code.tables, now, scale)
            off, was = columns - made, columns - before
            better = _feedback.loss(off, metric) < _feedback.loss(was, metric)
            codes = torch.where(better, codes, now)
            made = torch.where(better.unsqueeze(1), made, before)
        found.codes[..., place] = codes
        return made

    return assign


def _widen(weight: Tensor, code: Code, found: Vectors, importance: Tensor) -> None:
    """The start's scales times what is best for each group: outliers that matter are not cut.

    importance is [padded in].
    """
    code.hasty = True
    first, least = found.scale, torch.full(found.scale.shape[1:], torch.inf)
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % DIM))
    for factor in _FACTORS:
        scale = first * factor
        error = torch.zeros_like(least)
        for place in range(found.codes.shape[2]):
            own = slice(place * DIM, (place + 1) * DIM)
            group = place * DIM // found.group
            target, held = padded[:, own], scale[..., group]
            weights = importance[own]
            safe = torch.where(held > 0, held, 1.0)
            codes = code.choose(target, safe, torch.diag(weights), None)
            off = value(code.tables, codes, held) - target
            error[:, group] += off.square() @ weights
        better = error < least
        found.scale = torch.where(better, scale, found.scale)
        least = torch.where(better, error, least)
    code.hasty = False


def _rescale(weight: Tensor, code: Code, found: Vectors, gram: Tensor) -> None:
    def basis(rows: slice) -> Tensor:
        values = found.values(code.tables, rows)
        return values.sum(0, keepdim=True) if code.shared else values

    start = found.scale[:1] if code.shared else found.scale
    scale = solve(weight, basis, start, found.group, gram, len(start))
    found.scale = scale.expand_as(found.scale).contiguous()


def fit(
    weight: Tensor,
    code: Code,
    start: Tensor,
    scheme: Scheme,
    stats: Any,
    *,
    rounds: int = 3,
    damping: float = 0.01,
) -> Vectors:
    """Fit codes and scales, and the code's tables where it learns.

    Args:
        weight: [out, in]; a last place that is not full is padded and cut again.
        code: the family.
        start: first scales [planes], of a group with a root mean square of 1.
        scheme: its group, 0 or a multiple of 8, and scale_bits.
        stats: its `gram`; without one every place is independent.

    Raises:
        UsageError: a group that is no multiple of 8.
        InputError: a Gram matrix of another width, or not finite.
    """
    out, inputs = weight.shape
    if scheme.group % DIM:
        raise UsageError("group of vector codes", got=scheme.group, allowed="0 or a multiple of 8")
    gram = _feedback.check_gram(weight, stats)
    group = scheme.group_of(inputs)
    places, groups = -(-inputs // DIM), -(-inputs // group) if inputs else 0
    codes = torch.zeros(len(start), out, places, dtype=torch.int64)
    found = Vectors(codes, torch.zeros(len(start), out, groups), group, inputs)
    if not weight.numel():
        code.freeze(found)
        return found
    pad = (0, groups * group - inputs)
    squares = torch.nn.functional.pad(weight.square(), pad).reshape(out, groups, group)
    count = torch.nn.functional.pad(torch.ones(inputs), pad).reshape(groups, group)
    found.scale = start[:, None, None] * (squares.sum(2) / count.sum(1)).sqrt()
    smooth = _feedback.damped(torch.eye(inputs) if gram is None else gram, DIM, damping)
    _widen(weight, code, found, smooth.diagonal())
    if gram is None:
        _feedback.polish(
            weight, found.dequantize(code.tables), smooth, _assigner(code, found, smooth, False),
            width=DIM,
        )  # fmt: skip
    else:
        made = _feedback.factor(gram, width=DIM, damping=damping)
        _feedback.run(weight, made, _assigner(code, found, made, False))
    inner = smooth[:inputs, :inputs]
    for turn in range(rounds + 1):
        code.learn(weight, found, inner)
        if turn == rounds:
            code.freeze(found)
        _rescale(weight, code, found, inner)
        if turn == rounds:
            scale = found.scale[:1] if code.shared else found.scale
            found.scale = round_scales(scale, scheme.scale_bits).expand_as(found.scale)
        _feedback.polish(
            weight, found.dequantize(code.tables), smooth, _assigner(code, found, smooth, True),
            width=DIM,
        )  # fmt: skip
    return found
