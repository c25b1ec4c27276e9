"""Round to nearest against numpy, by hand."""

import numpy as np
import pytest
import torch

from penjing.planes import Scheme
from penjing.quantizers import rtn


def test_by_hand() -> None:
    # -1 to 2 in three steps of 1: codes round(w) + 1; 0.5 and 1.5 go to the even 0 and 2.
    planes = rtn.fit(torch.tensor([[-1.0, 2.0, 0.5, 1.5, -0.2]]), Scheme(2))
    assert planes.codes.tolist() == [[[0, 3, 1, 3, 1]]]
    assert planes.scale.tolist() == [[[1.0]]]
    assert planes.shift.tolist() == [[-1.0]]
    assert planes.dequantize().tolist() == [[-1.0, 2.0, 0.0, 2.0, 0.0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 4, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_against_numpy(bits: int, group: int, symmetric: bool) -> None:
    weight = np.random.default_rng(bits).normal(size=(5, 18)).astype(np.float32)
    planes = rtn.fit(torch.from_numpy(weight), Scheme(bits, group, symmetric))
    wanted = np.zeros_like(weight)
    half, top, size = 2 ** (bits - 1), 2**bits - 1, group or 18
    for row in range(5):
        for start in range(0, 18, size):
            w = weight[row, start : start + size]
            low, high = min(0.0, float(w.min())), max(0.0, float(w.max()))
            scale = max(high / (half - 1), -low / half) if symmetric else (high - low) / top
            zero = half if symmetric else np.round(-low / scale)
            wanted[row, start : start + size] = scale * (
                np.clip(np.round(w / scale) + zero, 0, top) - zero
            )
    np.testing.assert_allclose(planes.dequantize().numpy(), wanted, atol=2e-6)


def test_no_weight_is_further_off_than_half_a_step() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    planes = rtn.fit(weight, Scheme(4, 16))
    # The zero point is rounded too: the ends of the range may be cut by half a step more.
    assert ((planes.dequantize() - weight).abs() <= planes.spread(planes.scale[0]) * 1.001).all()
    inside = (planes.codes[0] > 0) & (planes.codes[0] < 15)
    off = (planes.dequantize() - weight).abs() / planes.spread(planes.scale[0])
    assert float(off[inside].max()) <= 0.5001
