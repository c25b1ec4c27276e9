"""What workers and a Ray cluster change: nothing. Writes bench/results/distributed.md.

    python bench/distributed.py [overhead] [same] [kills] [network]

All on this machine; the Ray cluster is a head without cores and two nodes of one core, with a
token. overhead: 200 trials that do nothing. same: 40 trials whose times differ, by this process,
by 1, 2 and 3 workers and by Ray. kills: the same 40 on Ray, ten times, with one node killed at a
random moment of each; nodes are replaced between runs. network: trials of a small network,
exported and run, and its survey, by this process, by 2 workers and by Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "tune"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "fit"))
import cheap_search as cheap
import small
import torch

import penjing
from clusters import cluster
from penjing.fit.survey import survey
from penjing.tune.quest import Costs
from penjing.tune.records import Journal, Record
from penjing.tune.search import Attempts, search
from penjing.tune.space import parse
from penjing.workers import Where, crew

STORE = Path(__file__).parent / "results" / "distributed.json"
TRIALS, NOTHING, KILLS, AT_ONCE = 40, 200, 10, 4
HERE_WORKERS = {"this process": Where(), "1 worker": Where(workers=1),
                "2 workers": Where(workers=2), "3 workers": Where(workers=3)}  # fmt: skip


class Timed(Journal):
    """A journal that knows when."""

    ends: list[float]

    def append(self, record: Record) -> None:
        super().append(record)
        self.ends.append(time.perf_counter())


def searched(where: Where, cost: Any, trials: int, lines: list[str]) -> tuple[list[Any], Timed]:
    """Trials without their times, by number; and the journal."""
    space = parse(cheap.RECIPE, lines)
    with tempfile.TemporaryDirectory() as name:
        journal = Timed(Path(name) / "trials.jsonl", {}, AT_ONCE)
        journal.ends = []
        with crew(where, Path(name)) as hands:
            hands.start(Attempts(space, Costs(cost, ("cost",))))
            found = search(space, hands, journal, trials=trials, concurrency=AT_ONCE, seed=3)
    return [r.to_json() | {"seconds": 0} for r in found], journal


def overhead(places: dict[str, Where]) -> dict[str, Any]:
    """Milliseconds a trial, from the end of the first one on: workers have started by then."""
    lines = ["prune.sparsity=0..0.9", "quantize.alpha=0..1", "quantize.group=16|32|64"]
    rows = {}
    for name, where in places.items():
        _, journal = searched(where, cheap.nothing, NOTHING, lines)
        gaps = 1e3 * np.diff(journal.ends)
        rows[name] = {"mean": float(gaps.mean()), "median": float(np.median(gaps)),
                      "p95": float(np.percentile(gaps, 95))}  # fmt: skip
    return rows


def same(places: dict[str, Where]) -> dict[str, Any]:
    """Whether all trials are those of this process, and how many were finished out of turn."""
    wanted, _ = searched(Where(), cheap.late, TRIALS, cheap.SEARCH)
    rows = {}
    for name, where in places.items():
        found, journal = searched(where, cheap.late, TRIALS, cheap.SEARCH)
        numbers = [r.number for r in journal.records]
        rows[name] = {"equal": found == wanted, "trials": len(found),
                      "out_of_turn": sum(a > b for a, b in pairwise(numbers))}  # fmt: skip
    return rows


def _kill(made: Any, journal: Path, point: int, wait: float, which: int) -> None:
    """One of the nodes, some seconds after so many trials were finished."""
    while not journal.exists() or journal.read_bytes().count(b"\n") < point + 1:
        time.sleep(0.002)
    time.sleep(wait)
    nodes = sorted(made.worker_nodes, key=lambda node: node.node_id)
    made.remove_node(nodes[which], allow_graceful=False)


def kills(made: Any, keep: Any) -> None:
    """Runs with a node killed; `made` is the cluster. The driver and its workers stay, and a new
    node takes the place of the killed one."""
    wanted, _ = searched(Where(), cheap.late, TRIALS, cheap.SEARCH)
    space, draw, rows = parse(cheap.RECIPE, cheap.SEARCH), random.Random(0), []
    with tempfile.TemporaryDirectory() as name, crew(Where(ray=made.address), Path(name)) as hands:
        for number in range(KILLS):
            path = Path(name) / f"{number}.jsonl"
            point, wait = draw.randrange(2, TRIALS - 8), draw.uniform(0, 0.1)
            thread = threading.Thread(
                target=_kill, args=(made, path, point, wait, draw.randrange(2))
            )
            thread.start()
            hands.start(Attempts(space, Costs(cheap.late, ("cost",))))
            search(space, hands, Journal(path, {}, AT_ONCE), trials=TRIALS, concurrency=AT_ONCE,
                   seed=3)  # fmt: skip
            thread.join()
            kept = [json.loads(line) for line in path.read_text().splitlines()[1:]]
            numbers = [entry["number"] for entry in kept]
            found = sorted((e | {"seconds": 0} for e in kept), key=lambda e: e["number"])
            rows.append({
                "killed_after": point, "trials": len(numbers),
                "lost": len(set(range(len(wanted))) - set(numbers)),
                "doubled": len(numbers) - len(set(numbers)),
                "equal": found == json.loads(json.dumps(wanted)),
            })  # fmt: skip
            print(rows[-1], flush=True)
            keep(rows)
            made.add_node(num_cpus=1, object_store_memory=100_000_000, include_dashboard=False)
            made.wait_for_nodes()


def network(places: dict[str, Where]) -> dict[str, Any]:
    """Trials of a network that is exported, and the survey of one, against this process's."""
    from test_units import FORMATS, NET

    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = small.make(Path(name))
        (folder / "blocks.py").write_text(NET)
        model = penjing.load(f"{folder / 'blocks.py'}:net", weights="own")
        generator = torch.Generator().manual_seed(0)
        data = [{"x": torch.randn(16, 8, generator=generator)} for _ in range(3)]
        for place, where in places.items():
            told = penjing.tune(
                penjing.load(f"{folder / 'net.py'}:net", weights="own"), folder / "recipe.toml",
                ["prune.sparsity=0..0.9:0.3", "quantize.bits=4|8"], folder / "out", trials=6,
                data=folder / "data.npz", objective="size", max_drop=0.1, threads=1,
                workers=where.workers, ray=where.ray, overwrite=True,
            )  # fmt: skip
            trials = [r.to_json() | {"seconds": 0} for r in told.trials]
            os.environ["PENJING_CACHE"] = str(folder / "cache")
            shutil.rmtree(folder / "cache", ignore_errors=True)
            shutil.rmtree(folder / "work", ignore_errors=True)
            (folder / "work").mkdir()
            found = asdict(survey(model, data[:2], data[2:], lambda _: 0.0, FORMATS, limit=1.0,
                                  seconds=60, where=where, folder=folder / "work"))  # fmt: skip
            rows[place] = {"trials": trials, "survey": found | {"seconds": 0.0}}
    first = next(iter(rows.values()))
    return {
        place: {"trials": len(row["trials"]), "trials_equal": row["trials"] == first["trials"],
                "networks": row["survey"]["evaluations"],
                "survey_equal": row["survey"] == first["survey"]}
        for place, row in rows.items()
    }  # fmt: skip


def page(kept: dict[str, Any]) -> str:
    """The tables."""
    lines = ["# distributed", "", "Made by `python bench/distributed.py` on one machine of 2 cores,"
             " beside other work; Ray with two nodes of one core there."]  # fmt: skip
    if rows := kept.get("overhead"):
        lines += ["", f"Milliseconds a trial of {NOTHING} that do nothing, 3 parameters, up to "
                  f"{AT_ONCE} at once, from the end of the first one on, one run:", "",
                  "| | mean | median | 95th percentile |", "|---|---|---|---|"]  # fmt: skip
        lines += [f"| {name} | {r['mean']:.1f} | {r['median']:.1f} | {r['p95']:.1f} |"
                  for name, r in rows.items()]  # fmt: skip
    if rows := kept.get("same"):
        lines += ["", f"{TRIALS} different trials whose times differ, one run each:", "",
                  "| | trials | finished out of turn | equal to those of one process |",
                  "|---|---|---|---|"]  # fmt: skip
        lines += [f"| {name} | {r['trials']} | {r['out_of_turn']} | {_yes(r['equal'])} |"
                  for name, r in rows.items()]  # fmt: skip
    if runs := kept.get("kills"):
        lines += ["", f"{len(runs)} runs on two Ray nodes, of which one was killed in each:", "",
                  "| killed after | trials | lost | doubled | equal to those of one process |",
                  "|---|---|---|---|---|"]  # fmt: skip
        lines += [f"| {r['killed_after']} | {r['trials']} | {r['lost']} | {r['doubled']} | "
                  f"{_yes(r['equal'])} |" for r in runs]  # fmt: skip
    if rows := kept.get("network"):
        lines += ["", "A network of two layers, exported and run in each trial; and the survey of "
                  "one of four blocks:", "", "| | trials | equal | networks surveyed | equal |",
                  "|---|---|---|---|---|"]  # fmt: skip
        lines += [f"| {name} | {r['trials']} | {_yes(r['trials_equal'])} | {r['networks']} | "
                  f"{_yes(r['survey_equal'])} |" for name, r in rows.items()]  # fmt: skip
    return "\n".join(lines) + "\n"


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["overhead", "same", "kills", "network"])
    given = parser.parse_args()
    kept = json.loads(STORE.read_text()) if STORE.exists() else {}
    with cluster(2) as made:
        ray = {"Ray, 2 nodes": Where(ray=made.address)}
        some = {name: HERE_WORKERS[name] for name in ("this process", "2 workers")}
        works = {
            "overhead": lambda: overhead(HERE_WORKERS | ray),
            "same": lambda: same(HERE_WORKERS | ray),
            "network": lambda: network(some | ray),
        }

        def keep(part: str, found: Any) -> None:
            kept[part] = found
            STORE.write_text(json.dumps(kept, indent=1) + "\n")
            STORE.with_suffix(".md").write_text(page(kept))

        if "kills" in given.parts:
            kills(made, partial(keep, "kills"))
        for part, work in works.items():
            if part in given.parts:
                keep(part, work())


if __name__ == "__main__":
    main()
