"""Trellis codes: walks against brute force, errors against what is known of the code."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from penjing import codebooks
from penjing.errors import UsageError
from penjing.packedlayers import PackedPlanes
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import e8, trellis


def cost(x: np.ndarray, root: np.ndarray, table: np.ndarray, entries: np.ndarray) -> float:
    return float((((x - table[entries]) * root).astype(np.float64) ** 2).sum())


@pytest.mark.parametrize(
    ("bits", "entries", "steps"), [(1, 8, 9), (1, 4, 6), (2, 16, 5), (2, 64, 5)]
)
@pytest.mark.parametrize("seed", range(4))
def test_the_best_walk_by_brute_force(bits: int, entries: int, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.normal(size=entries).astype(np.float32)
    x = rng.normal(size=(3, steps)).astype(np.float32)
    root = (0.2 + rng.random(steps)).astype(np.float32)
    nodes = entries >> bits
    start = rng.integers(0, nodes, 3)
    found = trellis.walk(x, root, table, bits, start)
    for walk in range(3):
        best = np.inf
        for codes in itertools.product(range(2**bits), repeat=steps):
            node, way = int(start[walk]), []
            for code in codes:
                way.append((node << bits) + code)
                node = way[-1] % nodes
            best = min(best, cost(x[walk], root, table, np.array(way)))
        assert cost(x[walk], root, table, found[walk]) == pytest.approx(best, rel=1e-5)
        # It is a walk: each entry begins with what the last one ended with.
        assert found[walk, 0] >> bits == start[walk]
        assert (found[walk, 1:] >> bits == found[walk, :-1] % nodes).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_tables(bits: int) -> None:
    table = codebooks.table(f"trellis-{bits}")
    assert table.dtype == torch.int8
    # 4,096 equal shares of a Gaussian, rounded.
    middle = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    wanted = (34 * torch.special.ndtri(middle)).round()
    assert torch.equal(table.flatten().sort().values.double(), wanted)
    # Of the ways on from a node one is in each part of the line.
    ways = table.reshape(-1, 2**bits).sort(1).values.double()
    edges = 34 * torch.special.ndtri(torch.arange(1, 2**bits, dtype=torch.float64) / 2**bits)
    assert (ways[:, :-1] <= edges + 0.5).all()
    assert (ways[:, 1:] >= edges - 0.5).all()


# Best scalar codes (Max, 1960); no code has less than 4**-bits. Two bits of a trellis have about
# 0.07 (QTIP, section 3), of the lattice E8 0.09.
@pytest.mark.parametrize(
    ("bits", "scalar", "wanted"),
    [(1, 0.3634, 0.276), (2, 0.1175, 0.0715), (3, 0.03454, 0.0192), (4, 0.009497, 0.0051)],
)
def test_the_error_on_a_gaussian(bits: int, scalar: float, wanted: float) -> None:
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    planes = trellis.fit(weight, Scheme(bits, 0, True, "trellis", 16))
    error = float((planes.dequantize() - weight).square().mean() / weight.square().mean())
    assert 4**-bits < error < 0.8 * scalar
    assert error == pytest.approx(wanted, rel=0.03)
    assert planes.stored_bits == pytest.approx(bits + 16 / 64)  # no table


def test_less_error_than_the_lattice_with_feedback_too() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight = torch.randn(256, 64, generator=generator)
    gram = (x.T @ x / 500).double()

    def error(planes: IntegerPlanes) -> float:
        return float((x @ (planes.dequantize() - weight).T).square().sum())

    stats = SimpleNamespace(gram=gram)
    mine = error(trellis.fit(weight, Scheme(2, 0, True, "trellis"), stats))
    assert mine < 0.6 * error(trellis.fit(weight, Scheme(2, 0, True, "trellis")))
    assert mine < 0.95 * error(e8.fit(weight, Scheme(2, 0, True, "e8"), stats))
    # A refit and a pass of coordinate descent after the feedback.
    assert mine < error(trellis.fit(weight, Scheme(2, 0, True, "trellis"), stats, rounds=0))


def test_rows_of_another_size_count_by_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 16, generator=generator) * torch.logspace(-2, 2, 64).unsqueeze(1)
    off = trellis.fit(weight, Scheme(2, 0, True, "trellis")).dequantize() - weight
    share = off.square().sum(1) / weight.square().sum(1)
    assert share[-8:].mean() < 0.1
    assert off.isfinite().all()


def test_long_columns_are_walked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    whole = trellis.fit(weight, Scheme(2, 0, True, "trellis"))
    monkeypatch.setattr(trellis, "_STEPS", 32)
    parts = trellis.fit(weight, Scheme(2, 0, True, "trellis"))
    back = IntegerPlanes.from_tensors(parts.tensors(), parts.describe())
    assert torch.equal(back.dequantize(), parts.dequantize())
    errors = [float((p.dequantize() - weight).square().mean()) for p in (whole, parts)]
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_packed_rows_know_the_rows_above(bits: int) -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    planes = trellis.fit(weight, Scheme(bits, 8, True, "trellis", 8))
    packed, whole = PackedPlanes(planes), planes.dequantize()
    assert torch.equal(packed.rows(slice(None)), whole)
    for rows in (slice(0, 3), slice(17, 31), torch.tensor([39, 0, 5, 5])):
        assert torch.equal(packed.rows(rows), whole[rows])


def test_bits_that_it_has_not() -> None:
    with pytest.raises(UsageError, match="1, 2, 3 or 4"):
        trellis.fit(torch.ones(4, 12), Scheme(8))


def test_a_group_that_splits_a_place() -> None:
    with pytest.raises(UsageError, match="multiple of 4"):
        trellis.fit(torch.ones(4, 12), Scheme(2, 6, True, "trellis"))
