"""Choices fit the limits that they are made for, and the cheapest is first."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from penjing.fit.budget import Budget
from penjing.fit.choose import candidates, uniform
from penjing.fit.predict import Prediction, Predictor
from penjing.fit.space import Choice
from penjing.fit.survey import HEADS, WIDTHS, Depth, Survey
from penjing.model import Model, Source

Maker = Callable[..., Model]
FORMATS = ("int8", "fp32")


def survey_of(blocks: int) -> Survey:
    return Survey(
        cuts={str(i): 0.01 * (i + 1) for i in range(blocks)},
        widths={str(i): 0.02 * (i + 1) for i in range(blocks)},
        heads={str(i): 0.011 * (i + 1) for i in range(blocks) if i != 1},
        formats={"int8": {str(i): 1e-5 * (i + 1) for i in range(blocks)}},
        tables={"e8": 2e-5, "e4": 3e-3},
        rest={},
        ladder=[Depth([0], 0.01, 0.002), Depth([0, 1], 0.05, 0.02)],
    )


@pytest.fixture
def predictor(bert: Maker) -> Predictor:
    latencies = {"fp32": 8.0, "int8": 3.0, "w8": 5.0, "w4": 5.0}
    return Predictor(bert(3), survey_of(3), latencies, 1.0)


def everything(predictor: Predictor) -> list[tuple[Choice, Prediction]]:
    """Every point of the search space; written from the space's definition."""
    count = len(predictor.model.blocks)
    found = []
    for cut in [(), *(tuple(d.cut) for d in predictor.survey.ladder)]:
        kept = [i for i in range(count) if i not in cut]
        options = list(itertools.product(WIDTHS, FORMATS, HEADS))
        for picks in itertools.product(options, repeat=len(kept)):
            widths, names, heads = [1.0] * count, ["int8"] * count, [1.0] * count
            for i, (width, name, own) in zip(kept, picks, strict=True):
                widths[i], names[i], heads[i] = width, name, own
            if heads[1] < 1:  # it was not measured: it cannot
                continue
            for table in ("fp32", "e8", "e4"):
                choice = Choice(cut, tuple(widths), tuple(names), table, "int8", tuple(heads))
                found.append((choice, predictor(choice)))
    return found


@pytest.mark.parametrize(
    "asked",
    [
        {"max_drop": 0.03},
        {"max_drop": 0.001},
        {"max_size": 60_000},
        {"max_size": 60_000, "max_drop": 0.05},
        {"max_latency": 2.0},
        {"max_latency": 8.0},
        {"max_latency": 2.0, "max_size": 60_000},
    ],
)
def test_every_choice_fits_and_none_that_exists_is_missed(
    asked: dict[str, float], predictor: Predictor
) -> None:
    budget = Budget(**asked)  # type: ignore[arg-type]

    def fits(said: Prediction) -> bool:
        return (
            said.size <= (budget.max_size or float("inf"))
            and said.latency <= (budget.max_latency or float("inf"))
            # Distillation is hoped to win a quarter back.
            and said.drop <= 1.25 * (float("inf") if budget.max_drop is None else budget.max_drop)
        )

    possible = [said for _, said in everything(predictor) if fits(said)]
    assert possible, "a case that proves nothing"
    found = candidates(predictor, budget, FORMATS)
    assert found
    assert all(fits(said) for _, said in found)
    assert all(said == predictor(choice) for choice, said in found)
    if budget.max_drop is None:
        assert min(p.error for p in possible) == pytest.approx(found[0][1].error, rel=1e-6)
        assert [p.error for _, p in found] == sorted(p.error for _, p in found)
    else:
        size, latency = (max(getattr(p, n) for _, p in found) for n in ("size", "latency"))
        gains = [p.size / size + p.latency / latency for _, p in found]
        assert gains[0] == pytest.approx(min(gains), rel=1e-9)
        # No point of the space promises much more than the first.
        plain = predictor.plain
        best = min(p.gain(plain) for p in possible)
        assert found[0][1].gain(plain) <= 1.1 * best


def test_the_limits_bind(predictor: Predictor) -> None:
    """Without a limit on size the choice of least error would be larger."""
    free = candidates(predictor, Budget(max_latency=8.0), FORMATS)[0][1]
    assert free.size > 60_000
    assert candidates(predictor, Budget(max_size=60_000), FORMATS)[0][1].size <= 60_000


def test_corrections_count(predictor: Predictor) -> None:
    """Files turn out half again as large: what is chosen then fits, and uses the room."""
    choice, said = candidates(predictor, Budget(max_size=60_000), FORMATS)[0]
    predictor.correct(choice, 1.5 * said.size, said.latency)
    space = [said for _, said in everything(predictor)]
    for limit in np.quantile([said.size for said in space], np.linspace(0.02, 0.9, 20)):
        found = candidates(predictor, Budget(max_size=int(limit)), FORMATS)
        assert all(again.size <= limit for _, again in found)
        least = min(said.error for said in space if said.size <= int(limit))
        assert found[0][1].error == pytest.approx(least)


def test_what_the_cut_has_spent_is_not_spent_again(predictor: Predictor) -> None:
    """Two blocks cut cost 0.02 of 0.020625: 8 bits of the table still fit, 4 do not."""
    predictor.survey.tables["e4"] = 9e-4
    found = candidates(predictor, Budget(max_drop=0.0165), FORMATS)
    deep = [choice for choice, _ in found if choice.cut == (0, 1)]
    tables = {choice.table for choice in deep}
    assert "e8" in tables
    assert "e4" not in tables


def test_out_of_reach_gives_the_nearest(predictor: Predictor) -> None:
    found = candidates(predictor, Budget(max_size=1000), FORMATS)
    assert 1 <= len(found) <= 4
    smallest = min(said.size for _, said in everything(predictor))
    assert found[0][1].size == pytest.approx(smallest)


def test_no_drop_at_all_is_the_network_itself(predictor: Predictor) -> None:
    choice, said = candidates(predictor, Budget(max_drop=0.0), FORMATS)[0]
    assert said.drop == 0.0
    assert (choice.cut, choice.table, set(choice.formats)) == ((), "fp32", {"fp32"})


def test_what_broke_is_never_chosen(predictor: Predictor) -> None:
    infinite = float("inf")
    predictor.survey.formats["int8"]["1"] = infinite
    predictor.survey.tables["e4"] = infinite
    for asked in (Budget(max_size=1000), Budget(max_drop=0.5), Budget(max_latency=0.1)):
        for choice, _ in candidates(predictor, asked, FORMATS):
            assert 1 in choice.cut or choice.formats[1] == "fp32"
            assert choice.table != "e4"


def test_no_blocks_at_all() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model = Model(module, "tensor", {"x0": torch.zeros(1, 8)}, Source("test", "net", ""))
    latencies = {"fp32": 8.0, "int8": 3.0, "w8": 5.0, "w4": 5.0}
    predictor = Predictor(model, Survey(rest={"int8": 0.01}), latencies, 1.0)
    found = candidates(predictor, Budget(max_drop=0.1), FORMATS)
    assert next(c.rest for c, _ in found) == "int8"
    # Codes of both layers, a scale for each of 20 rows, biases.
    assert found[0][1].size == 8 * 16 + 16 * 4 + 4 * 20 + 4 * 20
    strict = candidates(predictor, Budget(max_drop=0.001), FORMATS)
    assert [c.rest for c, _ in strict] == ["fp32"]
    assert uniform(predictor, "int8", "fp32").widths == ()


def test_a_tied_head_has_the_format_of_its_table(llama: Maker) -> None:
    survey = Survey(
        formats={n: {"0": 1e-4, "1": 1e-4} for n in ("w8", "w4")},
        tables={"e8": 1e-4, "e4": 1e-2},
        rest={"w8": 1.0, "w4": 5.0},
    )
    latencies = {"fp32": 8.0, "int8": 8.0, "w8": 4.0, "w4": 3.0}
    predictor = Predictor(llama(True), survey, latencies, 1.0)
    found = candidates(predictor, Budget(max_drop=0.001), ("w8", "w4"))
    assert {c.table for c, _ in found} == {"e8"}
    # The head is the table: its own error of 1 or 5 is not added.
    assert found[0][1].error == pytest.approx(3e-4)
