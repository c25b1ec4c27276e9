"""The order in which candidates are made, with exports and runtimes left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penjing.errors import BudgetError
from penjing.fit import loop, search
from penjing.fit.budget import Budget
from penjing.fit.outcome import Made, _command, certainty
from penjing.fit.predict import Predictor
from penjing.fit.search import Settings, Work
from penjing.fit.survey import Depth, Survey
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.result import Drop, Latency, Measurement

Maker = Callable[..., Model]
LATENCIES = {"fp32": 8.0, "int8": 2.0, "w8": 4.0, "w4": 3.0}


def drop(value: float, samples: int = 100, half: float = 0.005) -> Drop:
    return Drop(value, value - half, value + half, 0.95, samples, False)


def side(size: int, milliseconds: float = 1.0, memory: int = 0) -> Measurement:
    return Measurement(size, 1, 1.0, Latency(milliseconds, 1.0, 1, None), memory)


def work_of(model: Model, budget: Budget, **options: Any) -> Work:
    survey = Survey(
        formats={"int8": dict.fromkeys("0123", 0.001)},
        widths=dict.fromkeys("0123", 0.01),
        ladder=[Depth([1], 0.05, 0.01), Depth([1, 2], 0.1, 0.03)],
        tables={"e8": 0.0001, "e4": 0.001},
        complete=True,
    )
    predictor = Predictor(model, survey, LATENCIES, 0.2, options.pop("remains", 1.0))
    task = SimpleNamespace(metric="top-1 accuracy")
    bench = SimpleNamespace(notes=[], task=task)
    settings = Settings(**({"recover": 0.0} | options.pop("settings", {})))
    drops = options.pop("drops", lambda _: drop(0.0))
    return Work(
        model, None, bench, predictor, budget, settings, "onnxruntime", drops,  # type: ignore[arg-type]
        options.pop("start", search.time.monotonic()), options.pop("usual", 0.0),
    )  # fmt: skip


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Choices asked for, in order; candidates come out as predicted unless `fails` says else."""
    asked: list[Any] = []

    def make(work: Work, choice: Any, said: Any, number: int) -> Made | None:
        asked.append((choice, said))
        if (answer := fails.get(len(asked) - 1)) == "error":
            raise BudgetError("too bad")
        now = side(round(said.size), said.latency, round(said.size))
        lost = drop(answer if isinstance(answer, float) else said.drop)
        trial = SimpleNamespace(
            measured=now, drop=lost, baseline=side(10**9, 1e3), ratio=1 / said.latency
        )
        return Made(choice, said, trial, Recipe(()))  # type: ignore[arg-type]

    fails: dict[int, Any] = {}
    asked_list: Any = asked
    monkeypatch.setattr(search, "_make", make)
    return [asked_list, fails]


def test_after_a_failure_the_next_one_is_safer(bert: Maker, made: list[Any]) -> None:
    asked, fails = made
    fails.update({0: "error", 1: 0.5})
    work = work_of(bert(4), Budget(max_drop=0.05), remains=0.5)
    found = search.search(work, [])
    errors = [said.error for _, said in asked]
    assert len(errors) >= 3
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.9 * errors[1]
    assert len(found) == len(asked) - 1  # one came to nothing
    # Twice as much after what came to nothing, less after each one that met the budget.
    met = sum(not work.budget.excess(m.trial.measured, m.trial.drop) for m in found)
    assert work.predictor.remains == pytest.approx(0.7**met)
    assert "failed: too bad" in work.bench.notes[0]


def test_a_candidate_that_came_to_nothing_is_no_try(bert: Maker, made: list[Any]) -> None:
    asked, fails = made
    fails.update({0: "error", 1: "error"})
    work = work_of(bert(4), Budget(max_drop=0.2), settings={"tries": 1})
    assert len(search.search(work, [])) == 1
    assert len(asked) == 3


@pytest.mark.parametrize(("known", "count"), [(True, 0), (False, 1)])
def test_nothing_is_begun_that_cannot_end_in_time(
    known: bool, count: int, bert: Maker, made: list[Any]
) -> None:
    asked, _ = made
    work = work_of(bert(4), Budget(max_drop=0.2, within=60.0), usual=90.0)
    there = [None] if known else []
    found = search.search(work, there)  # type: ignore[arg-type]
    assert len(asked) >= count
    assert (len(found) > 0) is (count > 0)
    assert any("no further candidate" in n and "90 s" in n for n in work.bench.notes) is known


def test_without_a_bar_for_quality_the_first_that_fits_is_kept(
    bert: Maker, made: list[Any]
) -> None:
    asked, _ = made
    work = work_of(bert(4), Budget(max_size=10**8))
    assert len(search.search(work, [])) == 1
    # Everything fits: the one with the least error of all.
    assert asked[0][0].cut == ()
    assert set(asked[0][0].widths) == {1.0}


def test_a_limit_of_memory_is_one_of_size(bert: Maker, made: list[Any]) -> None:
    asked, _ = made
    model = bert(4)
    work = work_of(model, Budget(max_drop=0.5))
    free = search.search(work, [])[0].said.size
    asked.clear()
    work = work_of(model, Budget(max_memory=round(3e6 + 0.7 * free)))
    work.predictor.memory = (3e6, 1.0)
    search.search(work, [])
    assert asked[0][1].size <= 0.7 * free * 1.01 or asked[0][1].size == min(
        said.size for _, said in asked
    )
    assert search._aimed(work.budget, work.predictor, 0).max_size == pytest.approx(
        0.7 * free, abs=9e6
    )


@pytest.mark.parametrize(
    ("found", "refused"),
    [
        (drop(0.05), True),  # 0.045 to 0.055
        (drop(0.012), False),  # 0.007 to 0.017: it may be below the bar
        (drop(0.0), False),
        (drop(0.05, samples=0), False),  # nothing is known
    ],
)
def test_what_is_given_up_before_export(found: Drop, refused: bool, bert: Maker) -> None:
    work = work_of(bert(4), Budget(max_drop=0.01), drops=lambda _: found)
    if not refused:
        search._hopeless(work, work.model)
        return
    with pytest.raises(BudgetError, match=r"5\.00%, at least 4\.50%"):
        search._hopeless(work, work.model)
    work.budget = Budget(max_size=5)
    search._hopeless(work, work.model)


def test_quality_ranks_where_no_drop_is_asked() -> None:
    def made_of(size: int, lost: float) -> Any:
        return SimpleNamespace(
            trial=SimpleNamespace(
                measured=side(size), drop=drop(lost), baseline=side(1000), ratio=2.0
            )
        )

    small, good, large = made_of(100, 0.2), made_of(300, 0.01), made_of(900, 0.0)
    budget = Budget(max_size=500)
    assert min([small, good, large], key=lambda m: loop._rank(m, budget)) is good
    budget = Budget(max_drop=0.3)
    assert min([small, good, large], key=lambda m: loop._rank(m, budget)) is small


def test_an_interval_without_width_is_explained() -> None:
    def notes(found: Drop | None) -> list[str]:
        return list(certainty(found))

    (text,) = notes(Drop(0.0, 0.0, 0.0, 0.95, 20, False))
    # 0.95 ** 20 is not it: the share p with (1 - p)^20 = 0.05 is 13.91 %.
    assert "none of 20 samples" in text
    assert "at most 13.91%" in text
    assert notes(Drop(0.0, -0.1, 0.1, 0.95, 20, False)) == []
    assert notes(None) == []


def test_commands_have_no_folders_of_this_machine() -> None:
    place = Path("/home/someone/my model")
    said = _command(f"penjing fit '{place}' --data data/eval.jsonl -o out")
    assert said == "penjing fit 'my model' --data data/eval.jsonl -o out"


def test_how_much_distillation_is_expected_to_mend(
    bert: Maker, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    def predictor(*_: Any, **__: Any) -> Any:
        def predict(_: Any) -> None:
            clock[0] += 0.2

        return predict

    monkeypatch.setattr(loop, "torch_predictor", predictor)
    data: Any = SimpleNamespace(everything=batches(1))
    model = bert(1)
    # A batch takes 0.2 s forward, a step 2.5 times that: 15 steps in 7.5 s, half of thirty.
    assert loop._remains(model, data, 7.5) == pytest.approx(1 - 0.75 / 2, rel=1e-6)
    assert loop._remains(model, data, 1000.0) == 0.25
    assert loop._remains(model, data, 0.0) == 1.0


def test_what_stands_in_keeps_the_quality_first() -> None:
    assert loop._safest({"w4": 1.0, "w8": 3.0, "int8": 2.0}) == "int8"
    assert loop._safest({"w4": 1.0, "w8": 3.0}) == "w8"
    assert loop._safest({}) is None


def test_the_first_candidate_need_not_leave_time_for_what_stands_in(
    bert: Maker, made: list[Any]
) -> None:
    asked, fails = made
    fails.update({0: "error", 1: "error"})
    work = work_of(bert(4), Budget(max_drop=0.2, within=60.0), usual=50.0)
    work.reserve = 70.0
    assert search.search(work, [None]) == []  # type: ignore[list-item]
    assert len(asked) == 1


def test_without_any_limit_several_drops_are_tried(bert: Maker, made: list[Any]) -> None:
    asked, _ = made
    work = work_of(bert(4), Budget())
    found = search.search(work, [])
    assert len(found) == work.settings.tries
    drops = [said.drop for _, said in asked]
    assert all(d <= 1.25 * asked_for for d, asked_for in zip(drops, search._DROPS, strict=False))
    assert len({choice for choice, _ in asked}) == len(asked)
    assert max(drops) > 2 * min(drops)


def test_the_knee_of_a_front_by_hand() -> None:
    def made_of(size: int, ratio: float, lost: float) -> Any:
        return SimpleNamespace(
            trial=SimpleNamespace(
                measured=side(size), drop=drop(lost), baseline=side(1000), ratio=ratio
            )
        )

    # Size and latency in halves, quarters, fifths: (1 - gain) / 0.8 - drop / 0.1.
    half, quarter, fifth = made_of(500, 2, 0.01), made_of(250, 4, 0.02), made_of(200, 5, 0.1)
    assert loop.knee([half, quarter, fifth]) is quarter  # 0.525, 0.7375, 0
    steep = made_of(250, 4, 0.06)
    assert loop.knee([half, steep, fifth]) is half  # 0.525, 0.3375, 0
    # Nothing lost anywhere: the smallest and fastest.
    assert loop.knee([made_of(500, 2, 0.0), made_of(200, 5, -0.01)]).trial.ratio == 5
