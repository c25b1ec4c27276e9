"""Trellis codes: a weight is looked up by its own code and those of the weights above it.

    w[o, i] = scale[o, g] * T[codes[o, i], codes[o - 1, i], ..., codes[o - W + 1, i]]

(QTIP, Tseng et al., arXiv 2406.11235: the bitshift trellis.) With k bits a weight and W = 12 / k an
entry has 12 bits, and a column is a walk through 2**(12 - k) nodes with 2**k ways on from each, so
that many weights are coded together at k bits each. The table is known by its name and not stored.
It wants weights that look Gaussian, that is a rotation before.

A walk goes down the outputs, not along the inputs: error feedback, which takes one input after
the other, then meets whole columns, whose errors all have one weight. A column starts from codes
0, with its end open; that is as many columns as a walk that bites its tail has, and the best one is
found exactly (`walk`). `_WIDTH` columns are walked at once, what they share in H left aside.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penjing import codebooks, grids
from penjing.errors import UsageError
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _feedback
from penjing.quantizers._refit import solve
from penjing.scales import round_scales

__all__ = ["families", "fit", "needs", "walk"]

needs = frozenset({"gram"})
families = frozenset({"trellis"})

_WIDTH = 4
# Outputs walked before a way is fixed: bounds the memory of the nodes' costs.
_STEPS = 4096
# Of a Gaussian's size, the scale of least error; refitted later.
_START = {1: 0.94, 2: 1.0, 3: 1.0, 4: 1.0}


def walk(x: np.ndarray, root: np.ndarray, table: np.ndarray, bits: int, node: np.ndarray) -> Any:
    """The walks of least squared error (Viterbi's algorithm).

    Args:
        x: float32 [walks, steps].
        root: float32 [steps], what an error is multiplied by before it is squared.
        table: float32 [entries]; entry = node * 2**bits + code, and its lower part the next node.
            There are at least 2**bits nodes.
        bits: of a code.
        node: int64 [walks], where each walk starts.

    Returns:
        Entries, int64 [walks, steps].
    """
    by_code = np.ascontiguousarray(table.reshape(-1, 2**bits).T)
    return _compiled()(x, root, by_code, node)


@functools.cache
def _compiled() -> Any:
    import numba

    return numba.njit(_viterbi)


def _viterbi(x: Any, root: Any, by_code: Any, node: Any) -> Any:
    # by_code [ways, nodes]. A node is a walk's oldest code (its lane) and the others (its place).
    walks, steps = x.shape
    ways, nodes = by_code.shape
    places = nodes // ways
    entries = np.empty((walks, steps), np.int64)
    lanes = np.empty((steps, ways, places), np.uint8)
    cost, after = np.empty(nodes, np.float32), np.empty(nodes, np.float32)
    for walk in range(walks):
        cost[:] = np.inf
        cost[node[walk]] = 0
        for j in range(steps):
            size, target = root[j], x[walk, j] * root[j]
            for way in range(ways):
                own, best = by_code[way], lanes[j, way]
                best[:] = 0
                least = np.full(places, np.inf, np.float32)
                for lane in range(ways):
                    for place in range(places):
                        before = lane * places + place
                        error = target - own[before] * size
                        total = error * error + cost[before]
                        if total < least[place]:
                            least[place], best[place] = total, lane
                after[way::ways] = least
            cost, after = after, cost
        end = cost.argmin()
        for j in range(steps - 1, -1, -1):
            place, way = divmod(end, ways)
            end = lanes[j, way, place] * places + place
            entries[walk, j] = end * ways + way
    return entries


class _Walker:
    """Codes [out, padded in] and scales [out, groups] of a weight under way."""

    def __init__(self, out: int, inputs: int, scale: Tensor, group: int, bits: int) -> None:
        self.bits, self.group, self.scale = bits, group, scale
        self.table = codebooks.table(f"trellis-{bits}").float().flatten()
        self._numbers = self.table.numpy()
        self.entries = torch.zeros(out, inputs + -inputs % _WIDTH, dtype=torch.int64)

    def values(self, inputs: int) -> Tensor:
        """What the entries stand for before the scale, [out, in]."""
        return self.table[self.entries[:, :inputs]]

    def refit(self, weight: Tensor, gram: Tensor, scale_bits: int) -> None:
        """The scales of least error for the codes that are there, as they are stored."""
        values = self.values(weight.shape[1])

        def basis(rows: slice) -> Tensor:
            return values[rows].unsqueeze(0)

        found = solve(weight, basis, self.scale.unsqueeze(0), self.group, gram, 1)[0]
        self.scale = round_scales(found, scale_bits)

    def choose(self, columns: Tensor, place: int) -> Tensor:
        """Walk down the columns [out, 4] of a place; gives back what they are then."""
        scale = self.scale[:, min(place * _WIDTH // self.group, self.scale.shape[1] - 1)]
        safe = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
        x = (columns / safe).T.contiguous().numpy()  # [4, out]
        root = (scale / scale.mean().clamp_min(1e-30)).numpy()
        nodes = len(self.table) >> self.bits
        node, found = np.zeros(_WIDTH, np.int64), []
        for start in range(0, len(root), _STEPS):
            own = slice(start, start + _STEPS)
            found.append(walk(x[:, own], root[own], self._numbers, self.bits, node))
            node = found[-1][:, -1] % nodes
        entries = torch.from_numpy(np.concatenate(found, 1)).T
        self.entries[:, place * _WIDTH : (place + 1) * _WIDTH] = entries
        return self.table[entries] * scale.unsqueeze(1)

    def better(self, gram: Tensor) -> _feedback.Assign:
        """`choose` where the place's error under H does not grow, else what is there."""

        def assign(columns: Tensor, place: int) -> Tensor:
            own = slice(place * _WIDTH, (place + 1) * _WIDTH)
            kept = self.entries[:, own].clone()
            scale = self.scale[:, min(own.start // self.group, self.scale.shape[1] - 1)]
            was = self.table[kept] * scale.unsqueeze(1)
            made = self.choose(columns, place)
            near = gram[own, own]
            if (
                _feedback.loss(columns - made, near).sum()
                <= _feedback.loss(columns - was, near).sum()
            ):
                return made
            self.entries[:, own] = kept
            return was

        return assign


def fit(weight: Tensor, scheme: Scheme, stats: Any = None, *, rounds: int = 1) -> IntegerPlanes:
    """Fit one plane of codes with a table of 4,096 numbers.

    Args:
        weight: [out, in].
        scheme: bits 1 to 4, group 0 or a multiple of 4, scale_bits; there is no shift.
        stats: its `gram` [in, in]; without one columns are independent.
        rounds: refits of the scales and passes of coordinate descent after the feedback; the time
            of each is that of the feedback.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width.
        UsageError: other bits, or a group that is no multiple of 4.
    """
    weight = grids.check_weight(weight)
    out, inputs = weight.shape
    if scheme.bits not in _START:
        raise UsageError("bits of trellis codes", got=scheme.bits, allowed="1, 2, 3 or 4")
    bits = int(scheme.bits)
    if scheme.group % _WIDTH:
        raise UsageError("group of trellis codes", got=scheme.group, allowed="0 or a multiple of 4")
    gram = _feedback.check_gram(weight, stats)
    group = scheme.group_of(inputs)
    groups = -(-inputs // group) if inputs else 0
    pad = (0, groups * group - inputs)
    squares = torch.nn.functional.pad(weight.square(), pad).reshape(out, groups, group).sum(2)
    count = torch.nn.functional.pad(torch.ones(inputs), pad).reshape(groups, group).sum(1)
    size = float(codebooks.table(f"trellis-{bits}").float().square().mean().sqrt())
    scale = _START[bits] / size * (squares / count).sqrt()
    scale = round_scales(scale, scheme.scale_bits)
    found = _Walker(out, inputs, scale, group, bits)
    if weight.numel():
        gram = torch.eye(inputs, dtype=torch.float64) if gram is None else gram
        _feedback.run(weight, _feedback.factor(gram, width=_WIDTH), found.choose)
        smooth = _feedback.damped(gram, _WIDTH)
        for _ in range(rounds):
            found.refit(weight, smooth[:inputs, :inputs], scheme.scale_bits)
            wide = grids.spread(found.scale, group, inputs)
            _feedback.polish(
                weight, found.values(inputs) * wide, smooth, found.better(smooth), width=_WIDTH
            )
    return IntegerPlanes(
        (found.entries[:, :inputs] % 2**bits).to(torch.uint8).unsqueeze(0),
        (bits,),
        found.scale.unsqueeze(0),
        torch.zeros_like(found.scale),
        group,
        (out, inputs),
        tables=codebooks.table(f"trellis-{bits}").unsqueeze(0),
        table_names=(f"trellis-{bits}",),
        window=codebooks.TRELLIS // bits,
        scale_bits=scheme.scale_bits,
        offset="centre",
        centre=(0.0,),
    )
