import itertools
from types import SimpleNamespace

import pytest
import torch

from penjing.planes import Scheme
from penjing.quantizers import _scalar, binary


def test_the_gaussian_code_of_two_planes_is_lloyd_max() -> None:
    # Max (1960): levels +-0.4528 and +-1.510, so s1 = 1.9628 and s2 = 1.0572.
    scale = _scalar.gaussian_scales(_scalar.alphabet([[-0.5, 0.5]] * 2))
    assert sorted(scale.tolist(), reverse=True) == pytest.approx([1.9628, 1.0572], abs=0.01)
    one = _scalar.gaussian_scales(_scalar.alphabet([[-0.5, 0.5]]))
    assert one.tolist() == pytest.approx([2 * (2 / torch.pi) ** 0.5], abs=0.01)


@pytest.mark.parametrize("seed", range(6))
def test_one_plane_of_four_weights_against_all_codes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 4, generator=generator)
    x = torch.randn(50, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    gram = (x.T @ x / 50).double() + 0.01 * torch.eye(4).double()
    planes = binary.fit(weight, Scheme(1, 0, True, "binary"), SimpleNamespace(gram=gram))
    off = (planes.dequantize() - weight).double()
    found = float(off @ gram @ off.T)
    errors = []
    for signs in itertools.product([-1.0, 1.0], repeat=4):
        code = torch.tensor([signs]).double()
        scale = (code @ gram @ weight.double().T) / (code @ gram @ code.T)
        left = weight.double() - scale * code
        errors.append(float(left @ gram @ left.T))
    errors.sort()
    # There are eight codes up to the sign; the search is greedy.
    assert found <= errors[4] + 1e-6
    assert found >= errors[0] - 1e-6


def test_often_the_best_of_all_codes() -> None:
    hits = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, 4, generator=generator)
        planes = binary.fit(weight, Scheme(1, 0, True, "binary"))
        found = float((planes.dequantize() - weight).square().sum())
        # Without data the best signs are the weights' own.
        best = float(weight.square().sum() - weight.abs().sum() ** 2 / 4)
        hits += found < best + 1e-5
    assert hits == 40


def problem() -> tuple[torch.Tensor, SimpleNamespace]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return torch.randn(40, 64, generator=generator), SimpleNamespace(gram=(x.T @ x / 400).double())


def error(weight: torch.Tensor, other: torch.Tensor, gram: torch.Tensor) -> float:
    off = (other - weight).double()
    return float(((off @ gram) * off).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("data", [True, False])
def test_nested_prefixes_are_codes_of_their_own(symmetric: bool, data: bool) -> None:
    weight, stats = problem()
    gram = stats.gram if data else torch.eye(64).double()
    own = stats if data else None
    scheme = Scheme(4, 16, symmetric, "binary", 16)
    nested = binary.fit(weight, scheme, own, nested=True)
    plain = binary.fit(weight, scheme, own)
    assert set(nested.nested_scales) == {2, 3}
    errors = [error(weight, nested.nested(k).dequantize(), gram) for k in (2, 3, 4)]
    assert errors[1] < 0.75 * errors[0]
    assert errors[2] < 0.75 * errors[1]
    two = binary.fit(weight, Scheme(2, 16, symmetric, "binary", 16), own)
    assert errors[0] == pytest.approx(error(weight, two.dequantize(), gram), rel=1e-5)
    # Reading two planes of a code that was made whole is no code of two bits.
    assert errors[0] < 0.7 * error(weight, plain.nested(2).dequantize(), gram)


def test_one_scale_a_row_costs_little_more_than_the_codes() -> None:
    weight, stats = problem()
    planes = binary.fit(weight, Scheme(2, 0, True, "binary", 16), stats)
    assert planes.stored_bits == pytest.approx(2 + 2 * 16 / 64)
