from types import SimpleNamespace

import torch

from penjing.planes import Scheme
from penjing.quantizers import awq, clip

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(300, 32, generator=GENERATOR) * torch.logspace(-1.5, 1, 32)
WEIGHT = torch.randn(24, 32, generator=GENERATOR)
STATS = SimpleNamespace(gram=(X.T @ X / 300).double())


def test_important_inputs_set_the_grid() -> None:
    def change(stats: object) -> float:
        off = awq.fit(WEIGHT, Scheme(3), stats).dequantize() - WEIGHT
        return float((X @ off.T).square().sum())

    assert change(STATS) < 0.8 * change(None)


def test_without_data_it_is_clip() -> None:
    mine, other = (leaf.fit(WEIGHT, Scheme(3, 8), None) for leaf in (awq, clip))
    assert torch.equal(mine.codes, other.codes)
    assert torch.equal(mine.scale, other.scale)
