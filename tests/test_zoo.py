"""A few of the architectures of bench/zoo.toml, by the row that its table has for them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import zoo


def test_the_list_is_long_enough_and_its_classes_are_there() -> None:
    import transformers

    assert len(zoo.IMAGES) >= 40
    assert len(zoo.TEXTS) >= 50
    assert all(hasattr(transformers, own["class"]) for own in (zoo.IMAGES | zoo.TEXTS).values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["MobileNetV2", "Swin", "GPT-NeoX", "Mixtral"])
def test_half_of_all_channels_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "Swin":  # one export is enough here
        monkeypatch.setattr(zoo, "exported", lambda small, inputs: {"onnx": 0.0})
    with torch.no_grad():
        found = zoo.row(name)
    assert found["groups"] >= 4
    assert found["left"] == 0
    assert found["off"] < 1e-4
    assert found["again"]
    assert found["onnx"] < 1e-4
    assert found["parameters"] < 0.9
