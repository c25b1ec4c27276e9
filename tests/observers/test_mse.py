import itertools

import numpy as np
import pytest
import torch

from penjing.histogram import Histogram
from penjing.observers import mse


def of(values: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


def error(values: np.ndarray, low: float, high: float, bits: int) -> float:
    """Of the values themselves, not of a histogram."""
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    codes = np.clip(np.round(values / scale) + zero, 0, 2**bits - 1)
    return float(np.square((codes - zero) * scale - values).mean())


def samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3000, generator=generator)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "cubed": normal**3,
        "one side": torch.cat([normal.clamp(-1, 1), torch.tensor([60.0])]),
        "gelu": torch.nn.functional.gelu(3 * normal),
        "shifted": normal - 3,
    }


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", samples())
def test_brute_force_over_both_ends(name: str, bits: int) -> None:
    tensor = samples()[name]
    values = tensor.double().numpy()
    low, high = mse.fit(of(tensor), bits)
    bottom, top = min(values.min(), 0), max(values.max(), 0)
    parts = np.concatenate([np.arange(1, 41) / 40, np.geomspace(1e-3, 0.02, 8)])
    ends = itertools.product(bottom * parts if bottom else [0.0], top * parts if top else [0.0])
    least = min(error(values, a, b, bits) for a, b in ends)
    assert error(values, low, high, bits) <= 1.1 * least


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", samples())
def test_never_worse_than_the_whole_range(name: str, bits: int) -> None:
    values = samples()[name]
    histogram = of(values)
    low, high = mse.fit(histogram, bits)
    whole = error(values.double().numpy(), min(histogram.low, 0), max(histogram.high, 0), bits)
    assert error(values.double().numpy(), low, high, bits) <= 1.001 * whole


def test_the_known_clip_of_a_gaussian() -> None:
    # 4 bits, uniform: the best loading of a Gaussian with 16 levels is 2.72 standard deviations
    # (step 0.335 times 7.5 + half a step: Max 1960 has 0.3352); the grid's ends lie at 7.5 steps.
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    low, high = mse.fit(of(values), 4, steps=200)
    assert (high - low) / 15 == pytest.approx(0.3352, rel=0.03)


def test_an_outlier_on_one_side_leaves_the_other_end() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(100_000, generator=generator) * 1.5 - 1  # -1 to 0.5
    values[0] = 40.0
    low, high = mse.fit(of(values), 4)
    assert low == pytest.approx(-1.0, abs=0.07)
    assert 0.4 < high < 3
