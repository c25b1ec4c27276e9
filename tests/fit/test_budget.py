"""Each limit by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from penjing.errors import UsageError
from penjing.fit.budget import Budget
from penjing.result import Drop, Latency, Measurement

NOW = Measurement(
    size_bytes=30_000_000,
    parameters=10_000_000,
    stored_bits_per_weight=24.0,
    latency_ms=Latency(15.0, 40.0, 1, 128),
    peak_memory_bytes=120_000_000,
)
DROP = Drop(0.03, -0.01, 0.07, 0.95, 100, False)


@pytest.mark.parametrize(
    ("limits", "name", "ratio", "text"),
    [
        ({"max_size": 20_000_000}, "size", 1.5, "size is 30.0 MB, asked 20.0 MB"),
        ({"max_latency": 0.010}, "latency", 1.5, "latency is 15.0 ms, asked 10.0 ms"),
        ({"max_memory": 60_000_000}, "memory", 2.0, "peak memory is 120.0 MB, asked 60.0 MB"),
        ({"max_drop": 0.01}, "drop", 3.0, "the drop is 3.00%, asked 1.00%"),
        ({"max_drop": 0.0}, "drop", math.inf, "the drop is 3.00%, asked 0.00%"),
    ],
)
def test_each_limit(limits: dict[str, Any], name: str, ratio: float, text: str) -> None:
    found = Budget(**limits).excess(NOW, DROP)
    assert list(found) == [name]
    assert found[name][0] == pytest.approx(ratio)
    assert found[name][1] == text


def test_the_median_counts_and_not_p95() -> None:
    assert Budget(max_latency=0.016).excess(NOW, None) == {}


def test_a_limit_met_exactly_is_met() -> None:
    budget = Budget(0.03, 30_000_000, 0.015, 120_000_000, within=1.0)
    assert budget.excess(NOW, DROP) == {}


def test_no_limit_and_a_gain_of_quality() -> None:
    assert Budget().excess(NOW, DROP) == {}
    assert Budget(max_drop=0.0).excess(NOW, Drop(-0.01, -0.02, 0.0, 0.95, 9, False)) == {}


def test_a_hair_over_is_not_said_as_equal() -> None:
    found = Budget(max_size=29_999_000).excess(NOW, None)
    assert found["size"][1] == "size is 30.0 MB, asked 30.0 MB (1e+03 more)"


def test_several_limits_and_what_was_asked() -> None:
    budget = Budget(max_drop=0.01, max_size=20_000_000)
    assert set(budget.excess(NOW, DROP)) == {"drop", "size"}
    assert budget.to_json() == {"max_drop": 0.01, "max_size": 20_000_000}


@pytest.mark.parametrize("name", ["max_drop", "max_size", "max_latency", "max_memory", "within"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "25MB"])
def test_no_nonsense(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
        Budget(**{name: value})


@pytest.mark.parametrize("name", ["max_size", "max_latency", "max_memory", "within"])
def test_zero_is_only_a_drop(name: str) -> None:
    with pytest.raises(UsageError, match="above 0"):
        Budget(**{name: 0})
    assert Budget(max_drop=0).max_drop == 0


def test_a_drop_in_nats_is_said_in_nats() -> None:
    found = Budget(max_drop=0.01).excess(NOW, DROP, "kl")
    assert found["drop"][1] == "the drop is 0.0300 nats, asked 0.0100 nats"
