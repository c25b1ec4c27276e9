"""Patches: their sums predict the mean and the power of every grouped convolution's output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.patches import Patches, is_grouped, patches_of


class Same(nn.Conv2d):
    """Pads by itself, more on one side, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


LAYERS: dict[str, tuple[type[nn.Conv2d], dict[str, Any]]] = {
    "depthwise": (nn.Conv2d, {"groups": 6, "padding": 1}),
    "two channels a group": (nn.Conv2d, {"groups": 3}),
    "stride and dilation": (nn.Conv2d, {"groups": 6, "stride": 2, "dilation": 2}),
    "padding by name": (nn.Conv2d, {"groups": 6, "padding": "same", "dilation": 2}),
    "valid": (nn.Conv2d, {"groups": 6, "padding": "valid"}),
    "pads in forward": (Same, {"groups": 6, "stride": 2}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_and_the_power_of_the_output(name: str) -> None:
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    layer = kind(6, 12, 3, bias=False, **options)
    assert is_grouped(layer)
    x = torch.randn(4, 6, 9, 8) + torch.arange(6.0).reshape(1, 6, 1, 1)
    sums = Patches()
    for part in x.split(3):
        sums.add(layer, part)
    each = 12 // layer.groups
    row = layer.weight.detach().flatten(1).double()
    with torch.no_grad():
        wanted = layer(x).double()
    mean = (row * sums.mean.repeat_interleave(each, 0)).sum(1)
    torch.testing.assert_close(mean, wanted.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    grams = sums.grams.repeat_interleave(each, 0)
    power = torch.einsum("oi,oij,oj->o", row, grams, row)
    torch.testing.assert_close(power, wanted.square().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert sums.count == 4 * wanted[0, 0].numel()


def test_patches_by_hand() -> None:
    image = torch.arange(8.0).reshape(1, 2, 2, 2)
    layer = nn.Conv2d(2, 2, (1, 2), groups=2)
    found = patches_of(layer, image)  # two places, one under the other
    assert found.tolist() == [[[0.0, 2.0], [1.0, 3.0]], [[4.0, 6.0], [5.0, 7.0]]]


def test_hooks_do_not_run() -> None:
    layer = nn.Conv2d(2, 2, 1, groups=2)
    layer.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    patches_of(layer, torch.zeros(1, 2, 3, 3))


def test_what_is_not_grouped() -> None:
    assert not is_grouped(nn.Conv2d(4, 4, 3))
    assert not is_grouped(nn.Linear(4, 4))
