import pytest
import torch

from penjing.planes import Scheme
from penjing.quantizers import residual, ternary


def test_bits_are_split() -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    splits = {bits: residual.fit(weight, Scheme(bits, codes="residual")).bits for bits in (2, 3, 4)}
    assert splits == {2: (1, 1), 3: (2, 1), 4: (2, 2)}


def test_sixteen_levels_near_the_best_for_a_gaussian() -> None:
    weight = torch.randn(8, 200, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(4, 0, True, "residual")
    once = residual.fit(weight, scheme)
    assert once.offset == "centre"
    assert all(len(row.unique()) <= 16 for row in once.dequantize())
    # Sixteen levels on a Gaussian: Max (1960) has 0.009497 for free ones.
    error = (once.dequantize() - weight).square().mean() / weight.square().mean()
    assert 0.006 < error < 0.0125


def test_ternary_levels() -> None:
    three = torch.tensor([-1.0, 0.0, 1.0])
    one = ternary.fit(0.7 * three.repeat(4, 5), Scheme(1.6, 0, True, "ternary"))
    torch.testing.assert_close(one.dequantize(), 0.7 * three.repeat(4, 5), rtol=0, atol=1e-3)
    weight = torch.randn(16, 400, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (1.6, 3.2):
        planes = ternary.fit(weight, Scheme(bits, 0, True, "ternary"))
        assert all(len(row.unique()) <= 3 ** len(planes.bits) for row in planes.dequantize())
        errors.append(float((planes.dequantize() - weight).square().mean()))
    # Max (1960): 0.1902 with three free levels and 0.02835 with nine.
    assert errors[0] == pytest.approx(0.1902, rel=0.05)
    assert 0.02835 * 0.95 < errors[1] < 0.02835 * 1.25
