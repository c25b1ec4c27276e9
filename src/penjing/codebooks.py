"""Tables of small integers that need not be stored, because their name gives them.

power2-b  2**b numbers: 0, then +1, -1, +2, -2, +4, ...: the last power has no minus
e8-b      at most 2**b points of the lattice E8, doubled, around 0; zeros fill the rest
trellis-b 4,096 numbers spread like a Gaussian, for b bits a weight and a window of 12 / b codes
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math

import numpy as np
import torch
from torch import Tensor

from penjing.errors import InputError

__all__ = ["NAMES", "TRELLIS", "e8_index", "e8_orbits", "table"]

# Of doubled coordinates: seven shells, 199,921 points.
_MOST_NORM = 56
# Bits of an entry of a trellis' table, and the size of its Gaussian: 4,096 of them within int8.
TRELLIS = 12
_SIZE = 34.0


def _power2(bits: int) -> Tensor:
    numbers = [0]
    for power in range(2**bits // 2):
        numbers += [2**power, -(2**power)]
    return torch.tensor(numbers[: 2**bits], dtype=torch.int16).unsqueeze(1)


@functools.cache
def e8_orbits(bits: int) -> tuple[tuple[int, ...], ...]:
    """Leaders of the orbits of E8 that make its ball of at most 2**bits points.

    Coordinates are doubled, so all are whole, of one parity, and descending. An orbit is a
    leader's permutations with signs: any for even coordinates, where those of odd ones make
    a sum divisible by 4. Whole orbits are taken by norm, the largest of a shell first, while
    there is room.
    """
    found: list[tuple[int, int, tuple[int, ...]]] = []
    for odd in (0, 1):
        for leader in itertools.combinations_with_replacement(range(8 - odd, -1, -2), 8):
            norm = sum(v * v for v in leader)
            if norm > _MOST_NORM or (not odd and sum(leader) % 4):
                continue
            size = math.factorial(8)
            for v in set(leader):
                size //= math.factorial(leader.count(v))
            signs = 2**7 if odd else 2 ** sum(v > 0 for v in leader)
            found.append((norm, -size * signs, leader))
    left, taken = 2**bits, []
    for _, size, leader in sorted(found):
        if -size <= left:
            left += size
            taken.append(leader)
    return tuple(taken)


def _e8(bits: int) -> Tensor:
    parts = []
    for leader in e8_orbits(bits):
        orders = torch.tensor(sorted(set(itertools.permutations(leader))))
        signs = torch.cartesian_prod(*[torch.tensor([1, -1])] * 8)
        if leader[-1] % 2:
            minus = (signs < 0).sum(1) % 2
            signs = signs[minus == sum(leader) // 2 % 2]
        else:
            signs = signs[:1] if not any(leader) else signs
        points = (orders.unsqueeze(1) * signs).reshape(-1, 8)
        parts.append(torch.unique(points, dim=0))
    points = torch.cat(parts)
    # In the order of the coordinates, so that a point is found by bisection.
    points = points[_keys(points).argsort()]
    filled = torch.nn.functional.pad(points, (0, 0, 0, 2**bits - len(points)))
    return filled.to(torch.int8)


def _keys(points: Tensor) -> Tensor:
    return ((points.long() + 8) * 16 ** torch.arange(7, -1, -1)).sum(-1)


def e8_index(bits: int, points: Tensor) -> Tensor:
    """Codes [...] in the table `e8-bits` of points [..., 8] that are there."""
    keys, count = _e8_keys(bits)
    return torch.searchsorted(keys[:count], _keys(points))


@functools.cache
def _e8_keys(bits: int) -> tuple[Tensor, int]:
    points = table(f"e8-{bits}")
    keys = _keys(points)
    # Behind the points are zeros that fill the table.
    ahead = (keys[1:] > keys[:-1]).long()
    return keys, int(ahead.cumprod(0).sum()) + 1


def _trellis(bits: int) -> Tensor:
    """Quantiles of a Gaussian at the middles of 4,096 equal shares, in a random order.

    Of the 2**bits entries that one walk can go on to there is one from each 2**bits-th part of
    the line, so that none of them is a choice between neighbours (Ungerboeck's rule for trellis
    codes); with any order the error is 2 % (2 bits) to 8 % (4 bits) larger.
    """
    ways, nodes = 2**bits, 2 ** (TRELLIS - bits)
    words = hashlib.shake_256(f"penjing trellis {bits}".encode()).digest(16 * ways * nodes)
    drawn = np.frombuffer(words, "<u8").reshape(2, ways, nodes)
    middle = (torch.arange(ways * nodes, dtype=torch.float64) + 0.5) / (ways * nodes)
    values = torch.special.ndtri(middle).reshape(ways, nodes)
    # Which of its part each node gets, then in which order.
    values = values.gather(1, torch.from_numpy(drawn[0].argsort(1, kind="stable")))
    values = values.gather(0, torch.from_numpy(drawn[1].argsort(0, kind="stable")))
    rounded: Tensor = (_SIZE * values.T).round().to(torch.int8)  # [nodes, ways]
    return rounded.reshape(-1, 1)


_MAKERS = {f"power2-{bits}": functools.partial(_power2, bits) for bits in (2, 3, 4)}
_MAKERS |= {f"e8-{bits}": functools.partial(_e8, bits) for bits in (8, 12, 14, 16)}
_MAKERS |= {f"trellis-{bits}": functools.partial(_trellis, bits) for bits in (1, 2, 3, 4)}
NAMES = tuple(_MAKERS)


@functools.cache
def table(name: str) -> Tensor:
    """The table [entries, dim] of this name, int8 or int16; not to be written to.

    Raises:
        InputError: an unknown name.
    """
    if name not in _MAKERS:
        raise InputError("name of a codebook", got=repr(name), allowed=", ".join(NAMES))
    return _MAKERS[name]()
