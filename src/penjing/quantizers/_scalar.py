"""Weights as scaled sums of a few small integers: one fit for every such family.

    w[o, i] = sum over k of scale[k, o, g(i)] * A[k, l] + shift[o, g(i)],  l = index[o, i]

The alphabet A [planes, levels] says which integers each level is made of: binary A = (-1/2, 1/2),
all combinations of the planes. In turn: nearest levels, then the scales that are best for them.

    start      scales of the code that is optimal for a Gaussian, then alternating least squares
    feedback   `_feedback.run` on those levels
    refit      argmin over scales of tr((W - Q) H (W - Q)^T), every row alone, closed form
    polish     coordinate descent over the codes; refit and polish again, never worse
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _feedback
from penjing.quantizers._refit import solve
from penjing.scales import centred, round_scales

__all__ = ["Levels", "alphabet", "begin", "fit", "gaussian_scales", "refit", "rounded", "to_planes"]

# Alternations of the start; after some eight it changes little.
_STEPS = 8
# Of the sizes of one plane and the next, tried as starts of the Gaussian code.
_RATIOS = (1.2, 1.6, 2.0, 2.6, 3.2, 4.0, 8.0, 16.0)


def alphabet(planes: list[list[float]]) -> Tensor:
    """All combinations of the values of each plane: float32 [planes, levels].

    The last plane changes fastest.
    """
    return torch.tensor(list(itertools.product(*planes)), dtype=torch.float32).T.contiguous()


@dataclass(frozen=True, eq=False)
class Levels:
    """A fitted weight: index [out, in] of the level, scale [planes, out, groups], shift.

    `shift` is [out, groups], and zero where none was asked for; `stored` the shift of the
    unsigned codes, once it is rounded.
    """

    index: Tensor
    scale: Tensor
    shift: Tensor
    alphabet: Tensor
    group: int
    stored: Tensor | None = None

    def table(self) -> Tensor:
        """What each level stands for, [groups, levels, out]."""
        table = torch.einsum("kog,kl->glo", self.scale, self.alphabet)
        return table + self.shift.T.unsqueeze(1)

    def spread(self, per_group: Tensor) -> Tensor:
        """[..., groups] to [..., in]."""
        return per_group.repeat_interleave(self.group, dim=-1)[..., : self.index.shape[1]]

    def parts(self) -> Tensor:
        """A of each weight, [planes, out, in]."""
        return self.alphabet[:, self.index.long()]

    def dequantize(self) -> Tensor:
        """[out, in]."""
        return (self.spread(self.scale) * self.parts()).sum(0) + self.spread(self.shift)


@functools.lru_cache
def _gaussian(rows: tuple[tuple[float, ...], ...]) -> Tensor:
    letters = torch.tensor(rows, dtype=torch.float64)  # [planes, levels]
    many = letters.shape[1] > 32
    count = 500 if many else 2000
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    points = torch.special.ndtri(middle)
    best, least = letters.new_ones(len(rows)), torch.inf
    width = float(letters.amax() - letters.amin()) or 1.0
    for ratio, size in itertools.product(_RATIOS, (1.5, 2.5, 4.0)):
        scale = size / width * ratio ** -torch.arange(len(rows), dtype=torch.float64)
        for _ in range(15 if many else 60):
            chosen = (points.unsqueeze(1) - scale @ letters).abs().argmin(1)
            made = letters[:, chosen]  # [planes, points]
            normal = made @ made.T + 1e-9 * torch.eye(len(rows), dtype=torch.float64)
            scale = torch.linalg.solve(normal, made @ points + 1e-9 * scale)
        error = float((points.unsqueeze(1) - scale @ letters).abs().amin(1).square().mean())
        if error < least - 1e-12:
            best, least = scale, error
    return best.float()


def gaussian_scales(letters: Tensor) -> Tensor:
    """Scales [planes] of the code with the least squared error on a standard Gaussian."""
    return _gaussian(tuple(tuple(row) for row in letters.tolist()))


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    # values [..., out], table [levels, out]; few levels, so one comparison a level is fastest.
    best = (values - table[0]).abs()
    index = torch.zeros(values.shape, dtype=torch.uint8)
    for level in range(1, len(table)):
        off = (values - table[level]).abs()
        index.masked_fill_(off < best, level)
        torch.minimum(best, off, out=best)
    return index


def _all_nearest(weight: Tensor, levels: Levels) -> Levels:
    table = levels.table()
    index = torch.empty_like(levels.index)
    for g, own in enumerate(table):
        columns = slice(g * levels.group, (g + 1) * levels.group)
        index[:, columns] = _nearest(weight[:, columns].T, own).T
    return replace(levels, index=index)


def _assigner(levels: Levels, index: Tensor, held: bool = False) -> _feedback.Assign:
    """Nearest level of each column; writes the index [out, in] in place.

    With `held` only the last plane's bit is free.
    """
    table = levels.table()

    def assign(columns: Tensor, place: int) -> Tensor:
        own = table[place // levels.group]  # [levels, out]
        if held:
            base = index[:, place] // 2 * 2
            pair = torch.stack([base, base + 1]).long()
            chosen = pair.gather(0, _nearest(columns.T, own.gather(0, pair)).long())
        else:
            chosen = _nearest(columns.T, own).long()  # [1, out]
        index[:, place] = chosen[0].to(index.dtype)
        return own.gather(0, chosen).T

    return assign


def begin(weight: Tensor, letters: Tensor, group: int, importance: Tensor, shift: bool) -> Levels:
    """The Gaussian code at each group's size, then alternating least squares.

    Args:
        weight: [out, in].
        letters: [planes, levels].
        importance: [in], of each column's squared error.
        shift: fit shifts too.
    """
    out, inputs = weight.shape
    groups = -(-inputs // group) if inputs else 0
    levels = Levels(
        torch.zeros(out, inputs, dtype=torch.uint8),
        torch.zeros(len(letters), out, groups),
        torch.zeros(out, groups),
        letters,
        group,
    )
    if not weight.numel():
        return levels
    pad = (0, groups * group - inputs)
    parts = torch.nn.functional.pad(weight, pad).reshape(out, groups, group)
    count = torch.nn.functional.pad(torch.ones(inputs), pad).reshape(groups, group)
    middle = parts.sum(-1) / count.sum(-1) if shift else levels.shift
    size = ((parts - middle.unsqueeze(-1)).square() * count).sum(-1) / count.sum(-1)
    scale = gaussian_scales(letters)[:, None, None] * size.sqrt()
    levels = _all_nearest(weight, replace(levels, scale=scale, shift=middle))
    for _ in range(_STEPS):
        levels = _all_nearest(weight, refit(weight, levels, importance, shift))
    return levels


def rounded(levels: Levels, bits: int, centre: Tensor, shift: bool) -> Levels:
    """Scales and stored shifts (those of unsigned codes) as `bits` bits hold them.

    Args:
        centre: [planes], what an unsigned code is above its letter.
    """
    scale = round_scales(levels.scale, bits)
    if not shift:
        return replace(levels, scale=scale)
    below = centred(scale, tuple(centre.tolist()))
    stored = round_scales(levels.shift + below, bits, signed=True)
    return replace(levels, scale=scale, shift=stored - below, stored=stored)


def fit(
    weight: Tensor,
    letters: Tensor,
    scheme: Scheme,
    stats: Any,
    *,
    centre: Tensor | None = None,
    rounds: int = 3,
    damping: float = 0.01,
) -> Levels:
    """Fit the whole: start, feedback, then `rounds` times refit and polish.

    Without a Gram matrix columns are independent, and alternating least squares is all.

    Args:
        weight: [out, in].
        letters: [planes, levels].
        scheme: its group, symmetric (no shift) and scale_bits.
        stats: its `gram`.
        centre: [planes], see `rounded`; zeros without.

    Returns:
        Levels with scales as they are stored, none below 0.

    Raises:
        InputError: a Gram matrix of another width, or not finite.
    """
    gram = _feedback.check_gram(weight, stats)
    group, shift = scheme.group_of(weight.shape[1]), not scheme.symmetric
    centre = torch.zeros(len(letters)) if centre is None else centre
    if gram is None or not weight.numel():
        levels = begin(weight, letters, group, torch.ones(weight.shape[1]), shift)
        return _all_nearest(weight, rounded(levels, scheme.scale_bits, centre, shift))
    smooth = _feedback.damped(gram, damping=damping)
    levels = begin(weight, letters, group, smooth.diagonal(), shift)
    index = levels.index.clone()
    _feedback.run(weight, gram, _assigner(levels, index), damping=damping)
    levels = replace(levels, index=index)
    for last in [False] * rounds + [True]:
        levels = refit(weight, levels, smooth, shift)
        if last:
            levels = rounded(levels, scheme.scale_bits, centre, shift)
        index = levels.index.clone()
        _feedback.polish(weight, levels.dequantize(), smooth, _assigner(levels, index))
        levels = replace(levels, index=index)
    return levels


def refit(weight: Tensor, levels: Levels, gram: Tensor, shift: bool) -> Levels:
    """The scales, and shifts where asked, of least error for the codes that are there.

    Args:
        weight: [out, in].
        gram: damped H [in, in], or a diagonal [in] to take columns as independent.
        shift: fit shifts too.
    """
    planes, start = len(levels.scale), levels.scale
    if shift:
        start = torch.cat([start, levels.shift.unsqueeze(0)])

    def basis(rows: slice) -> Tensor:
        parts = levels.alphabet[:, levels.index[rows].long()]  # [planes, out, in]
        return torch.cat([parts, torch.ones_like(parts[:1])]) if shift else parts

    found = solve(weight, basis, start, levels.group, gram, planes)
    return replace(levels, scale=found[:planes], shift=found[planes] if shift else levels.shift)


def extend(
    weight: Tensor,
    levels: Levels,
    letters: Tensor,
    scheme: Scheme,
    stats: Any,
    *,
    centre: Tensor,
    rounds: int = 3,
    damping: float = 0.01,
) -> Levels:
    """One more plane of one bit: the codes that are there stay, all scales are fitted anew.

    Args:
        weight: [out, in].
        levels: fitted planes.
        letters: [planes + 1, levels * 2], the new plane changing fastest.
        scheme, stats, centre, rounds, damping: as in `fit`.
    """
    gram = _feedback.check_gram(weight, stats)
    shift = not scheme.symmetric
    # What the planes leave is coded by its sign, the best size of which is twice its mean.
    left = (weight - levels.dequantize()).abs()
    pad = (0, levels.shift.shape[1] * levels.group - weight.shape[1])
    ones = torch.nn.functional.pad(torch.ones(weight.shape[1]), pad).reshape(-1, levels.group)
    size = torch.nn.functional.pad(left, pad).reshape(len(weight), -1, levels.group).sum(-1)
    scale = torch.cat([levels.scale, (2 * size / ones.sum(-1)).unsqueeze(0)])
    levels = replace(levels, index=levels.index * 2, scale=scale, alphabet=letters, stored=None)
    if not weight.numel():
        return replace(levels, stored=levels.shift) if shift else levels
    smooth = None if gram is None else _feedback.damped(gram, damping=damping)
    held = torch.ones(weight.shape[1]) if smooth is None else smooth
    for turn in range(rounds + 2):
        if turn:
            levels = refit(weight, levels, held, shift)
        if turn == rounds + 1:
            levels = rounded(levels, scheme.scale_bits, centre, shift)
        index = levels.index.clone()
        assign = _assigner(levels, index, held=True)
        if gram is None or smooth is None:
            for place in range(weight.shape[1]):
                assign(weight[:, place : place + 1], place)
        elif not turn:
            _feedback.run(weight, gram, assign, damping=damping)
        else:
            _feedback.polish(weight, levels.dequantize(), smooth, assign)
        levels = replace(levels, index=index)
    return levels


def to_planes(
    levels: Levels, sizes: list[int], bits: list[float], scheme: Scheme, centre: Tensor
) -> IntegerPlanes:
    """Levels as planes of unsigned codes.

    Args:
        sizes: values of each plane; the last changes fastest in the alphabet.
        bits: of each plane.
        scheme: its symmetric and scale_bits.
        centre: [planes], what an unsigned code is above its letter.
    """
    codes = []
    left = levels.index
    for size in reversed(sizes):
        codes.append(left % size)
        left = left // size
    middle = tuple(centre.tolist())
    below = centred(levels.scale, middle)
    return IntegerPlanes(
        torch.stack(codes[::-1]),
        tuple(int(b) if b == int(b) else b for b in bits),
        levels.scale,
        below if levels.stored is None else levels.stored,
        levels.group,
        tuple(levels.index.shape),
        scale_bits=scheme.scale_bits,
        offset="centre" if scheme.symmetric else "float",
        centre=middle if scheme.symmetric else (),
    )
