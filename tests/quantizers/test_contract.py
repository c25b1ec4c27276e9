"""Every quantizer of integers: shapes, grid, determinism, edge cases, and better than random."""

from types import SimpleNamespace

import pytest
import torch

from penjing import registry
from penjing.errors import InputError
from penjing.planes import IntegerPlanes, Scheme

NAMES = [
    name
    for name in registry.choices("quantizers")
    if "integer" in registry.constant("quantizers", name, "families", {"integer"})
]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(300, 20, generator=GENERATOR) @ torch.randn(20, 20, generator=GENERATOR)
WEIGHT = torch.randn(12, 20, generator=GENERATOR)
GRAM = (X.T @ X / 300).double()
STATS = SimpleNamespace(gram=GRAM, norm=GRAM.diagonal().sqrt().float())
SCHEMES = [Scheme(4), Scheme(2, 5), Scheme(3, 8), Scheme(8, 0, True), Scheme(4, 64, True)]


def fit(name: str, weight: torch.Tensor, scheme: Scheme, stats: object = STATS) -> IntegerPlanes:
    planes: IntegerPlanes = registry.lookup("quantizers", name, "fit")(weight, scheme, stats)
    return planes


def error(planes: IntegerPlanes) -> float:
    return float((X @ (planes.dequantize() - WEIGHT).T).square().sum())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_codes_and_determinism(name: str, scheme: Scheme) -> None:
    weight = WEIGHT.clone()
    planes = fit(name, weight, scheme)
    assert planes.codes.dtype == torch.uint8
    assert int(planes.codes.max()) < 2 ** sum(planes.bits)
    assert planes.scale.dtype == planes.shift.dtype == torch.float32
    assert (planes.scale > 0).all()
    assert planes.dequantize().shape == WEIGHT.shape
    assert torch.equal(weight, WEIGHT)
    again = fit(name, weight, scheme)
    assert torch.equal(planes.codes, again.codes)
    assert torch.equal(planes.scale, again.scale)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"random"}))
def test_better_than_random(name: str, scheme: Scheme) -> None:
    assert error(fit(name, WEIGHT, scheme)) < 0.5 * error(fit("random", WEIGHT, scheme))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"random"}))
def test_more_bits_are_better(name: str) -> None:
    errors = [error(fit(name, WEIGHT, Scheme(bits))) for bits in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_symmetric_shifts_are_exactly_minus_half_the_range(name: str) -> None:
    planes = fit(name, WEIGHT, Scheme(8, 0, True))
    assert torch.equal(planes.shift, planes.scale[0] * -128)
    assert (planes.zero_point == 128).all()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"random"}))
@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_and_constants_survive(name: str, symmetric: bool) -> None:
    weight = torch.cat([torch.zeros(2, 20), torch.full((2, 20), 0.3)])
    back = fit(name, weight, Scheme(4, 8, symmetric), SimpleNamespace(gram=torch.eye(20).double()))
    assert (back.dequantize()[:2] == 0).all()
    assert (back.dequantize()[2:] - 0.3).abs().max() < 0.001


@pytest.mark.parametrize(
    "gram",
    [
        torch.ones(20, 20),
        torch.zeros(20, 20),
        torch.diag(torch.arange(20.0)),
        torch.eye(20) * 1e-30,
    ],
    ids=["rank-1", "zero", "dead-input", "tiny"],
)
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"random"}))
def test_poor_statistics_still_give_a_close_weight(name: str, gram: torch.Tensor) -> None:
    planes = fit(name, WEIGHT, Scheme(8), SimpleNamespace(gram=gram.double(), norm=None))
    scale = planes.scale[0].max()
    # A rank-1 Gram lets errors sum up along its one direction; nothing may run away.
    assert (planes.dequantize() - WEIGHT).abs().max() < 12 * scale


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)])
def test_empty_and_single_weights(name: str, shape: tuple[int, int]) -> None:
    planes = fit(name, torch.ones(shape), Scheme(4, 2), None)
    assert planes.dequantize().shape == shape


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="NaN"):
        fit(name, torch.tensor([[float("nan"), 1.0]]), Scheme(4), None)
