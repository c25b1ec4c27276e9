"""Preflight: which runtimes are worth an export."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.fit.check import worth, zeros
from penjing.fit.preflight import Speed
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps.prune import Prune

BOTH = ["onnxruntime", "openvino"]


def _speeds(**microseconds: dict[str, float | None]) -> list[Speed]:
    return [
        Speed(runtime, name, 128, 32, 48, taken, None)
        for runtime, own in microseconds.items()
        for name, taken in own.items()
    ]


def _kept(model: Model, **microseconds: dict[str, float | None]) -> list[str]:
    return worth(model, BOTH, _speeds(**microseconds))


def test_a_runtime_far_behind_in_its_best_format_is_left() -> None:
    first, second = {"fp32": 100.0, "int8": 60.0}, {"fp32": 95.0, "int8": 130.0}
    assert _kept(net.bert(), onnxruntime=first, openvino=second) == ["onnxruntime"]
    assert _kept(net.bert(), onnxruntime=second, openvino=first) == ["openvino"]


def test_a_little_behind_is_worth_an_export() -> None:
    first, second = {"fp32": 100.0, "int8": 60.0}, {"fp32": 89.0, "int8": 130.0}
    assert _kept(net.bert(), onnxruntime=first, openvino=second) == BOTH


def test_only_formats_of_this_kind_of_network_count() -> None:
    """An encoder is not stored in 4 bits for speed; a decoder has no 8-bit inputs."""
    first, second = {"fp32": 100.0, "int8": 50.0, "w4": 90.0}, {"fp32": 200.0, "w4": 10.0}
    assert _kept(net.bert(), onnxruntime=first, openvino=second) == ["onnxruntime"]
    assert _kept(net.llama(), onnxruntime=first, openvino=second) == ["openvino"]


def test_one_layer_says_little_of_a_convolutional_network() -> None:
    first, second = {"fp32": 100.0, "int8": 50.0}, {"fp32": 900.0, "int8": 900.0}
    assert _kept(net.resnet(), onnxruntime=first, openvino=second) == BOTH


def test_what_was_not_measured_is_not_left() -> None:
    first, second = {"fp32": 100.0, "int8": 50.0}, {"fp32": None, "int8": None}
    assert _kept(net.bert(), onnxruntime=first, openvino=second) == BOTH


def test_the_report_says_that_zeros_are_not_skipped() -> None:
    model = net.stack()
    assert zeros(model) == []
    made = apply(model, Recipe((Prune(0.5, "magnitude"),))).model
    gone = sum(int((made.module.get_parameter(n) == 0).sum()) for n in made.masks)
    [note] = zeros(made)
    assert f"{gone / made.parameter_count:.0%} of the weights" in note
    assert "no runtime here skips zeros" in note
