"""The same trials with any number of workers, whatever ends; none lost, none twice."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import penjing
from penjing.errors import InputError
from penjing.tune.records import in_turn

pytest.importorskip("optuna")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import cheap_search as cheap
from small import make, tune

from clusters import cluster, have_ray

TRIALS = 30


def lines(folder: Path) -> list[dict[str, Any]]:
    """Finished trials of a journal, as they were finished."""
    path = folder / "journal" / "trials.jsonl"
    return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()[1:]]


def in_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: entry["number"])


def search(folder: Path, how: Any = cheap.late, **options: Any) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    penjing.tune(
        cheap.network(), cheap.RECIPE, cheap.SEARCH, folder / "out", objective=how, trials=TRIALS,
        seed=3, journal=folder / "journal", **options,
    )  # fmt: skip
    return lines(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What one process does."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, search(folder)


def same_artifact(a: Path, b: Path) -> bool:
    names = ("recipe.toml", "weights/model-00001.safetensors")
    return all((a / "out" / n).read_bytes() == (b / "out" / n).read_bytes() for n in names)


def test_the_same_trials_with_workers_also_when_some_die(
    alone: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    found = search(tmp_path, cheap.Deadly(tmp_path), workers=3)
    assert len(list(tmp_path.glob("died-*"))) == 2
    assert found != in_order(found)  # others were first, and it changed nothing
    assert in_order(found) == alone[1] == in_order(alone[1])
    assert same_artifact(tmp_path, alone[0])


def test_another_concurrency_is_another_search(
    alone: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    other = search(tmp_path, concurrency=1)
    assert other[0]["params"] == alone[1][0]["params"]
    assert [e["params"] for e in other] != [e["params"] for e in alone[1]]
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(InputError, match="concurrency differs; got 4; allowed: 1"):
        search(tmp_path)


def test_a_driver_that_is_killed_loses_nothing(
    alone: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """With two workers, at two points; then it goes on with none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["penjing.api", "optuna"])
    journal, draw = tmp_path / "journal" / "trials.jsonl", random.Random(0)
    for point in (5, 17):
        process = context.Process(target=cheap.run_with, args=(tmp_path, TRIALS, 2))
        process.start()
        while not journal.exists() or journal.read_bytes().count(b"\n") < point + 1:
            assert process.is_alive(), process.exitcode
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        kept = lines(tmp_path)
        assert in_turn([e["number"] for e in kept], 4)
    with open(journal, "ab") as file:
        file.write(b'{"number": 22, "par')  # what a power cut leaves of a line
    found = search(tmp_path)
    assert found[: len(kept)] == kept  # what was finished is not made again
    assert in_order(found) == alone[1]
    assert same_artifact(tmp_path, alone[0])


def test_finished_trials_can_only_be_those_that_could_begin() -> None:
    assert in_turn([0, 1, 2], 1)
    assert in_turn([1, 0, 3, 2, 4], 2)
    assert in_turn([3, 2, 1, 0], 4)
    assert not in_turn([1, 0], 1)
    assert not in_turn([1, 2, 0], 2)  # 2 depends on 0
    assert not in_turn([0, 0], 2)
    assert not in_turn([-1], 2)


def told(output: Path) -> list[dict[str, Any]]:
    table = json.loads((output / "tuning.json").read_text())
    return [entry | {"seconds": 0} for entry in table["trials"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def measured(place: Path) -> list[dict[str, Any]]:
    done = network(place, "alone")
    assert {entry["state"] for entry in done} == {"complete", "pruned", "refused"}
    return done


def network(place: Path, name: str, *more: str) -> list[dict[str, Any]]:
    data = ("--data", str(place / "data.npz"), "--trials", "9", "--max-drop", "10%")
    done = tune(place, place / name, *data, "--objective", "size", *more)
    assert done.exit_code in (0, 3), done.stderr
    left = [p.name for p in place.iterdir() if p.name.startswith((".", f"{name}."))]
    assert not left
    return told(place / name)


def test_a_network_is_measured_the_same_by_workers(
    place: Path, measured: list[dict[str, Any]]
) -> None:
    """Exported and run in processes that built it from what they were sent."""
    assert network(place, "two", "--workers", "2") == measured
    weights = "weights/model-00001.safetensors"
    assert (place / "two" / weights).read_bytes() == (place / "alone" / weights).read_bytes()


def killed(two: Any, journal: Path, after: int) -> threading.Thread:
    """Kills a node after so many trials."""

    def kill() -> None:
        while not journal.exists() or journal.read_bytes().count(b"\n") < after + 1:
            time.sleep(0.005)
        two.remove_node(next(iter(two.worker_nodes)), allow_graceful=False)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_two_ray_nodes_of_which_one_is_killed(
    alone: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    have_ray()
    with cluster(2) as two:
        thread = killed(two, tmp_path / "journal" / "trials.jsonl", 6)
        found = search(tmp_path, ray=two.address)
        thread.join()
        assert len(two.worker_nodes) == 1
    assert in_order(found) == alone[1]
    assert same_artifact(tmp_path, alone[0])


@pytest.mark.slow
def test_a_network_is_measured_the_same_on_ray(place: Path, measured: list[dict[str, Any]]) -> None:
    have_ray()
    with cluster(2) as two:
        thread = killed(two, place / "ray.journal" / "trials.jsonl", 3)
        assert network(place, "ray", "--ray", two.address) == measured
        thread.join()
