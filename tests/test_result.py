"""results.json: its fixed names, and back again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from penjing.api import result_of
from penjing.result import Drop, Latency, Measurement, Point, Result, Unit

# As the documents promise them to other programs.
NAMES = {
    "format", "task", "metric", "runtime", "threads", "before", "after", "drop", "budget", "met",
    "why", "front", "units",
}  # fmt: skip
SIDE = {
    "size_bytes", "parameters", "stored_bits_per_weight", "latency_ms", "peak_memory_bytes",
    "quality",
}  # fmt: skip

BEFORE = Measurement(1000, 250, 32.0, Latency(2.0, 3.0, 1, 128), 5000, 0.9)
FULL = Result(
    task="retrieval",
    metric="accuracy",
    runtime="onnxruntime",
    threads=2,
    before=BEFORE,
    after=replace(
        BEFORE, size_bytes=100, throughput_per_second=7.0, latency_batch_ms=Latency(9.0, 9.5, 8, 16)
    ),
    drop=Drop(0.01, -0.002, 0.022, 0.95, 400, False),
    budget={"max_drop": 0.02},
    met=True,
    why=None,
    front=(Point(100, 0.5, 0.89, 'seed = 0\n[[step]]\ndo = "cut"', True, "1 of 2 blocks"),),
    units=(Unit("encoder.layer.0", "cut", "least influence"),),
    notes=("a", "b"),
    seed=3,
    versions={"torch": "2"},
    higher_is_better=False,
)
BARE = Result(
    "fidelity", "cosine", "openvino", 1, BEFORE, replace(BEFORE, quality=None), None, {}, False,
    "size is 1.0 KB, asked 10 B",
)  # fmt: skip


@pytest.mark.parametrize("result", [FULL, BARE])
def test_through_json_and_back(result: Result) -> None:
    text = json.dumps(result.to_json(), allow_nan=False)
    assert Result.from_json(json.loads(text)) == result


def test_the_names_are_fixed() -> None:
    table = json.loads(json.dumps(FULL.to_json()))
    assert set(table) >= NAMES
    assert table["format"] == 1
    for side in ("before", "after"):
        assert set(table[side]) >= SIDE
        assert set(table[side]["latency_ms"]) >= {"median", "p95", "batch", "length"}
    assert set(table["drop"]) == {"value", "low", "high", "confidence", "samples", "relative"}
    assert set(table["front"][0]) >= {"size_bytes", "latency_ms", "quality", "recipe", "measured"}
    assert set(table["units"][0]) == {"name", "decision", "why"}


@pytest.mark.parametrize("name", ["task", "before", "front"])
def test_a_name_that_is_missing_is_no_result(name: str) -> None:
    table = FULL.to_json()
    del table[name]
    with pytest.raises((KeyError, TypeError)):
        Result.from_json(table)


def test_the_result_of_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(FULL.to_json()))
    assert result_of(tmp_path) == FULL
