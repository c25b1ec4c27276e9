"""Fold: exact where a norm follows a convolution alone, and nothing otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.errors import InputError
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps.fold import Fold, has_norms
from penjing.steps.quantize import Quantize


def _norms(model: Model) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.module.modules())


def test_every_pair_of_a_residual_network() -> None:
    model = net.resnet()
    assert _norms(model) == 10
    folded = apply(model, Recipe((Fold(),))).model
    assert _norms(folded) == 0
    assert not has_norms(folded)
    assert has_norms(model)
    for seed in range(3):
        x = {"x": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}
        torch.testing.assert_close(folded.run(x), model.run(x), rtol=1e-5, atol=1e-5)
    # A bias that was not there is there now.
    assert model.module.layer1[0].conv1.bias is None
    assert folded.module.layer1[0].conv1.bias.shape == (8,)


def test_one_convolution_and_norm_by_hand() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
    net.randomize_norms(norm)
    model = net.wrap(nn.Sequential(conv, norm), "tensor", {"x": torch.randn(1, 2, 5, 5)})
    folded = apply(model, Recipe((Fold(),))).model.module[0]
    for channel in range(3):
        scale = norm.weight[channel] / (norm.running_var[channel] + 1e-5) ** 0.5
        torch.testing.assert_close(folded.weight[channel], conv.weight[channel] * scale)
        bias = (conv.bias[channel] - norm.running_mean[channel]) * scale + norm.bias[channel]
        torch.testing.assert_close(folded.bias[channel], bias)


class Odd(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, **options)
        self.other = nn.BatchNorm2d(4)
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


def _branch(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + torch.relu(y)


def _branch_of_a_branch(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) * y.mean()


LEFT: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "its output is read twice": (_branch, {}),
    "its output scales": (_branch_of_a_branch, {}),
    "two norms": (lambda m, x: m.norm(y := m.conv(x)) + m.other(y), {}),
    "run twice": (lambda m, x: m.norm(m.conv(m.conv(x))), {}),
    "norm run twice": (lambda m, x: m.norm(x) + m.norm(m.conv(x)), {}),
    "relu between": (lambda m, x: m.norm(torch.relu(m.conv(x))), {}),
    "relu in place between": (lambda m, x: m.norm(torch.relu_(m.conv(x))), {}),
    "norm before": (lambda m, x: m.conv(m.norm(x)), {}),
    "statistics of the batch": (lambda m, x: m.norm(m.conv(x)), {"track_running_stats": False}),
}


def _odd(name: str, run: Callable[[Any, Tensor], Tensor], options: dict[str, Any]) -> Model:
    torch.manual_seed(0)
    module = Odd(run, **options)
    if options.get("track_running_stats", True):
        net.randomize_norms(module)
    return net.wrap(module, "tensor", {"x": torch.randn(2, 4, 5, 5)})


@pytest.mark.parametrize("name", LEFT)
def test_what_does_not_fold_is_left_alone(name: str) -> None:
    model = _odd(name, *LEFT[name])
    folded = apply(model, Recipe((Fold(),)))
    assert folded.done == []
    assert torch.equal(folded.model.run(model.example), model.run(model.example))


def test_a_norm_without_scale_folds() -> None:
    model = _odd("plain", lambda m, x: m.norm(m.conv(x)), {"affine": False})
    folded = apply(model, Recipe((Fold(),)))
    assert [(d.path, d.kind) for d in folded.done] == [("conv", "fold")]
    torch.testing.assert_close(folded.model.run(model.example), model.run(model.example))


def test_one_bad_pair_does_not_spoil_the_others() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = Odd(lambda m, x: m.norm(m.conv(x)))
            self.bad = Odd(_branch)

        def forward(self, x: Tensor) -> Tensor:
            return self.bad(torch.relu(self.good(x)))

    torch.manual_seed(0)
    model = net.wrap(net.randomize_norms(Two()), "tensor", {"x": torch.randn(1, 4, 5, 5)})
    folded = apply(model, Recipe((Fold(),)))
    assert [d.path for d in folded.done] == ["good.conv"]
    torch.testing.assert_close(folded.model.run(model.example), model.run(model.example))


def test_targets() -> None:
    done = apply(net.resnet(), Recipe((Fold(targets=("layer1.*",)),))).done
    assert [d.path for d in done] == [f"layer1.{b}.conv{c}" for b in (0, 1) for c in (1, 2)]


def test_a_quantized_convolution_is_not_folded() -> None:
    with pytest.raises(InputError, match="quantized already"):
        apply(net.resnet(), Recipe((Quantize(method="rtn"), Fold())))
