"""The same results in the same order from every crew; a lost worker loses nothing."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from penjing.errors import InputError, UsageError
from penjing.workers import Where, _ready, crew, in_order

sys.path.insert(0, str(Path(__file__).parent))
import pieces

CREWS = [Where(), Where(workers=1), Where(workers=3)]


def results(where: Where, folder: Path, *kinds: str) -> list[Any]:
    with crew(where, folder) as hands:
        hands.start(pieces.Begin(folder))
        return list(in_order(hands, enumerate(kinds)))


def done(folder: Path) -> list[int]:
    return sorted(int(line) for line in (folder / "done").read_text().split())


@pytest.mark.parametrize("where", CREWS)
def test_results_are_in_the_order_of_the_work(where: Where, tmp_path: Path) -> None:
    assert results(where, tmp_path, *["slow-first"] * 7) == [i * i for i in range(7)]
    assert done(tmp_path) == list(range(7))
    # Each process got ready once, and this one is no worker where there are others.
    ready = {int(p.name.split("-")[1]) for p in tmp_path.glob("ready-*")}
    assert len(ready) == (where.workers or 1)
    assert (os.getpid() in ready) == (where.workers is None)


def test_the_piece_of_a_lost_worker_is_done_by_another(tmp_path: Path) -> None:
    kinds = ["plain", "plain", "deadly-once", "plain", "plain"]
    assert results(Where(workers=2), tmp_path, *kinds) == [0, 1, 4, 9, 16]
    assert done(tmp_path) == [0, 1, 2, 3, 4]
    assert (tmp_path / "died").exists()


def test_a_piece_that_ends_every_worker_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="piece 1 of the work ended 3 workers; got signal 9"):
        results(Where(workers=2), tmp_path, "plain", "deadly", "plain")


@pytest.mark.parametrize("where", CREWS[:2])
def test_errors_come_through_as_they_were(where: Where, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        results(where, tmp_path, "wrong")
    assert str(caught.value) == "seven; got there; allowed: [1, 2]; next: another"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises((ZeroDivisionError, RuntimeError), match="a defect"):
        results(where, tmp_path, "defect")


def test_a_worker_that_cannot_get_ready_says_why(tmp_path: Path) -> None:
    with crew(Where(workers=1), tmp_path) as hands:
        hands.start(pieces.unready)
        with pytest.raises(InputError, match="not today"):
            list(in_order(hands, [1]))


def test_what_cannot_be_sent_is_told_before_any_work(tmp_path: Path) -> None:
    with crew(Where(workers=1), tmp_path) as hands:
        with pytest.raises(UsageError, match=r"cannot be sent to a worker.*file\.py:function"):
            hands.start(lambda folder: print)
        # What can be pickled here and not be read there.
        hands.start(_elsewhere)
        _elsewhere.__module__ = "no_such_module"
        sys.modules["no_such_module"] = sys.modules[__name__]
        try:
            hands.start(_elsewhere)
        finally:
            del sys.modules["no_such_module"]
        with pytest.raises(UsageError, match="No module named 'no_such_module'"):
            list(in_order(hands, [1]))


def _elsewhere(folder: Path) -> Any:
    return print


def test_functions_of_a_users_file_are_known_in_workers(tmp_path: Path) -> None:
    from penjing.registry import attribute_of

    (tmp_path / "own.py").write_text("def begin(folder):\n    return lambda piece: piece + 1\n")
    with crew(Where(workers=1), tmp_path) as hands:
        hands.start(attribute_of(f"{tmp_path / 'own.py'}:begin"))
        assert list(in_order(hands, [1, 2])) == [2, 3]


def test_a_worker_with_other_versions_refuses() -> None:
    said = _ready.head(1)
    threads = torch.get_num_threads()
    other = dataclasses.replace(said, versions={**said.versions, "torch": "1.0"}, threads=7)
    with pytest.raises(InputError, match=r"has another torch; got .*; allowed: 1\.0"):
        _ready.meet(other)
    assert torch.get_num_threads() == threads


def spans(path: Path) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in (r.split() for r in path.read_text().splitlines())]


def test_time_is_measured_without_neighbours(tmp_path: Path) -> None:
    kinds = ["timed", "beside-timed", "timed"] * 4
    assert results(Where(workers=3), tmp_path, *kinds) == list(range(12))
    timed, beside = spans(tmp_path / "timed"), spans(tmp_path / "beside")
    assert len(timed) == 8
    assert len(beside) == 4
    # The clock is the machine's: no two spans of which one is a measurement overlap.
    for i, (began, ended) in enumerate(timed):
        for other in timed[:i] + beside:
            assert ended <= other[0] or other[1] <= began


def test_workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[2])\n"
        "import pieces\nfrom penjing.workers import Where, crew\nfolder = Path(sys.argv[1])\n"
        "with crew(Where(workers=1), folder) as hands:\n"
        "    hands.start(pieces.Begin(folder))\n    hands.give(0, (0, 'plain'))\n    hands.take()\n"
        "    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"ready\n"
    (worker,) = (int(p.name.split("-")[1]) for p in tmp_path.glob("ready-*"))
    os.kill(worker, 0)  # it is there
    driver.kill()
    driver.wait()
    driver.stdout.close()
    until = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and not _ended(worker):
        assert time.monotonic() < until
        time.sleep(0.02)


def _ended(process: int) -> bool:
    """Whether it is one whose parent has not asked yet."""
    return ") Z" in Path(f"/proc/{process}/stat").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [({"workers": 0}, "1 or more"), ({"workers": 2, "ray": "auto"}, "one of them"),
     ({"workers": 2, "threads": 0}, "threads")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Where(**options)
