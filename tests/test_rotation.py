"""Rotations against dense matrices made here, by the definitions."""

import hashlib
import math

import numpy as np
import pytest
import torch

from penjing.errors import InputError
from penjing.rotation import Rotation, possible

SIZES = [2, 3, 8, 12, 48, 384, 576, 1536, 64, 127]


def dense(size: int, seed: int = 0) -> np.ndarray:
    """Q = (F_m kron H_2^k) diag(signs), entry by entry."""
    two = math.gcd(size, 2**30)
    odd = size // two
    q = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            angle = 2 * math.pi * (i // two) * (j // two) / odd
            walsh = -1.0 if ((i % two) & (j % two)).bit_count() % 2 else 1.0
            q[i, j] = walsh * (math.cos(angle) + math.sin(angle)) / math.sqrt(size)
    drawn = hashlib.shake_256(f"penjing {size} {seed}".encode()).digest(size)
    bits = [drawn[i // 8] >> (7 - i % 8) & 1 for i in range(size)]
    return q * np.where(bits, -1.0, 1.0)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_matrix_that_it_says(size: int) -> None:
    q, basis = dense(size), Rotation(size)
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-12)
    x = torch.randn(5, 3, size, dtype=torch.float64)
    np.testing.assert_allclose(basis.apply(x).numpy(), x.numpy() @ q.T, atol=1e-12)
    np.testing.assert_allclose(basis.inverse(x).numpy(), x.numpy() @ q, atol=1e-12)
    gram = x.reshape(-1, size).T @ x.reshape(-1, size)
    np.testing.assert_allclose(basis.both(gram).numpy(), q @ gram.numpy() @ q.T, atol=1e-10)
    single = basis.apply(x.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), x.numpy() @ q.T, atol=1e-5)
    assert basis.apply(x[:0]).shape == (0, 3, size)


def test_an_outlier_is_spread_over_all() -> None:
    x = torch.zeros(1, 384)
    x[0, 7] = 100.0
    spread = Rotation(384).apply(x)
    assert float(spread.abs().max()) < 100 * math.sqrt(2 / 384) * 1.001
    assert float(spread.norm()) == pytest.approx(100, rel=1e-5)


def test_seeds_differ_and_factors_are_small() -> None:
    x = torch.randn(1, 64)
    assert not torch.allclose(Rotation(64, 0).apply(x), Rotation(64, 1).apply(x))
    for size in (384, 1536, 576, 4096):
        assert sum(map(len, Rotation(size).factors)) < 2.2 * math.sqrt(size)


def test_sizes_that_have_none() -> None:
    assert [possible(size) for size in (2, 511 * 4, 1, 521 * 2)] == [True, True, False, False]
    for size, seed in ((1, 0), (521, 0), (0, 0), (8.0, 0), (8, -1), (8, 0.5), (8, True)):
        with pytest.raises(InputError, match="of a rotation"):
            Rotation(size, seed)  # type: ignore[arg-type]
