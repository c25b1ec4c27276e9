"""Equalize: the same network, with channels of one range."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.equalize import Pair, equalize
from penjing.errors import UsageError
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps.equalize import Equalize
from penjing.steps.fold import Fold
from penjing.steps.quantize import Quantize


class Mobile(nn.Module):
    """Inverted residuals: expand, depthwise, project, with ReLU6 and a stream between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.nn.functional.relu6(self.expand(x))
        y = torch.nn.functional.relu6(self.depthwise(y))
        return self.head(x + self.project(y)).mean((2, 3))


def uneven() -> Model:
    """With stream channels between a hundredth and a hundred."""
    torch.manual_seed(0)
    module = Mobile()
    s = torch.logspace(-2, 2, 8)
    with torch.no_grad():
        for layer in (module.stem, module.project):
            layer.weight.mul_(s.reshape(-1, 1, 1, 1))
            layer.bias.mul_(s)
        for layer in (module.expand, module.head):
            layer.weight.div_(s.reshape(1, -1, 1, 1))
    return net.wrap(module, "tensor", {"x": torch.randn(2, 3, 8, 8)})


def data(count: int = 4) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 3, 8, 8, generator=g)} for _ in range(count)]


def stream(model: Model) -> Tensor:
    """Largest value of each stream channel."""
    kept = []
    handle = model.module.head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        for batch in data():
            model.run(batch)
    handle.remove()
    return torch.cat(kept).abs().amax((0, 2, 3))


@pytest.mark.parametrize("batches", [data(), []], ids=["data", "no data"])
def test_the_network_is_the_same_and_its_stream_is_even(batches: list[dict[str, Tensor]]) -> None:
    model = uneven()
    made = apply(model, Recipe((Equalize(floor=0.0),)), batches)
    x = {"x": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))}
    torch.testing.assert_close(made.model.run(x), model.run(x), rtol=1e-4, atol=1e-5)
    assert {d.path.partition(".")[0] for d in made.done} == {"stem", "project", "expand", "head"}
    was, now = stream(model), stream(made.model)
    assert float(was.max() / was.min()) > 1000
    assert float(now.max() / now.min()) < 10


def test_relu6_is_left_alone() -> None:
    made = apply(uneven(), Recipe((Equalize(),)), data())
    assert not any("depthwise" in d.path for d in made.done)


def test_without_data_a_pair_is_cross_layer_equalisation() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3)
    with torch.no_grad():
        first.weight.mul_(torch.logspace(-1, 1, 6).reshape(-1, 1, 1, 1))
    model = net.wrap(
        nn.Sequential(first, nn.ReLU(), second), "tensor", {"x": torch.randn(1, 2, 9, 9)}
    )
    made = apply(model, Recipe((Equalize(alpha=0.5, floor=0.0),))).model.module
    wanted = equalize(Pair(first.weight, first.bias, second.weight))
    # The step's factors have a geometric mean of 1.
    ratio = made[0].weight / wanted.first
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4, atol=0)
    torch.testing.assert_close(made[0].bias, wanted.bias * ratio.flatten()[0])
    torch.testing.assert_close(made[2].weight * ratio.flatten()[0], wanted.second)


def test_a_depthwise_reader() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 4, 1)
    )
    with torch.no_grad():
        module[0].weight.mul_(torch.logspace(-1, 1, 6).reshape(-1, 1, 1, 1))
    model = net.wrap(module, "tensor", {"x": torch.randn(2, 3, 6, 6)})
    made = apply(model, Recipe((Equalize(),)), [model.example])
    assert {d.path for d in made.done} >= {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight"}
    torch.testing.assert_close(
        made.model.run(model.example), model.run(model.example), rtol=1e-4, atol=1e-5
    )


def test_less_error_of_8_bit_inputs() -> None:
    model = uneven()
    errors = []
    for first in ((), (Equalize(floor=0.0),)):
        step = Quantize(bits=8, symmetric=True, activations=8, method="rtn")
        made = apply(model, Recipe((*first, step)), data()).model
        with torch.no_grad():
            errors.append(float((made.run(data()[0]) - model.run(data()[0])).norm()))
    assert errors[1] < errors[0] / 3


def test_targets_leave_whole_sets() -> None:
    assert apply(uneven(), Recipe((Equalize(targets=("stem", "expand")),)), data()).done == []


def test_a_residual_network_with_folded_norms() -> None:
    model = net.resnet()
    made = apply(model, Recipe((Fold(), Equalize()))).model
    x = {"x": torch.randn(2, 3, 8, 8)}
    torch.testing.assert_close(made.run(x), model.run(x), rtol=1e-4, atol=1e-5)


def test_a_quantized_network_is_left_alone() -> None:
    step = Quantize(method="rtn")
    assert not [d for d in apply(uneven(), Recipe((step, Equalize()))).done if d.step == "equalize"]


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"floor": -1}])
def test_options(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Equalize(**options)
