"""A search: the same after any kill, better than chance, one process at a time."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penjing.errors import InputError, UsageError
from penjing.recipe import Recipe
from penjing.tune.best import best_of, front, importances
from penjing.tune.database import Database, safe_url
from penjing.tune.records import Journal, Outcome, Record, alone
from penjing.tune.search import Attempts
from penjing.tune.search import search as search_with
from penjing.tune.space import Space, parse
from penjing.workers import Where, crew

pytest.importorskip("optuna")
sys.path.insert(0, str(Path(__file__).parent))
import cheap_search as cheap


def evaluate(recipe: Recipe, _: Any) -> Outcome:
    return Outcome("complete", (cheap.cost(recipe),))


def space() -> Space:
    return parse(cheap.RECIPE, cheap.SEARCH)


def search(where: Space, how: Any, store: Any, **options: Any) -> list[Record]:
    """In this process."""
    with crew(Where(), Path()) as hands:
        hands.start(Attempts(where, lambda _: how))
        return search_with(where, hands, store, **options)


def said(path: Path) -> list[dict[str, Any]]:
    """Lines of a journal without the times."""
    return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    # Not the module beside this one: the server does not know where it is.
    context.set_forkserver_preload(["penjing.api", "optuna"])
    return context


def test_killed_at_twenty_points_it_makes_the_same_trials(processes: Any, tmp_path: Path) -> None:
    trials, draw = 200, random.Random(0)
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    calm.mkdir(), struck.mkdir()
    cheap.run(calm, trials)
    journal = struck / "journal" / "trials.jsonl"
    torn = 0
    for point in sorted(draw.sample(range(1, trials - 10), 20)):
        process = processes.Process(target=cheap.run, args=(struck, trials))
        process.start()
        while not journal.exists() or journal.read_bytes().count(b"\n") < point + 1:
            assert process.is_alive(), process.exitcode
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert not (struck / "out").exists()
        if draw.random() < 0.5:  # a power cut while a line is written
            os.truncate(journal, journal.stat().st_size - draw.randrange(1, 60))
            torn += 1
    assert torn > 3
    process = processes.Process(target=cheap.run, args=(struck, trials))
    process.start()
    process.join()
    assert process.exitcode == 0
    undisturbed = said(calm / "journal" / "trials.jsonl")
    assert said(journal) == undisturbed
    assert len(undisturbed) == trials + 1
    assert len({json.dumps(entry["params"]) for entry in undisturbed[1:]}) == trials
    for name in ("recipe.toml", "weights/model-00001.safetensors"):
        assert (calm / "out" / name).read_bytes() == (struck / "out" / name).read_bytes()


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_of_eight_that_start_at_once_one_searches(
    kind: str, processes: Any, tmp_path: Path
) -> None:
    storage = None if kind == "journal" else f"sqlite:///{tmp_path}/trials.db"
    barrier = processes.Barrier(8)
    group = [
        processes.Process(target=cheap.race, args=(tmp_path, i, barrier, storage, str(tmp_path)))
        for i in range(8)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join()
    assert sorted(p.exitcode for p in group) == [0, 1, 1, 1, 1, 1, 1, 1]
    (winner,) = (path.read_text() for path in tmp_path.glob("done-*"))
    for path in tmp_path.glob("said-*"):
        assert f"another process; got process {winner};" in path.read_text()
    told = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert [entry["number"] for entry in told["trials"]] == list(range(12))


def test_a_database_holds_the_same_trials_and_others_can_read_them(tmp_path: Path) -> None:
    import optuna

    url, what = f"sqlite:///{tmp_path}/trials.db", {"seed": 0}

    def database() -> Database:
        return Database(url, "study", what, space(), 1)

    calm = search(space(), evaluate, Journal(tmp_path / "a.jsonl", what), trials=14)
    search(space(), evaluate, database(), trials=5)
    struck = search(space(), evaluate, database(), trials=14)
    assert [(r.params, r.outcome) for r in struck] == [(r.params, r.outcome) for r in calm]
    study = optuna.load_study(study_name="study", storage=url)
    complete = [r for r in calm if r.outcome.state == "complete"]
    assert study.best_value == min(r.outcome.values[0] for r in complete)
    with pytest.raises(InputError, match="holds another search: seed differs; got 1; allowed: 0"):
        Database(url, "study", {"seed": 1}, space(), 1)
    first, second = database(), database()
    search(space(), evaluate, first, trials=15)
    with pytest.raises(InputError, match="another process writes to the study"):
        search(space(), evaluate, second, trials=15)


def test_a_database_that_cannot_be_opened_shows_no_password(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot open the storage") as caught:
        Database(f"sqlite:///{tmp_path}/none/t.db", "study", {}, space(), 1)
    assert "unable to open" in str(caught.value)
    with pytest.raises(InputError) as caught:
        Database("postgresql+nodriver://me:secret@host/db", "study", {}, space(), 1)
    assert "secret" not in str(caught.value)
    assert safe_url("mysql://me:secret@host/db") == "mysql://...@host/db"


def test_better_than_chance_and_than_the_recipe(tmp_path: Path) -> None:
    """On a cost whose least value, 0, is known; chance draws as many points from the same space."""

    def near(recipe: Recipe, _: Any) -> Outcome:
        prune, quantize = recipe.steps
        far = (math.log(prune.sparsity / 0.7) / 2) ** 2 + (math.log10(quantize.alpha) + 2) ** 2
        return Outcome("complete", (far,))

    lines = ["prune.sparsity=0.01..0.9:log", "quantize.alpha=1e-4..1:log"]
    continuum = parse(cheap.RECIPE, lines)
    ours, chance = [], []
    for seed in range(3):
        records = search(
            continuum, near, Journal(tmp_path / f"{seed}.jsonl", {}), trials=40, seed=seed
        )
        assert records[0].params == {"prune.sparsity": 0.5, "quantize.alpha": 0.5}  # the recipe's
        ours.append(min(r.outcome.values[0] for r in records))
        draws = np.exp(np.random.default_rng(seed).uniform(
            np.log([0.01, 1e-4]), np.log([0.9, 1.0]), (40, 2)
        ))  # fmt: skip
        far = (np.log(draws[:, 0] / 0.7) / 2) ** 2 + (np.log10(draws[:, 1]) + 2) ** 2
        chance.append(far.min())
        default = records[0].outcome.values[0]
        assert ours[-1] < default / 20
    assert np.mean(ours) < np.mean(chance) / 2


def test_every_point_of_a_small_space_is_tried_once(tmp_path: Path) -> None:
    small = parse(cheap.RECIPE, ["prune.sparsity=0.1..0.9:0.1", "quantize.group=0|8"])
    calls: list[Recipe] = []

    def count(recipe: Recipe, seen: Any) -> Outcome:
        calls.append(recipe)
        return evaluate(recipe, seen)

    records = search(small, count, Journal(tmp_path / "t.jsonl", {}), trials=40)
    assert len(calls) == len(set(calls)) == small.count == 18
    assert best_of(records).params == {"prune.sparsity": 0.7, "quantize.group": "8"}
    repeated = [r for r in records if r.same is not None]
    assert all(r.params == records[r.same].params for r in repeated)


def test_failures_are_outcomes_and_the_search_goes_on(tmp_path: Path) -> None:
    small = parse(cheap.RECIPE, ["quantize.bits=2..5:int", "prune.sparsity=0.5|1.5"])
    hungry = 3

    def count(recipe: Recipe, _: Any) -> Outcome:
        if recipe.steps[1].bits == hungry:
            raise MemoryError
        if recipe.steps[1].bits == 4:
            return Outcome("complete", (math.nan,))
        return Outcome("complete", (1.0,))

    records = search(small, count, Journal(tmp_path / "t.jsonl", {}), trials=8)
    why = {
        (r.params["quantize.bits"], r.params["prune.sparsity"]): (r.outcome.state, r.outcome.why)
        for r in records
    }
    assert why[5, "0.5"] == why[2, "0.5"] == ("complete", "")
    assert why[3, "0.5"] == ("refused", "out of memory")
    assert why[4, "0.5"] == ("refused", "a figure is not finite")
    state, text = why[5, "1.5"]  # pruning 150 % is what the step itself refuses
    assert state == "refused"
    assert "sparsity" in text


def test_time_that_is_over_ends_it(tmp_path: Path) -> None:
    def slow(recipe: Recipe, _: Any) -> Outcome:
        time.sleep(0.2)
        return Outcome("complete", (1.0,))

    records = search(space(), slow, Journal(tmp_path / "t.jsonl", {}), trials=40, within=1.0)
    assert 1 <= len(records) <= 4
    # What follows takes as long as six trials: after one, 0.2 s, there is no time for another.
    journal = Journal(tmp_path / "u.jsonl", {})
    assert len(search(space(), slow, journal, trials=40, within=1.0, after=6)) == 1


def test_damaged_or_other_journals_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    search(space(), evaluate, Journal(path, {"seed": 0}), trials=3)
    with pytest.raises(InputError, match="holds another search: seed differs; got 1; allowed: 0"):
        Journal(path, {"seed": 1})
    lines = path.read_bytes().splitlines(keepends=True)
    for broken in ([*lines[:2], b"{}\n", *lines[3:]], [lines[0], lines[2], lines[1]], lines[1:],
                   [lines[0], b"\0\0\n", *lines[1:]]):  # fmt: skip
        path.write_bytes(b"".join(broken))
        with pytest.raises(InputError, match="is damaged"):
            Journal(path, {"seed": 0})
    # A first line that was torn is none.
    path.write_bytes(lines[0][:-5])
    assert Journal(path, {"seed": 0}).records == []
    assert path.read_bytes() == lines[0]


def test_a_lock_goes_with_its_process_and_its_file(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with alone(lock, "a"):
        with pytest.raises(InputError, match=f"got process {os.getpid()};"), alone(lock, "a"):
            raise AssertionError("two held it")
        lock.unlink()
        with alone(lock, "a"):  # another file, another lock
            assert lock.exists()
    with alone(lock, "a"):
        pass


def made(number: int, *values: float, **limits: float) -> Record:
    return Record(number, {}, Outcome("complete", values, limits))


def test_the_front_and_the_most_even_point_of_it() -> None:
    records = [
        made(0, 0.0, 10.0), made(1, 1.0, 0.0), made(2, 0.4, 4.0), made(3, 0.5, 4.0),
        made(4, 0.0, 0.0, size=0.1), made(5, 0.9, 9.0),
    ]  # fmt: skip
    assert [r.number for r in front(records)] == [0, 1, 2]
    same = [Record(i, {}, Outcome("complete", (1.0,), figures={"drop": drop}))
            for i, drop in enumerate([0.2, 0.1, 0.1])]  # fmt: skip
    assert [r.number for r in front(same)] == [1]
    # Scaled: (0, 1), (1, 0), (0.4, 0.4).
    assert best_of(records).number == 2
    assert best_of([made(0, 3.0), made(1, 2.0), made(2, 1.0, drop=0.5)]).number == 1
    # None is within its limits: the one that is nearest to them, whether it came to the end or not.
    over = [made(0, 1.0, drop=0.5), Record(1, {}, Outcome("pruned", limits={"drop": 0.2})),
            Record(2, {}, Outcome("refused", limits={"refused": 0.1}))]  # fmt: skip
    assert best_of(over).number == 1
    assert best_of(over[2:]) is None
    assert best_of([]) is None


def test_importances_tell_what_matters(tmp_path: Path) -> None:
    lines = ["prune.sparsity=0.1..0.9", "quantize.alpha=0.1..0.9"]
    plane = parse(cheap.RECIPE, lines)

    def one(recipe: Recipe, _: Any) -> Outcome:
        prune, quantize = recipe.steps
        return Outcome("complete", ((prune.sparsity - 0.3) ** 2 + 0.001 * quantize.alpha, 1.0))

    journal = Journal(tmp_path / "t.jsonl", {})
    few = search(plane, one, journal, objectives=2, trials=19)
    assert importances(plane, few, ["quality", "size"]) == (
        {}, "importances need 20 complete trials, there are 19",
    )  # fmt: skip
    records = search(plane, one, journal, objectives=2, trials=40)
    found, note = importances(plane, records, ["quality", "size"])
    assert list(found) == ["quality"]
    assert found["quality"]["prune.sparsity"] > 0.8
    assert sum(found["quality"].values()) == pytest.approx(1)
    assert note == "every trial has the same size: nothing is important to it"


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from penjing.tune import propose as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'penjing\[tune\]'"):
        module.check_optuna()
