"""Units measured in any order and by any number of workers: the same errors, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import penjing
from penjing.fit.survey import survey
from penjing.fit.units import Units, fast
from penjing.model import Batch, Model
from penjing.workers import Where

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

def net():
    torch.manual_seed(0)
    return Net()

def example():
    return {"x": torch.zeros(2, 8)}
"""
FORMATS = ("fp32", "w8", "w4")


@pytest.fixture
def model(tmp_path: Path) -> Model:
    (tmp_path / "net.py").write_text(NET)
    return penjing.load(f"{tmp_path / 'net.py'}:net", weights="own")


@pytest.fixture
def data() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(16, 8, generator=generator)} for _ in range(3)]


def surveyed(model: Model, data: list[Batch], folder: Path, where: Where) -> dict[str, Any]:
    folder.mkdir()
    found = survey(
        model, data[:2], data[2:], lambda _: 0.0, FORMATS, limit=1.0, seconds=60, where=where,
        folder=folder,
    )  # fmt: skip
    assert found.complete
    return asdict(found) | {"seconds": 0.0}


def test_a_survey_is_the_same_with_workers(
    model: Model, data: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, where in (("alone", Where()), ("two", Where(workers=2))):
        monkeypatch.setenv("PENJING_CACHE", str(tmp_path / f"cache-{name}"))
        found.append(surveyed(model, data, tmp_path / name, where))
        assert list((tmp_path / f"cache-{name}").glob("survey-*.json"))
    assert found[0] == found[1]
    assert set(found[0]["formats"]["w4"]) == set(found[0]["cuts"]) == set("0123")
    assert found[0]["fresh"] == found[0]["evaluations"] > 15


def test_units_are_measured_in_any_order(
    model: Model, data: list[Batch], bert: Callable[..., Model], batches: Callable[..., list[Batch]]
) -> None:
    """A lost worker's unit is measured again by one that is further on."""
    for network, some in ((model, data), (bert(3), batches(3))):
        with fast(network):
            reference = [network.run(batch) for batch in some[2:]]
        units = [Units(network, some[:2], some[2:], ("fp32", "int8"), reference) for _ in range(2)]
        count = len(network.blocks) + 2
        forward = [units[0].measure((i, math.inf)) for i in range(count)]
        turned = [units[1].measure((i, math.inf)) for i in reversed(range(count))]
        assert turned[::-1] == forward
        assert units[1].measure((1, -1.0)) is None
        assert units[1].measure((0, -1.0)) == forward[0]
