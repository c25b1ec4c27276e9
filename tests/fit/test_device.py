"""Latencies of a device from its profile: by hand, and on this machine with one core."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from penjing import profiles
from penjing.errors import InputError, UsageError
from penjing.fit import device as devices
from penjing.fit.device import Device, products
from penjing.fit.space import FORMATS
from penjing.measure import Measured
from penjing.model import Model, Source
from penjing.planes import Scheme
from penjing.profiles import Product, Profile, parse, read
from penjing.quantizers import rtn
from penjing.recipe import ActivationRange
from penjing.result import Latency, Measurement


def table(microseconds: dict[str, float], threads: tuple[int, ...] = (1,)) -> dict[str, Any]:
    """A machine on which a product takes as long as another of its format."""
    return {
        "format": 1, "runtime": "onnxruntime", "processor": "a board", "flags": [], "cores": 4,
        "memory_bytes": 10**9, "bytes_per_second": 1e9,
        "kernels": [
            {"format": form, "tokens": t, "inputs": i, "outputs": o, "threads": n,
             "microseconds": microseconds[form] * t * i * o / 1e6}
            for n in threads for form in FORMATS for t, i, o in ((1, 8, 8), (16, 8, 8), (16, 8, 32))
        ],
    }  # fmt: skip


EVEN = {"fp32": 1.0, "int8": 1.0, "w8": 1.0, "w4": 1.0}
BOARD = {"fp32": 10.0, "int8": 2.0, "w8": 8.0, "w4": 8.0}


def measured(milliseconds: float) -> Measured:
    latency = Latency(milliseconds, 2 * milliseconds, 1, None)
    return Measured(Measurement(1, 1, 8.0, latency, 1), (milliseconds,) * 3)


def network() -> Model:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))
    x = torch.randn(2, 5, 8)
    return Model(layers.eval(), "tensor", {"x": x}, Source("factory", "tiny", "0"))


def test_a_shape_of_the_table_has_its_time_and_others_that_of_their_neighbours() -> None:
    profile = parse(table(BOARD))
    assert profile.threads == [1]
    got = profile.seconds([Product("fp32", 16, 8, 32)], 1)
    assert got == pytest.approx(10e-12 * 16 * 8 * 32, rel=1e-3)
    # One rate everywhere, so any shape has it.
    odd = [Product("int8", 3.5, 100, 7), Product("fp32", 2, 8, 8)]
    want = 2e-12 * 3.5 * 700 + 10e-12 * 128
    assert profile.seconds(odd, 1) == pytest.approx(want)
    slow, fast = {(1, 8, 8): 1e9}, {(1, 8, 512): 4e9}
    between = Profile("", 1, 0, 1.0, {(1, "fp32"): slow | fast})
    assert between.seconds([Product("fp32", 1, 8, 64)], 1) == pytest.approx(512 / 2.5e9)


def test_layers_by_shape_and_format() -> None:
    model = network()
    for name in ("0.weight", "2.weight"):
        weight = model.module.get_parameter(name).detach()
        model.planes[name] = rtn.fit(weight, Scheme(8, 0, True))
    model.activations["0"] = ActivationRange(0.1, 128)
    found = products(model, batch=3, length=128)
    assert found == [Product("int8", 15, 8, 32), Product("w8", 15, 32, 8)]


def test_what_is_no_product_slows_down_as_floats_do() -> None:
    """8 x 32 x 5 products twice: 2560 of 1 us in a million here; ten times that on the board."""
    model = network()
    here, board = parse(table(EVEN, (2,))), parse(table(BOARD))
    device = Device("board.json", board, 1, here, 2)
    rest = 0.5
    own = 2560e-12 * 1e3  # milliseconds
    found = device.there(model, measured(own + rest), batch=1, length=1)
    assert found.measurement.latency_ms.median == pytest.approx(10 * own + 10 * rest)
    assert found.rounds_ms[0] == pytest.approx(10 * own + 10 * rest)
    model.activations["0"] = model.activations["2"] = ActivationRange(0.1, 128)
    found = device.there(model, measured(own + rest), batch=1, length=1)
    assert found.measurement.latency_ms.median == pytest.approx(2 * own + 10 * rest)
    assert "not measured" in device.describe()


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"kernels": []},
        {"kernels": table(EVEN)["kernels"][:1]},
        {"kernels": [table(EVEN)["kernels"][0] | {"microseconds": math.nan}]},
        {"processor": None, "cores": None},
    ],
)
def test_what_is_no_profile_is_told(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "pi.json"
    path.write_text(json.dumps(table(EVEN) | change))
    with pytest.raises(InputError, match="not a profile"):
        read(path)
    for text in ("", "[]", "{", "3"):
        path.write_text(text)
        with pytest.raises(InputError, match="not a profile"):
            read(path)
    with pytest.raises(InputError, match="not a profile"):
        read(tmp_path / "none.json")


def test_a_profile_has_the_formats_of_a_fit() -> None:
    assert set(profiles.FORMATS) == set(FORMATS)


def test_threads_must_be_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pi.json"
    path.write_text(json.dumps(table(BOARD, (1, 4))))
    asked: list[dict[str, Any]] = []

    def record(**options: Any) -> dict[str, Any]:
        asked.append(options)
        return table(EVEN, options["threads"])

    monkeypatch.setattr(devices, "record", record)
    assert Device.load(path, threads=None, threads_here=2).threads == 4
    assert asked[0]["threads"] == (2,)
    assert asked[0]["shapes"] == [(8, 8), (8, 32)]
    assert asked[0]["tokens"] == [1, 16]
    with pytest.raises(UsageError, match="recorded"):
        Device.load(path, threads=3, threads_here=2)
