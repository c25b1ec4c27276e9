"""Channels: exactly those that can be divided, by the structure written down by hand."""

from __future__ import annotations

import copy
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
from penjing.calibrate import Stream
from penjing.channels import Channels, last_channels, shared_channels


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


def block(model: Any, index: int = 0) -> list[Channels]:
    """The sets of one block, in float64."""
    stream = Stream(model, [model.example])
    stream.enter(index)
    call = stream.sample().double()
    module = copy.deepcopy(model.module.get_submodule(model.blocks[index])).double()
    linear = {n for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    return last_channels(module, lambda: call.run(module, call.hidden), linear, linear)


def test_a_decoder_with_grouped_queries() -> None:
    # 8 heads of 4 read 4 heads of values: heads 0 and 1 the first, and so on.
    columns = tuple(4 * (head // 2) + i for head in range(8) for i in range(4))
    attention = tuple(f"self_attn.{n}_proj" for n in "qkv")
    assert block(net.llama(2)) == [
        Channels(32, ("input_layernorm",), attention),
        Channels(16, ("self_attn.v_proj",), ("self_attn.o_proj",), columns),
        Channels(32, ("post_attention_layernorm",), ("mlp.gate_proj", "mlp.up_proj")),
        Channels(48, ("mlp.up_proj",), ("mlp.down_proj",)),
    ]


def test_a_post_norm_encoder_has_its_values_alone() -> None:
    values = Channels(32, ("attention.self.value",), ("attention.output.dense",))
    assert block(net.bert(2), 1) == [values]
    relu = Channels(48, ("intermediate.dense",), ("output.dense",))
    assert block(net.bert(2, hidden_act="relu"), 1) == [values, relu]


class Last(nn.Module):
    """A norm and two layers, joined as `run` says."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


NORM_UP, UP_DOWN = Channels(6, ("norm",), ("up",)), Channels(8, ("up",), ("down",))
LAST: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[Channels]]] = {
    "a chain": (lambda m, x: m.down(m.up(m.norm(x))), [NORM_UP, UP_DOWN]),
    "relu": (lambda m, x: x + m.down(torch.relu(m.up(m.norm(x)))), [NORM_UP, UP_DOWN]),
    "gelu": (lambda m, x: x + m.down(F.gelu(m.up(m.norm(x)))), [NORM_UP]),
    "squared": (lambda m, x: m.down(m.up(m.norm(x)).square()), [NORM_UP]),
    "post-norm": (lambda m, x: m.down(torch.relu(m.up(y := m.norm(x)))) + y, [UP_DOWN]),
    "a view": (lambda m, x: m.down(F.gelu(m.up(m.norm(x)[:, 0:, :]))), [NORM_UP]),
    "one added": (lambda m, x: m.down(m.up(m.norm(x)) + 1), [NORM_UP]),
    "mixed": (lambda m, x: m.down((y := m.up(m.norm(x))) + y.flip(-1)), [NORM_UP]),
    "turned": (
        lambda m, x: m.down(m.up(m.norm(x)).flip(-1)),
        [NORM_UP, Channels(8, ("up",), ("down",), (7, 6, 5, 4, 3, 2, 1, 0))],
    ),
    "read twice": (lambda m, x: m.down(y := m.up(m.norm(x))) + y.mean(), [NORM_UP]),
    "run twice": (lambda m, x: m.norm(m.down(m.up(m.norm(x)))), [UP_DOWN]),
}


@pytest.mark.parametrize("name", LAST)
def test_what_is_free_in_the_last_dimension(name: str) -> None:
    run, wanted = LAST[name]
    torch.manual_seed(0)
    module, x = Last(run).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    names = {"up", "down"}
    assert last_channels(module, lambda: module(x), names, names) == wanted
    some = [own for own in wanted if set(own.readers) <= {"up"}]
    assert last_channels(module, lambda: module(x), {"up"}, names) == some
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
