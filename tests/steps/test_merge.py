"""Merge: one convolution computes what two did, borders and all, or the two stay."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.edits import replay
from penjing.model import Model
from penjing.recipe import Edit, Recipe
from penjing.steps.fold import Fold
from penjing.steps.merge import Merge
from penjing.storededits import pack, unpack
from penjing.writers import onnx as writer


def _chain(*layers: nn.Module, size: tuple[int, int] = (11, 14)) -> Model:
    torch.manual_seed(0)
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    module = net.randomize_norms(nn.Sequential(*layers))
    return net.wrap(module, "tensor", {"x": torch.randn(2, 6, *size)})


def _merged(model: Model, *before: Any) -> tuple[Model, list[str]]:
    applied = apply(model, Recipe((*before, Merge())))
    return applied.model, [d.path for d in applied.done if d.kind == "merge"]


def _same(model: Model, small: Model) -> None:
    for seed, size in enumerate([(11, 14), (9, 9), (16, 23)]):
        x = torch.randn(3, 6, *size, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            wanted = model.module(x)
            torch.testing.assert_close(small.module(x), wanted, rtol=1e-4,
                                       atol=1e-5 * float(wanted.abs().max()))  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"kernel_size": 3, "padding": 1}, {"kernel_size": 1}),
        ({"kernel_size": 1}, {"kernel_size": 3}),
        ({"kernel_size": 1, "bias": False}, {"kernel_size": 3, "padding": 1}),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 1, "stride": 2}),
        ({"kernel_size": 1, "stride": 2, "bias": False},
         {"kernel_size": (1, 2), "padding": (0, 1), "stride": (2, 1)}),
        ({"kernel_size": (3, 1), "padding": (2, 0)}, {"kernel_size": (1, 3), "bias": False}),
    ],
)  # fmt: skip
def test_what_two_convolutions_compute(first: dict[str, Any], second: dict[str, Any]) -> None:
    model = _chain(nn.Conv2d(6, 24, **first), nn.Conv2d(24, 7, **second))
    small, paths = _merged(model)
    assert paths == ["0"]
    assert isinstance(small.module[1], nn.Identity)
    assert small.parameter_count < model.parameter_count
    _same(model, small)


def test_a_kernel_by_hand() -> None:
    """In one dimension: (a + b z)(c + d z^2), as the second looks at every other place."""
    model = net.wrap(
        nn.Sequential(nn.Conv2d(1, 3, (1, 2), (1, 2), bias=False), nn.Conv2d(3, 1, (1, 2))),
        "tensor", {"x": torch.randn(1, 1, 1, 12)},
    )  # fmt: skip
    small, _ = _merged(model)
    one, two = (model.module[i].weight.detach()[:, :, 0] for i in (0, 1))
    wanted = [sum(float(two[0, m, a] * one[m, 0, b]) for m in range(3))
              for a in (0, 1) for b in (0, 1)]  # fmt: skip
    assert small.module[0].weight.flatten().tolist() == pytest.approx(wanted, rel=1e-5)
    assert small.module[0].stride == (1, 2)


def test_batch_norms_between_are_folded_first_and_chains_become_one() -> None:
    model = _chain(
        nn.Conv2d(6, 20, 3, padding=1), nn.BatchNorm2d(20), nn.Conv2d(20, 20, 1),
        nn.BatchNorm2d(20), nn.Conv2d(20, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 3, 3),
    )  # fmt: skip
    assert _merged(model)[1] == []
    small, paths = _merged(model, Fold())
    assert paths == ["0", "0"]
    assert [type(m) for m in small.module].count(nn.Conv2d) == 2
    _same(model, small)


class _Residual(nn.Module):
    """What the first gives is also added to what the second gives, or is changed in between."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.one, self.two, self.way = nn.Conv2d(6, 24, 1), nn.Conv2d(24, 24, 1), way
        self.out = nn.Conv2d(24, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.way == "activated":
            x = x.relu()
        if self.way == "in place":
            x.mul_(2)
        y = self.two(x)
        return self.out(torch.relu(x + y if self.way == "added" else y))


@pytest.mark.parametrize("way", ["added", "activated", "in place", "alone"])
def test_nothing_else_may_read_or_change_what_is_between(way: str) -> None:
    model = net.wrap(_Residual(way), "tensor", {"x": torch.randn(2, 6, 9, 9)})
    small, paths = _merged(model)
    assert paths == (["one"] if way == "alone" else [])
    _same(model, small)


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ({"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1}, "borders"),
        ({"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, "bias"),
        ({"kernel_size": 1, "padding": 1, "bias": False}, {"kernel_size": 3, "padding": 1},
         "borders"),
        ({"kernel_size": 1, "groups": 2}, {"kernel_size": 1}, "groups"),
        ({"kernel_size": 3, "dilation": 2}, {"kernel_size": 1}, "dilated"),
        ({"kernel_size": 3, "padding": "same"}, {"kernel_size": 1}, "by name"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, {"kernel_size": 1}, "own"),
    ],
)  # fmt: skip
def test_what_is_not_exact_stays_and_says_why(
    first: dict[str, Any], second: dict[str, Any], why: str
) -> None:
    model = _chain(nn.Conv2d(6, 24, **first), nn.Conv2d(24, 7, **second))
    small, paths = _merged(model)
    assert paths == []
    assert why in small.left["0"]
    assert net.same(model, small)


def test_what_would_be_larger_stays() -> None:
    model = _chain(nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1))
    assert "36 weights in place of 24" in _merged(model)[0].left["0"]
    # A border that differs is seen when it is run, whatever the rules say.
    from penjing.steps.merge import _tried

    padded = _chain(nn.Conv2d(6, 24, 3, padding=1), nn.Conv2d(24, 7, 3, padding=1))
    assert "outputs differ" in _tried(padded, Edit("merge", "0", "1", ""))


def test_it_is_made_again_and_exported(tmp_path: Path) -> None:
    model = _chain(nn.Conv2d(6, 20, 3, padding=1), nn.Conv2d(20, 4, 1))
    small, _ = _merged(model)
    (edit,) = unpack(*pack([Edit("merge", "0", "1", "why")]))
    assert (edit.kind, edit.value) == ("merge", "1")
    again = model.copy()
    replay(again, small.structure)
    again.module.load_state_dict(small.module.state_dict())
    assert torch.equal(again.run(model.example), small.run(model.example))
    writer.write(small, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 0
