"""Every family of sub-integer codes: what holds for all of them."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from penjing import registry
from penjing.errors import InputError, UsageError
from penjing.planes import IntegerPlanes, Scheme

LADDERS: dict[str, list[float]] = {
    "binary": [1, 2, 3, 4],
    "residual": [2, 3, 4],
    "ternary": [1.6, 3.2],
    "power2": [2, 3, 4],
    "additive": [1, 1.25, 1.5, 2, 3, 4],
    "e8": [1, 1.5, 2, 3, 4],
    "trellis": [1, 2, 3, 4],
}
SCHEMES = [
    Scheme(bits, group, symmetric, family, width)
    for family, ladder in LADDERS.items()
    for bits in ladder[1:3]
    for group, symmetric, width in ((0, True, 16), (16, False, 32), (8, True, 8))
]
IDS = [f"{s.codes}-{s.bits}-{s.group}-{s.scale_bits}" for s in SCHEMES]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(300, 40, generator=GENERATOR) @ torch.randn(40, 40, generator=GENERATOR)
X = X + 2 * torch.randn(40, generator=GENERATOR)
WEIGHT = torch.randn(24, 40, generator=GENERATOR)
STATS = SimpleNamespace(gram=(X.T @ X / 300).double())


def fit(weight: torch.Tensor, scheme: Scheme, stats: object = STATS) -> IntegerPlanes:
    planes: IntegerPlanes = registry.lookup("quantizers", scheme.codes, "fit")(
        weight, scheme, stats
    )
    return planes


def error(planes: IntegerPlanes, weight: torch.Tensor = WEIGHT) -> float:
    return float((X @ (planes.dequantize() - weight).T).square().sum())


@pytest.mark.parametrize("family", LADDERS)
def test_what_a_leaf_declares(family: str) -> None:
    assert registry.constant("quantizers", family, "families", None) == {family}
    assert registry.constant("quantizers", family, "needs", None) == {"gram"}


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_stored_and_read_back_and_the_same_again(scheme: Scheme) -> None:
    weight = WEIGHT.clone()
    planes = fit(weight, scheme)
    assert torch.equal(weight, WEIGHT)
    assert planes.scale_bits == scheme.scale_bits
    assert sum(planes.bits) == pytest.approx(
        scheme.bits * (8 if scheme.codes in ("additive", "e8") else 1)
    )
    back = IntegerPlanes.from_tensors(planes.tensors(), planes.describe())
    assert torch.equal(back.dequantize(), planes.dequantize())
    again = fit(weight, scheme)
    assert torch.equal(planes.codes, again.codes)
    assert torch.equal(planes.scale, again.scale)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_feedback_beats_nearest(scheme: Scheme) -> None:
    assert error(fit(WEIGHT, scheme)) < 0.6 * error(fit(WEIGHT, scheme, None))


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("family", LADDERS)
def test_more_bits_are_better(family: str, gram: bool) -> None:
    planes = [
        fit(WEIGHT, Scheme(bits, 0, True, family), STATS if gram else None)
        for bits in LADDERS[family]
    ]
    if gram:
        errors = [error(p) for p in planes]
    else:
        errors = [float((p.dequantize() - WEIGHT).square().sum()) for p in planes]
    assert all(b < 0.9 * a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("family", ["binary", "residual", "ternary", "power2"])
def test_groups_with_shifts_are_better_than_one_scale(family: str) -> None:
    bits = LADDERS[family][0]
    one = error(fit(WEIGHT, Scheme(bits, 0, True, family)))
    assert error(fit(WEIGHT, Scheme(bits, 8, False, family))) < 0.9 * one


@pytest.mark.parametrize("family", LADDERS)
@pytest.mark.parametrize(
    "gram",
    [
        torch.ones(40, 40),
        torch.zeros(40, 40),
        torch.diag(torch.arange(40.0)),
        torch.eye(40) * 1e-30,
        torch.eye(40) * 1e30,
        None,
    ],
    ids=["rank-1", "zero", "dead-input", "tiny", "huge", "none"],
)
def test_poor_statistics_still_give_a_close_weight(family: str, gram: torch.Tensor | None) -> None:
    scheme = Scheme(LADDERS[family][-1], 0, False, family)
    stats = None if gram is None else SimpleNamespace(gram=gram.double())
    off = fit(WEIGHT, scheme, stats).dequantize() - WEIGHT
    # A rank-1 Gram lets errors sum up along its one direction; nothing may run away.
    assert off.isfinite().all()
    assert off.abs().max() < 6
    assert off.square().mean() < 0.6


@pytest.mark.parametrize("family", LADDERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_stay_zero_and_constants_are_close(family: str, symmetric: bool) -> None:
    weight = torch.cat([torch.zeros(2, 40), torch.full((2, 40), 0.3), WEIGHT[:4]])
    weight[:, 3] = 0.3
    weight[:2] = 0
    for stats in (STATS, None):
        for width in (32, 16, 8):
            scheme = Scheme(LADDERS[family][-1], 0, symmetric, family, width)
            back = fit(weight, scheme, stats).dequantize()
            assert (back[:2] == 0).all()
            assert (back[2:4] - 0.3).abs().mean() < 0.1


@pytest.mark.parametrize("family", LADDERS)
@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (1, 1), (5, 13), (2, 8)])
@pytest.mark.parametrize("data", [True, False])
def test_odd_shapes(family: str, shape: tuple[int, int], data: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    stats = SimpleNamespace(gram=torch.eye(shape[1]).double() + 0.3) if data else None
    for group in (0, 8):
        planes = fit(weight, Scheme(LADDERS[family][-1], group, False, family, 16), stats)
        assert planes.shape == shape
        back = planes.dequantize()
        assert back.shape == shape
        if weight.numel():
            assert (back - weight).square().mean() < 0.25 * weight.square().mean()


@pytest.mark.parametrize("family", LADDERS)
def test_bad_input_is_named(family: str) -> None:
    scheme = Scheme(LADDERS[family][-1], 0, False, family)
    with pytest.raises(InputError, match="NaN"):
        fit(torch.tensor([[float("nan"), 1.0]]), scheme, None)
    with pytest.raises(InputError, match="Gram matrix"):
        fit(torch.ones(2, 8), scheme, SimpleNamespace(gram=torch.eye(9).double()))
    nan = torch.full((8, 8), float("nan")).double()
    with pytest.raises(InputError, match="NaN"):
        fit(torch.ones(2, 8), scheme, SimpleNamespace(gram=nan))


@pytest.mark.parametrize("family", ["additive", "e8"])
def test_a_group_that_splits_a_vector_is_refused(family: str) -> None:
    with pytest.raises(UsageError, match="multiple of 8"):
        fit(WEIGHT, Scheme(2, 12, True, family), None)


@pytest.mark.parametrize("family", LADDERS)
def test_better_on_gaussian_weights_than_two_bits_of_plain_gptq(family: str) -> None:
    bits = next(b for b in LADDERS[family] if b >= 2)
    big = torch.randn(64, 40, generator=torch.Generator().manual_seed(3))
    plain = registry.lookup("quantizers", "gptq", "fit")(big, Scheme(2), STATS, mse=False, rounds=0)
    mine = fit(big, Scheme(bits, 0, True, family))
    assert error(mine, big) < 0.75 * error(plain, big)
