"""Clip against a brute force over scales and zero points, and round to nearest."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from penjing.errors import InputError
from penjing.planes import Scheme
from penjing.quantizers import clip, rtn


def weights(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, inputs, generator=generator) ** 3 + 0.2


def brute(row: np.ndarray, heavy: np.ndarray, bits: int, symmetric: bool) -> float:
    """Least weighted error over every zero point and a fine lattice of scales."""
    levels, least = 2**bits - 1, np.inf
    top = 2.2 * np.abs(row).max()
    for zero in [2 ** (bits - 1)] if symmetric else range(levels + 1):
        for scale in np.linspace(top / 2000, top, 2000):
            codes = np.clip(np.round(row / scale) + zero, 0, levels)
            off = row - scale * (codes - zero)
            least = min(least, float((heavy * off**2).sum()))
    return least


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_close_to_brute_force(bits: int, weighted: bool, symmetric: bool) -> None:
    weight = weights(12, 7)
    heavy = torch.logspace(-1, 1, 7) if weighted else torch.ones(7)
    stats = SimpleNamespace(gram=torch.diag(heavy).double())
    back = clip.fit(weight, Scheme(bits, 0, symmetric), stats).dequantize()
    mine = (heavy * (back - weight).square()).sum(1).numpy()
    rows = weight.double().numpy()
    least = np.array([brute(row, heavy.numpy(), bits, symmetric) for row in rows])
    assert mine.sum() <= 1.15 * least.sum()
    assert (mine >= 0.98 * least).all()  # else the brute force is none


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, 0), (3, 5), (4, 8), (8, 64)])
@pytest.mark.parametrize("weighted", [False, True])
def test_never_worse_than_nearest_in_any_group(
    bits: int, group: int, symmetric: bool, weighted: bool
) -> None:
    weight, scheme = weights(9, 23), Scheme(bits, group, symmetric)
    heavy = torch.rand(23, generator=torch.Generator().manual_seed(3)) + 0.01
    stats = SimpleNamespace(gram=torch.diag(heavy).double()) if weighted else None
    heavy = heavy if weighted else torch.ones(23)

    def error(back: torch.Tensor) -> torch.Tensor:
        parts = torch.nn.functional.pad(heavy * (back - weight).square(), (0, -23 % (group or 23)))
        return parts.reshape(9, -1, group or 23).sum(-1)

    mine = error(clip.fit(weight, scheme, stats).dequantize())
    plain = error(rtn.fit(weight, scheme).dequantize())
    assert (mine <= plain * (1 + 1e-5)).all()
    if bits < 8:
        assert mine.sum() < 0.98 * plain.sum()


def test_a_known_grid_is_found() -> None:
    # Codes 0..3 about 1, and one outlier that min-max would follow. The best scale of codes -1, 0,
    # 1, 2 eight times and 2 once more: (8 * 3 + 2 * 1.6) / (8 * 6 + 4).
    weight = torch.tensor([[-0.5, 0.0, 0.5, 1.0] * 8 + [1.6]])
    planes = clip.fit(weight, Scheme(2))
    assert float(planes.scale) == pytest.approx(27.2 / 52, rel=1e-5)
    assert int(planes.zero_point) == 1
    assert torch.equal(planes.codes[0, 0, :4], torch.tensor([0, 1, 2, 3], dtype=torch.uint8))


def test_importance_moves_the_grid_to_what_counts() -> None:
    weight = torch.tensor([[0.11, 0.19, -0.1, -0.2, 3.0]])
    heavy = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-4]).double()
    kept = clip.fit(weight, Scheme(3), SimpleNamespace(gram=torch.diag(heavy))).dequantize()
    plain = clip.fit(weight, Scheme(3)).dequantize()
    assert (kept - weight)[0, :4].abs().max() < 0.06
    assert (plain - weight)[0, :4].abs().max() > 0.09


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", [32, 16, 8])
def test_zero_rows_constants_and_outliers(symmetric: bool, width: int) -> None:
    weight = weights(6, 21)
    weight[0] = 0
    weight[1] = -0.7
    weight[2, 4] = 100.0
    weight[:, 8] = 0.25
    weight[0, 8] = 0
    for heavy in (torch.ones(21), torch.zeros(21), torch.arange(21.0)):
        stats = SimpleNamespace(gram=torch.diag(heavy).double())
        back = clip.fit(weight, Scheme(4, 8, symmetric, scale_bits=width), stats).dequantize()
        assert back.isfinite().all()
        assert (back[0] == 0).all()
        # Scales of 8 bits share their step with the outlier's.
        assert (back[1] + 0.7)[:8].abs().max() < (0.02 if width > 8 else 0.4)
        assert back[2, 4] == pytest.approx(100, rel=0.5)


@pytest.mark.parametrize("size", [1e-35, 1e-12, 1e12, 1e35])
def test_units_do_not_matter(size: float) -> None:
    weight = weights(4, 16)
    wanted = clip.fit(weight, Scheme(3, 8))
    found = clip.fit(weight * size, Scheme(3, 8))
    assert (found.codes == wanted.codes).float().mean() > 0.97
    torch.testing.assert_close(found.scale / size, wanted.scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_zeros_do_not_coarsen_the_scales_of_8_bits(symmetric: bool) -> None:
    weight = 0.01 * weights(6, 32)
    weight[::2] = 0
    for method in (rtn, clip):
        fine = method.fit(weight, Scheme(4, 16, symmetric)).dequantize() - weight
        coarse = method.fit(weight, Scheme(4, 16, symmetric, scale_bits=8)).dequantize() - weight
        assert coarse.norm() < 1.05 * fine.norm()


def test_padding_does_not_draw_the_scale() -> None:
    weight = weights(5, 11)
    whole = clip.fit(weight, Scheme(3, 8)).dequantize()
    last = clip.fit(weight[:, 8:], Scheme(3)).dequantize()
    torch.testing.assert_close(whole[:, 8:], last, rtol=1e-5, atol=1e-6)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, scheme = weights(2100, 4), Scheme(3)
    whole = clip.fit(weight, scheme).dequantize()
    for row in (0, 2047, 2048, 2099):
        alone = clip.fit(weight[row : row + 1], scheme).dequantize()
        torch.testing.assert_close(whole[row : row + 1], alone)


def test_more_steps_are_not_worse() -> None:
    weight = weights(20, 32)
    errors = [
        float((clip.fit(weight, Scheme(2, 16), steps=s, reach=r).dequantize() - weight).norm())
        for s, r in itertools.product([4, 64], [0, 3])
    ]
    assert errors[3] <= min(errors) * 1.001
    assert errors[3] < errors[0]


def test_bad_statistics_are_named() -> None:
    with pytest.raises(InputError, match="Gram matrix"):
        clip.fit(torch.ones(2, 3), Scheme(4), SimpleNamespace(gram=torch.eye(4)))
    bad = torch.eye(3).double()
    bad[1, 1] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        clip.fit(torch.ones(2, 3), Scheme(4), SimpleNamespace(gram=bad))
