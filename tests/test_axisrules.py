"""What single operations do to channels: one network each, with the units that can go by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing import axisrules
from penjing.channelmap import map_of
from penjing.coupling import drawn, remove, silence


class Wired(nn.Module):
    def __init__(
        self, forward: Callable[[Any, Tensor], Tensor], layers: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.scale = nn.Parameter(torch.randn(8))
        self._wire = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._wire(self, x)


def conv(inputs: int, outputs: int, size: int = 1, **more: Any) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, **more)


def _ab(inputs: int = 8, made: int = 8) -> dict[str, nn.Module]:
    return {"a": nn.Linear(6, made), "b": nn.Linear(inputs, 3)}


def _pixels(inputs: int = 8, made: int = 8) -> dict[str, nn.Module]:
    return {"a": conv(3, made), "b": conv(inputs, 3)}


@torch.library.custom_op("penjing_tests::roi_align", mutates_args=())
def roi_align(x: Tensor, boxes: Tensor) -> Tensor:
    """Pieces of two by two places of the first picture, where boxes [count, 2] begin."""
    return torch.stack([x[0, :, i : i + 2, j : j + 2] for i, j in boxes.long().tolist()])


FLAT, PIXELS = torch.randn(2, 5, 6), torch.randn(1, 3, 6, 6)
Forward = Callable[[Any, Tensor], Tensor]
# Forward, layers, input, and the units of the group that `a` makes; 0 where it stays.
RULES: dict[str, tuple[Forward, dict[str, nn.Module], Tensor, int]] = {
    "element by element": (lambda m, x: m.b(F.hardswish(m.a(x)) * 2 - 1), _ab(), FLAT, 8),
    "in place": (lambda m, x: m.b(m.a(x).relu_().mul_(3).add_(1)), _ab(), FLAT, 8),
    "a parameter": (lambda m, x: m.b(m.a(x) * m.scale), _ab(), FLAT, 8),
    "an expanded parameter": (lambda m, x: m.b(m.a(x) + m.scale.expand(2, 5, -1)), _ab(), FLAT, 8),
    "a mask of places": (lambda m, x: m.b(m.a(x).masked_fill(x[..., :1] > 0, 0.0)), _ab(), FLAT, 8),
    "a choice": (lambda m, x: m.b(torch.where(x[..., :1] > 0, m.a(x), -m.a(x))), _ab(), FLAT, 8),
    "a sum over places": (lambda m, x: m.b(m.a(x).cumsum(1).amax(1)), _ab(), FLAT, 8),
    "a sum over channels": (lambda m, x: m.b(m.a(x) * m.a(x).sum(-1, keepdim=True)), _ab(), FLAT, 0),  # noqa: E501
    "a softmax over channels": (lambda m, x: m.b(m.a(x).softmax(-1)), _ab(), FLAT, 0),
    "a softmax over places": (lambda m, x: m.b(m.a(x).softmax(1)), _ab(), FLAT, 8),
    "the largest channels": (lambda m, x: m.b(m.a(x).topk(8, -1).values), _ab(), FLAT, 0),
    "a fixed number a channel": (lambda m, x: m.b(m.a(x) + torch.arange(8.0)), _ab(), FLAT, 0),
    # Those that nothing reads may go; the others hold their number in the code.
    "a half": (lambda m, x: m.b(m.a(x)[..., :4]), _ab(4), FLAT, 4),
    "two halves": (lambda m, x: m.b(torch.mul(*m.a(x).chunk(2, -1))), _ab(4), FLAT, 4),
    "two halves of two": (lambda m, x: m.b(torch.cat(m.a(x).chunk(2, -1)[::-1], -1)), _ab(), FLAT, 4),  # noqa: E501
    "the end first": (lambda m, x: m.b(m.a(x).flip(-1)), _ab(), FLAT, 8),
    "rolled places": (lambda m, x: m.b(m.a(x).roll(2, 1)), _ab(), FLAT, 8),
    "chosen places": (lambda m, x: m.b(m.a(x)[:, torch.tensor([3, 0])]), _ab(), FLAT, 8),
    "parts chosen by the code": (
        lambda m, x: m.b(
            (m.a(x).view(2, 5, 2, -1)[:, :, [0]] * m.a(x).view(2, 5, 2, -1)[:, :, [1]]).flatten(2)
        ),
        _ab(4), FLAT, 4,
    ),
    "channels chosen by the input": (
        lambda m, x: torch.cat([m.b(m.a(x)), m.a(x)[..., x[0, 0].argsort()[:1]]], -1),
        _ab(), FLAT, 0,
    ),
    "gathered places": (
        lambda m, x: m.b(m.a(x).gather(1, torch.zeros(2, 1, 1, dtype=torch.long).expand(2, 1, m.a(x).shape[-1]))),  # noqa: E501
        _ab(), FLAT, 8,
    ),
    "two of each channel": (lambda m, x: m.b(m.a(x).repeat_interleave(2, -1)), _ab(16), FLAT, 8),
    "all channels twice": (lambda m, x: m.b(m.a(x).repeat(1, 1, 2)), _ab(16), FLAT, 8),
    "zeros beside": (lambda m, x: m.b(F.pad(m.a(x), (0, 2))), _ab(10), FLAT, 8),
    "zeros around places": (lambda m, x: m.b(F.pad(m.a(x), (1, 1, 2, 0))), _pixels(), PIXELS, 8),
    "mirrored places": (lambda m, x: m.b(F.pad(m.a(x), (1, 1, 2, 0), "reflect")), _pixels(), PIXELS, 8),  # noqa: E501
    "pooled": (lambda m, x: m.b(F.avg_pool2d(F.max_pool2d(m.a(x), 2), 3)), _pixels(), PIXELS, 8),
    "larger": (lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2, mode="bilinear")), _pixels(), PIXELS, 8),  # noqa: E501
    "places from channels": (lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), _pixels(2), PIXELS, 2),
    "channels from places": (lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2)), _pixels(32), PIXELS, 8),  # noqa: E501
    "unfolded": (
        lambda m, x: m.b(F.unfold(m.a(x), 3, padding=1).transpose(1, 2)),
        {"a": conv(3, 8), "b": nn.Linear(72, 3)}, PIXELS, 8,
    ),
    "windows": (
        lambda m, x: m.b(m.a(x).reshape(1, -1, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(4, 9, -1)),  # noqa: E501
        {"a": conv(3, 8), "b": nn.Linear(8, 3)}, PIXELS, 8,
    ),
    "a convolution of groups": (
        lambda m, x: m.b(m.g(m.a(x))),
        {"a": conv(3, 8), "g": conv(8, 12, 3, groups=4), "b": conv(12, 3)}, PIXELS, 4,
    ),
    "two outputs of each channel": (
        lambda m, x: m.b(m.g(m.a(x))),
        {"a": conv(3, 8), "g": conv(8, 16, 3, groups=8), "b": conv(16, 3)}, PIXELS, 8,
    ),
    "a transposed convolution of groups": (
        lambda m, x: m.b(m.g(m.a(x))),
        {"a": conv(3, 8), "g": nn.ConvTranspose2d(8, 8, 3, groups=4), "b": conv(8, 3)}, PIXELS, 4,
    ),
    "a batch norm": (
        lambda m, x: m.b(m.g(m.a(x))), {**_pixels(), "g": nn.BatchNorm2d(8)}, PIXELS, 8,
    ),
    "an instance norm": (
        lambda m, x: m.b(m.g(m.a(x))), {**_pixels(), "g": nn.InstanceNorm2d(8, affine=True)}, PIXELS, 8,  # noqa: E501
    ),
    "a norm of groups": (
        lambda m, x: m.b(m.g(m.a(x))), {**_pixels(), "g": nn.GroupNorm(2, 8)}, PIXELS, 2,
    ),
    "a norm": (lambda m, x: m.b(m.g(m.a(x))), {**_ab(), "g": nn.LayerNorm(8)}, FLAT, 0),
    "likeness": (lambda m, x: m.b(m.a(x) @ m.a(x).transpose(1, 2) @ m.a(x)), _ab(), FLAT, 0),
    "an Einstein sum": (
        lambda m, x: m.b(torch.einsum("btc,bsc->bts", m.a(x), m.a(x))), _ab(5), FLAT, 0,
    ),
    "a parameter in an Einstein sum": (
        lambda m, x: torch.einsum("btc,oc->bto", F.relu(m.a(x)), m.b.weight), _ab(), FLAT, 8,
    ),
    "into the output too": (lambda m, x: torch.cat([m.b(y := m.a(x)), y], -1), _ab(), FLAT, 0),
    "written into another": (
        lambda m, x: m.b(x.new_zeros(2, 5, m.a.out_features).copy_(m.a(x))), _ab(), FLAT, 8,
    ),
    "rows written by their places": (
        lambda m, x: m.b(x.new_zeros(2, 5, m.a.out_features).index_put_(
            (torch.tensor([1]),), m.a(x[:1]))), _ab(), FLAT, 8,
    ),
    "channels written by their places": (
        lambda m, x: m.b(x.new_zeros(2, 5, 8).index_put_(
            (torch.arange(2).view(2, 1, 1), torch.arange(5).view(1, 5, 1),
             torch.arange(7, -1, -1)), m.a(x))), _ab(), FLAT, 0,
    ),
    "regions of pictures": (
        lambda m, x: m.b(torch.ops.penjing_tests.roi_align(m.a(x), x.new_tensor([[1.0, 0.0]]))),
        _pixels(), PIXELS, 8,
    ),
    "prelu": (lambda m, x: m.b(m.g(m.a(x))), {**_pixels(), "g": nn.PReLU(8)}, PIXELS, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_units_are_those_found_by_hand(name: str) -> None:
    forward, layers, x, units = RULES[name]
    torch.manual_seed(0)
    module = Wired(forward, layers).eval()
    found = map_of(module, lambda m, dtype: m(x.to(dtype)))
    own = [one for one in found.free
           if any(m.name == "a.weight" and m.dim == 0 for m in one.group.members)]  # fmt: skip
    if not units:
        assert own == []
        assert ("a.weight", 0) in {(f.name, f.dim) for f in found.frozen}
        return
    (one,) = own
    assert one.group.count == units
    # Proved there by half of them; here by every one alone, on other numbers.
    for gone in range(units):
        large, small = drawn(module, seed=7), drawn(module, seed=7)
        plans = [(one.group, [u for u in range(units) if u != gone])]
        silence(large, plans)
        remove(small, plans, one.settings(units - 1))
        with torch.no_grad():
            torch.testing.assert_close(small(x.double()), large(x.double()), rtol=1e-9, atol=1e-9)


def test_a_matrix_of_more_labels_than_are_made_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(axisrules, "_MANY", 12)
    module = Wired(lambda m, x: F.linear(m.a(x), m.b.weight.t().t()), _ab()).eval()
    (one,) = map_of(module, lambda m, dtype: m(FLAT.to(dtype))).free
    assert one.group.count == 8
    # What has to be made anew is not: they stay.
    module = Wired(lambda m, x: m.b(torch.cat([m.a(x)], -1)), _ab()).eval()
    found = map_of(module, lambda m, dtype: m(FLAT.to(dtype)))
    assert not found.free
    assert any("very large" in f.reason for f in found.frozen)
