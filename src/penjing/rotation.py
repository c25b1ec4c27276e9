"""Rotation: an orthogonal change of basis of a layer's inputs, made from a size and a seed.

    x W^T = (x Q^T) (W Q^T)^T,    Q = (F_m kron H_(2^k)) diag(signs),    m * 2^k = in, m odd

(QuIP#, Tseng et al., arXiv 2402.04396; QuaRot, Ashkboos et al., arXiv 2404.00456.) Each entry of
W Q^T is a sum of `in` weights with random signs, so that a row looks Gaussian and has no outliers,
and codes with one scale a row do. H is Sylvester's Hadamard matrix over sqrt(2^k). No such matrix
exists of an odd size: F is the discrete Hartley matrix, cos + sin of 2 pi i j / m over sqrt(m),
orthogonal with no entry above sqrt(2 / m).

It is applied as two small products: x as a matrix [a, b] with a * b = in becomes L x R^T, where
L kron R is Q without its signs. That is in * (a + b) multiplications, a + b near 2 sqrt(in).
Nothing of it needs to be stored; signs are bits of SHAKE-256, the same on every machine.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penjing.errors import InputError

__all__ = ["Rotation", "possible"]

# Of an odd part: above, the products are no longer small.
_MOST_ODD = 512


def possible(size: int) -> bool:
    """Whether there is a rotation of `size` inputs: at least 2, odd part at most 512."""
    return size >= 2 and size // (size & -size) <= _MOST_ODD


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix Q [size, size] of a seed.

    Attributes:
        size: inputs.
        seed: of the signs, at least 0.

    Raises:
        InputError: a size that is not `possible`, or a seed that is no whole number from 0.
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.size) is not int or not possible(self.size):
            raise InputError(
                "size of a rotation", got=self.size,
                allowed=f"at least 2, with an odd part of at most {_MOST_ODD}",
            )  # fmt: skip
        if type(self.seed) is not int or self.seed < 0:
            raise InputError("seed of a rotation", got=self.seed, allowed="a whole number from 0")

    @property
    def signs(self) -> Tensor:
        """float64 [size] of -1 and 1."""
        return _signs(self.size, self.seed)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """L [a, a] and R [b, b], float64, orthogonal; Q = (L kron R) diag(signs)."""
        return _factors(self.size)

    def apply(self, x: Tensor) -> Tensor:
        """x Q^T for rows x [..., size], in the type of `x`."""
        left, right = (factor.to(x) for factor in self.factors)
        parts = (x * self.signs.to(x)).reshape(-1, len(left), len(right))  # [n, a, b]
        return (left @ (parts @ right.T)).reshape(x.shape)

    def inverse(self, x: Tensor) -> Tensor:
        """x Q for rows x [..., size], in the type of `x`: the inverse of `apply`."""
        left, right = (factor.to(x) for factor in self.factors)
        parts = x.reshape(-1, len(left), len(right))  # [n, a, b]
        return (left.T @ (parts @ right)).reshape(x.shape) * self.signs.to(x)

    def both(self, gram: Tensor) -> Tensor:
        """Q G Q^T for sums of outer products G [size, size]."""
        return self.apply(self.apply(gram).T).T


@functools.lru_cache(64)
def _signs(size: int, seed: int) -> Tensor:
    drawn = hashlib.shake_256(f"penjing {size} {seed}".encode()).digest(-(-size // 8))
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8))[:size]
    return torch.from_numpy(1.0 - 2.0 * bits)


@functools.lru_cache(64)
def _factors(size: int) -> tuple[Tensor, Tensor]:
    two = size & -size  # the largest power of two
    odd = size // two
    powers = [1 << k for k in range(two.bit_length())]
    right = min(powers, key=lambda b: size // b + b)
    return torch.kron(_hartley(odd), _hadamard(two // right)), _hadamard(right)


def _hadamard(size: int) -> Tensor:
    made = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(made) < size:
        made = torch.kron(pair, made)
    return made / math.sqrt(size)


def _hartley(size: int) -> Tensor:
    index = torch.arange(size)
    # The angle within one turn, so that large products lose nothing.
    angle = 2 * math.pi / size * (index.unsqueeze(1) * index % size).double()
    return (angle.cos() + angle.sin()) / math.sqrt(size)
