"""Channels: exactly those that can be divided, by the structure written down by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.channels import Channels, shared_channels


class Two(nn.Module):
    """Two convolutions and a linear layer, joined as `run` says."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.end = nn.Linear(4, 5)
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


def found(run: Callable[[Any, Tensor], Tensor]) -> list[Channels]:
    torch.manual_seed(0)
    model = net.wrap(Two(run), "tensor", {"x": torch.randn(2, 3, 6, 6)})
    return shared_channels(model)


def end(m: Two, x: Tensor) -> Tensor:
    return m.end(x.mean((2, 3)))


ONE_TWO = Channels(4, ("one",), ("two",))
TWO_END = Channels(4, ("two",), ("end",))

FREE: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[Channels]]] = {
    "a chain": (lambda m, x: end(m, m.two(m.one(x))), [ONE_TWO, TWO_END]),
    "relu": (lambda m, x: end(m, m.two(torch.relu(m.one(x)))), [ONE_TWO, TWO_END]),
    "in place": (lambda m, x: end(m, m.two(torch.relu_(m.one(x)))), [ONE_TWO, TWO_END]),
    "leaky relu": (lambda m, x: end(m, m.two(F.leaky_relu(m.one(x)))), [ONE_TWO, TWO_END]),
    "max pooling": (lambda m, x: end(m, m.two(F.max_pool2d(m.one(x), 2))), [ONE_TWO, TWO_END]),
    "padding": (lambda m, x: end(m, m.two(F.pad(m.one(x), (1, 1)))), [ONE_TWO, TWO_END]),
    "flattened": (
        lambda m, x: m.end(F.adaptive_avg_pool2d(m.two(m.one(x)), 1).flatten(1)),
        [ONE_TWO, TWO_END],
    ),
    "residual": (
        lambda m, x: end(m, m.two(torch.relu(y := m.one(x))) + y),
        [Channels(4, ("one", "two"), ("two", "end"))],
    ),
    "relu6": (lambda m, x: end(m, m.two(F.relu6(m.one(x)))), [TWO_END]),
    "gelu": (lambda m, x: end(m, m.two(F.gelu(m.one(x)))), [TWO_END]),
    "one added": (lambda m, x: end(m, m.two(m.one(x) + 1)), [TWO_END]),
    "a constant added": (lambda m, x: end(m, m.two(m.one(x) + torch.ones(4, 6, 6))), [TWO_END]),
    "padding with ones": (
        lambda m, x: end(m, m.two(F.pad(m.one(x), (1, 1), value=1.0))), [TWO_END],
    ),
    "a gate": (lambda m, x: end(m, m.two((y := m.one(x)) * y)), [TWO_END]),
    "mean over channels": (
        lambda m, x: end(m, m.two((y := m.one(x)) - y.mean(1, keepdim=True))), [TWO_END],
    ),
    "channels turned": (lambda m, x: end(m, m.two(m.one(x).flip(1))), [TWO_END]),
    "places in the row": (
        lambda m, x: m.end(F.adaptive_avg_pool2d(m.two(m.one(x)), 2).flatten(2).transpose(1, 2)),
        [ONE_TWO],
    ),
    "run twice": (lambda m, x: end(m, m.two(m.two(m.one(x)))), []),
    "given out": (lambda m, x: m.two(m.one(x)), [ONE_TWO]),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_what_is_free(name: str) -> None:
    run, wanted = FREE[name]
    assert found(run) == wanted


def test_a_shared_weight_is_not_free() -> None:
    module = Two(lambda m, x: end(m, m.two(m.one(x))))
    module.other = nn.Conv2d(4, 4, 3)
    module.other.weight = module.two.weight
    model = net.wrap(module, "tensor", {"x": torch.randn(2, 3, 6, 6)})
    assert shared_channels(model) == []


def test_no_hook_is_left() -> None:
    model = net.wrap(
        Two(lambda m, x: end(m, m.two(m.one(x)))), "tensor", {"x": torch.randn(1, 3, 6, 6)}
    )
    shared_channels(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
