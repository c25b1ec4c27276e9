"""Convolutions in strips, beside the same in one go, and what they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from penjing import strips
from penjing.strips import Strips


class _Count(TorchDispatchMode):
    """Rows of the outputs of the convolutions that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.rows.append(result.shape[2])
        return result


@pytest.mark.parametrize(
    "options",
    [
        {}, {"padding": 1}, {"stride": 2, "padding": 1}, {"stride": 3, "padding": 2},
        {"dilation": 2, "padding": 3}, {"groups": 2, "bias": False}, {"stride": (1, 2)},
        {"padding": (4, 0)}, {"padding": "same"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 3])
def test_as_in_one_go(options: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, (3, 5), **options).double()
    x = torch.randn(2, 4, 19, 13, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(x)
        row = 8 * len(x) * layer.weight[0].numel() * wanted.shape[3]
        monkeypatch.setattr(strips, "_MOST", rows * row)
        with _Count() as count, Strips():
            found = layer(x)
        with _Count() as seen, Strips(), _Count() as whole:
            layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert max(count.rows) == rows
    assert sum(count.rows) == wanted.shape[2]
    # What watches inside sees one convolution.
    assert whole.rows == [wanted.shape[2]]
    assert seen.rows == count.rows


def test_other_layers_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "_MOST", 1)
    torch.manual_seed(0)
    for layer, x in (
        (nn.Conv2d(2, 3, 3), torch.randn(1, 2, 8, 8)),
        (nn.Conv1d(2, 3, 3).double(), torch.randn(1, 2, 8).double()),
        (nn.ConvTranspose2d(2, 3, 3).double(), torch.randn(1, 2, 8, 8).double()),
        (nn.Linear(2, 3).double(), torch.randn(1, 2).double()),
    ):
        with torch.no_grad():
            wanted = layer(x)
            with Strips():
                assert torch.equal(layer(x), wanted)
