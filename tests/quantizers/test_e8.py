import itertools

import pytest
import torch

from penjing import codebooks
from penjing.errors import UsageError
from penjing.planes import Scheme
from penjing.quantizers import e8


def points(bits: int) -> torch.Tensor:
    """The table's points, without what fills it."""
    return torch.unique(codebooks.table(f"e8-{bits}").float(), dim=0)


def test_the_roots_against_their_definition() -> None:
    # 112 of (+-1, +-1, 0^6) and 128 of (+-1/2)^8 with an even number of minus; and the origin.
    wanted = {(0.0,) * 8}
    for i, j in itertools.combinations(range(8), 2):
        for a, b in itertools.product((-2.0, 2.0), repeat=2):
            row = [0.0] * 8
            row[i], row[j] = a, b
            wanted.add(tuple(row))
    for signs in itertools.product((-1.0, 1.0), repeat=8):
        if signs.count(-1.0) % 2 == 0:
            wanted.add(signs)
    assert len(wanted) == 241
    assert {tuple(row) for row in points(8).tolist()} == wanted


@pytest.mark.parametrize(("bits", "count"), [(12, 2401), (14, 9121), (16, 56881)])
def test_balls_hold_the_whole_shells_of_the_theta_series(bits: int, count: int) -> None:
    # 1 + 240 q^2 + 2160 q^4 + 6720 q^6 + 17520 q^8 + 30240 q^10 + ...
    norms = points(bits).square().sum(1) / 4
    shells = [1, 240, 2160, 6720, 17520, 30240]
    whole = [int((norms == 2 * n).sum()) for n in range(6)]
    sums = list(itertools.accumulate(shells))
    assert whole[: sums.index(count) + 1] == shells[: sums.index(count) + 1]
    assert len(norms) <= 2**bits
    assert bool((norms % 2 == 0).all())
    # A lattice: inner products are whole.
    some = points(bits)[:: max(1, len(norms) // 300)]
    assert bool(((some @ some.T) % 4 == 0).all())


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("size", [0.3, 1.5, 4.0, 20.0])
def test_the_nearest_point_of_the_ball(bits: int, size: float) -> None:
    x = size * torch.randn(40, 8, generator=torch.Generator().manual_seed(bits))
    found = e8.nearest(x, bits, torch.eye(8))
    table = points(bits)
    least = torch.cdist(x.double(), table.double()).amin(1)
    torch.testing.assert_close((found - x).double().norm(dim=1), least, rtol=1e-5, atol=1e-5)
    codes = codebooks.e8_index(bits, found)
    assert torch.equal(codebooks.table(f"e8-{bits}")[codes].float(), found)


def test_nearly_the_best_in_another_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=generator) * 0.3 + torch.eye(8)
    metric = root @ root.T
    x = 2 * torch.randn(200, 8, generator=generator)

    def cost(off: torch.Tensor) -> torch.Tensor:
        return ((off @ metric) * off).sum(-1)

    found = cost(e8.nearest(x, 12, metric) - x).mean()
    plain = cost(e8.nearest(x, 12, torch.eye(8)) - x).mean()
    best = cost(points(12).unsqueeze(0) - x.unsqueeze(1)).amin(1).mean()
    assert best <= found < plain


def test_better_than_a_scalar_code_of_two_bits_on_a_gaussian() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    planes = e8.fit(weight, Scheme(2, 0, True, "e8", 16))
    # The best scalar code of 2 bits has 0.1175 (Max, 1960).
    assert (planes.dequantize() - weight).square().mean() < 0.1
    assert planes.stored_bits == pytest.approx(2 + 16 / 256)  # no table


def test_bits_that_no_ball_has() -> None:
    with pytest.raises(UsageError, match=r"1\.5, 1\.75, 2"):
        e8.fit(torch.ones(2, 8), Scheme(1.25, 0, True, "e8"))
