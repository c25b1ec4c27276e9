"""E8: eight weights are a point of the densest lattice in eight dimensions, within a ball.

    w[o, 8j : 8j + 8] = scale[o, g] * point,   point in E8 = D8 or D8 + 1/2

(QuIP#, Tseng et al., arXiv 2402.04396.) At most 2**16 points make 2 bits a weight; smaller balls
1, 1.5 and 1.75; from 2.5 on a second ball codes what the first left. The tables are known by their
names and not stored. It wants weights that look Gaussian, that is a rotation before.

The nearest point of an orbit (a leader's permutations and signs) has its magnitudes in the order
of the target's; of all orbits' nearest points the one of least e M e^T is taken.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from penjing import codebooks, grids
from penjing.errors import UsageError
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _vector
from penjing.quantizers._vector import DIM, Vectors

__all__ = ["families", "fit", "needs"]

needs = frozenset({"gram"})
families = frozenset({"e8"})

# Bits of a weight: widths of the balls that are summed.
_BALLS = {
    1: (8,), 1.5: (12,), 1.75: (14,), 2: (16,),
    2.5: (12, 8), 2.75: (14, 8), 3: (16, 8), 3.5: (16, 12), 3.75: (16, 14), 4: (16, 16),
}  # fmt: skip
_SAMPLE = 4096


def _orbits(x: Tensor, bits: int) -> Tensor:
    """The nearest point of every orbit to x [n, 8], doubled: [n, orbits, 8]."""
    leaders = torch.tensor(codebooks.e8_orbits(bits), dtype=torch.float32)  # [orbits, 8]
    order = x.abs().argsort(1, descending=True)
    sign = torch.where(x < 0, -1.0, 1.0)
    odd = leaders[:, 7] % 2 == 1
    # In D8 + 1/2 the sum must be even: one sign may be wrong, the cheapest is the last's.
    minus = (sign < 0).sum(1, keepdim=True)  # [n, 1]
    wrong = odd & ((minus - leaders.sum(1).long() // 2) % 2 == 1)  # [n, orbits]
    placed = leaders.expand(len(x), -1, -1).clone()
    placed[..., 7] = torch.where(wrong, -placed[..., 7], placed[..., 7])
    back = order.argsort(1).unsqueeze(1).expand(-1, len(leaders), -1)
    return placed.gather(2, back) * sign.unsqueeze(1)


def nearest(x: Tensor, bits: int, metric: Tensor) -> Tensor:
    """Points [n, 8], doubled, of the ball `e8-bits` for x [n, 8] in the same units.

    Exact for a metric that is a multiple of the identity.
    """
    points = _orbits(x, bits)
    off = points - x.unsqueeze(1)
    cost = ((off @ metric) * off).sum(2)  # [n, orbits]
    best = cost.argmin(1)[:, None, None].expand(-1, 1, DIM)
    return points.gather(1, best).squeeze(1)


class _E8:
    shared = False
    hasty = False

    def __init__(self, balls: tuple[int, ...]) -> None:
        self.balls = balls
        tables = [codebooks.table(f"e8-{bits}") for bits in balls]
        most = max(len(t) for t in tables)
        self.stored = torch.stack(
            [torch.nn.functional.pad(t, (0, 0, 0, most - len(t))) for t in tables]
        )
        self.tables = self.stored.float()

    def choose(self, target: Tensor, scale: Tensor, metric: Tensor, now: Tensor | None) -> Tensor:
        codes, left = [], target
        for bits, own in zip(self.balls, scale.unsqueeze(2), strict=True):
            points = nearest(left / own, bits, metric)
            codes.append(codebooks.e8_index(bits, points))
            left = left - own * points
        return torch.stack(codes)

    def learn(self, weight: Tensor, found: Vectors, gram: Tensor) -> None:
        pass

    def freeze(self, found: Vectors) -> None:
        pass


@functools.cache
def _start(balls: tuple[int, ...]) -> Tensor:
    """Scales [planes] of least squared error on a standard Gaussian, ball after ball."""
    left = torch.randn(_SAMPLE, DIM, generator=torch.Generator().manual_seed(0))
    eye, found = torch.eye(DIM), []
    for bits in balls:
        size = float(left.square().mean().sqrt())
        errors = []
        for step in range(24):
            scale = size * 0.2 * 1.06**step
            made = scale * nearest(left / scale, bits, eye)
            errors.append((float((left - made).square().mean()), scale))
        scale = min(errors)[1]
        found.append(scale)
        left = left - scale * nearest(left / scale, bits, eye)
    return torch.tensor(found)


def fit(weight: Tensor, scheme: Scheme, stats: Any = None, *, rounds: int = 3) -> IntegerPlanes:
    """Fit points of one or two balls.

    Args:
        weight: [out, in].
        scheme: bits 1, 1.5, 1.75, 2, 2.5, 2.75, 3, 3.5, 3.75 or 4, group 0 or a multiple of 8,
            scale_bits; there is no shift.
        stats: its `gram` [in, in]; without one every eight weights are independent.
        rounds: refits and passes of coordinate descent after the feedback.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width.
        UsageError: other bits, or a group that is no multiple of 8.
    """
    weight = grids.check_weight(weight)
    if scheme.bits not in _BALLS:
        allowed = ", ".join(f"{bits:g}" for bits in _BALLS)
        raise UsageError("bits of e8 codes", got=scheme.bits, allowed=allowed)
    balls = _BALLS[scheme.bits]
    code = _E8(balls)
    found = _vector.fit(weight, code, _start(balls), scheme, stats, rounds=rounds)
    return IntegerPlanes(
        found.codes.to(torch.int32 if max(balls) > 8 else torch.uint8),
        balls,
        found.scale,
        torch.zeros_like(found.scale[0]),
        found.group,
        tuple(weight.shape),
        tables=code.stored,
        table_names=tuple(f"e8-{bits}" for bits in balls),
        scale_bits=scheme.scale_bits,
        offset="centre",
        centre=(0.0,) * len(balls),
    )
