"""What is said of a result, against shares that are counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from penjing.fit.budget import Budget
from penjing.fit.explain import bounds, sensitivity
from penjing.fit.predict import Predictor
from penjing.fit.space import Choice
from penjing.fit.survey import Survey
from penjing.model import Model
from penjing.result import Drop, Latency, Measurement

Maker = Callable[..., Model]
FOUND = Survey(
    cuts={"0": 0.5, "1": float("inf")},
    widths={"0": 0.1},
    formats={"int8": {"0": 0.001, "1": 0.002}},
    tables={"e8": 0.0001},
    rest={"int8": 0.003},
)


def made(choice: Choice, size: int, drop: float) -> Any:
    trial = SimpleNamespace(
        measured=Measurement(size, 1, 1.0, Latency(2.0, 2.0, 1, None), 1000),
        drop=Drop(drop, drop, drop, 0.95, 100, False),
    )
    return SimpleNamespace(choice=choice, trial=trial)


def test_sensitivities_are_the_surveys() -> None:
    assert sensitivity(("a", "b"), FOUND) == {
        "embeddings": {"8 bits": 0.0001},
        "a": {"cut": 0.5, "half of the hidden units": 0.1, "int8": 0.001},
        "b": {"int8": 0.002},  # cutting it was not possible
        "outside the blocks": {"int8": 0.003},
    }


def test_what_binds_and_what_takes_most(bert: Maker) -> None:
    model = bert(2)
    predictor = Predictor(model, Survey(), {"fp32": 8.0, "int8": 2.0}, 1.0)
    plain = Choice((), (1.0, 1.0), ("int8", "int8"), "fp32", "fp32")
    best, other = (
        made(plain, 900, 0.001),
        made(Choice((0,), *[*vars(plain).values()][1:]), 500, 0.2),
    )
    said = list(bounds(best, Budget(max_drop=0.1, max_size=1000), predictor, [other]))
    assert said[0] == "size binds: 90% of what was asked is used"
    # Floats are four bytes a weight, integers one and their scales.
    table = sum(4 * e.weight.numel() for e in model.module.embeddings.children()
                if hasattr(e, "num_embeddings"))  # fmt: skip
    whole = table + sum(predictor.block_size(i, 1.0, "int8") for i in (0, 1))
    whole += predictor.rest_size("fp32")
    assert any(f"{table / whole:.0%} is of the embedding tables" in text for text in said)
    assert said[-1] == "1 of 2 blocks, fp32/int8 was measured too: the drop is 20.00%, asked 10.00%"


@pytest.mark.parametrize("used", [0.5, 0.9])
def test_a_limit_far_away_binds_nothing(used: float, bert: Maker) -> None:
    predictor = Predictor(bert(2), Survey(), {"fp32": 8.0}, 1.0)
    best = made(Choice((), (1.0, 1.0), ("fp32",) * 2, "fp32", "fp32"), round(1000 * used), 0.0)
    said = list(bounds(best, Budget(max_size=1000), predictor))
    assert any("size binds" in text for text in said) is (used > 0.8)
