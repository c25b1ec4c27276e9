"""Whole fits of a tiny network for another machine than the one they run on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fit.test_device import EVEN, table
from torch import nn

from penjing.data import Dataset, read
from penjing.errors import InputError, UsageError
from penjing.fit import Budget, Settings, bench, fit, loop
from penjing.fit import device as devices
from penjing.model import Model, Source
from penjing.result import Result
from penjing.tasks import find

SETTINGS = {"length": 1, "threads": 1, "recover": 0.0, "tries": 1}


def network() -> Model:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 6)
    )
    example = {"x": torch.randn(2, 48)}
    return Model(layers.eval(), "tensor", example, Source("factory", "tiny", "0"))


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    x = np.random.default_rng(0).standard_normal((64, 48), np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    return read(tmp_path / "x.npz")


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """Medians of all files that were timed; and no micro-benchmark."""
    found: list[float] = []
    real = bench.measure_files

    def measure(*arguments: Any, **options: Any) -> Any:
        many = real(*arguments, **(options | {"runs": 5, "seconds": 1.0}))
        found.extend(one.measurement.latency_ms.median for one in many)
        return many

    monkeypatch.setattr(bench, "measure_files", measure)
    monkeypatch.setattr(loop, "preflight", lambda *given: ([], given[2]))
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "cache"))
    return found


def run(data: Dataset, output: Path, **options: Any) -> Result:
    model = network()
    task = find("fidelity", data, model)
    return fit(model, data, output, task, Budget(max_drop=0.5), Settings(**(SETTINGS | options)))


def profile(path: Path, here: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> str:
    """A profile at `path`; this machine is one where all formats are alike."""
    import json

    path.write_text(json.dumps(table(here)))
    monkeypatch.setattr(devices, "record", lambda **given: table(EVEN, given["threads"]))
    return str(path)


def formats(result: Result) -> set[str]:
    """`int8` where the best point has 8-bit inputs, else `fp32`."""
    best = min(result.front, key=lambda p: p.size_bytes != result.after.size_bytes)
    return {"int8" if "activations = 8" in best.recipe else "fp32"}


def test_latencies_are_those_of_the_profile(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed: list[float]
) -> None:
    ten = profile(tmp_path / "pi.json", dict.fromkeys(EVEN, 10.0), monkeypatch)
    result = run(data, tmp_path / "out", device=ten)
    assert result.device == {
        "name": "pi.json", "processor": "a board", "threads": 1, "measured": False,
    }  # fmt: skip
    assert result.runtime == "onnxruntime"
    for side in (result.before, result.after):
        assert min(abs(side.latency_ms.median - 10 * ms) for ms in timed) < 1e-9
    assert any("not measured there" in note for note in result.notes)


def test_the_choice_is_the_devices(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products of bytes are slow floats are kept, for all that they are larger."""
    quick = profile(tmp_path / "quick.json", EVEN | {"int8": 0.1}, monkeypatch)
    assert formats(run(data, tmp_path / "a", device=quick)) == {"int8"}
    slow = profile(tmp_path / "slow.json", EVEN | {"int8": 1e6}, monkeypatch)
    assert formats(run(data, tmp_path / "b", device=slow)) == {"fp32"}


def test_what_does_not_go_with_a_device(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device"):
        run(data, tmp_path / "out", device="pi.json", runtime="openvino")
    with pytest.raises(InputError, match="not a profile"):
        run(data, tmp_path / "out", device=str(tmp_path / "none.json"))
    assert not (tmp_path / "out").exists()


def test_candidates_are_timed_over_ssh(
    data: Dataset,
    tmp_path: Path,
    device_address: str,
    timed: list[float],
) -> None:
    result = run(data, tmp_path / "out", device=device_address)
    assert result.device == {"name": device_address, "threads": 1, "measured": True}
    assert result.after.latency_ms.median in timed
    # The worker there holds neither torch nor transformers.
    assert result.after.peak_memory_bytes < 150_000_000


def test_a_fit_in_executorch(data: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    pytest.importorskip("torchao")
    result = run(data, tmp_path / "out", runtime="executorch")
    assert result.runtime == "executorch"
    assert (tmp_path / "out" / "model.pte").stat().st_size == result.after.size_bytes
    # Which is faster is this machine's to say, that both are there is not.
    bytes_ = [p.size_bytes for p in result.front if "activations = 8" in p.recipe]
    assert bytes_
    assert max(bytes_) < result.before.size_bytes / 2
