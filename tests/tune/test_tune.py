"""One tiny network end to end by the command line; its figures by another way."""

from __future__ import annotations

import json
import math
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import penjing
from penjing.errors import InputError, UsageError
from penjing.fit import Budget
from penjing.report import write
from penjing.result import Drop
from penjing.tune.trials import Trials

pytest.importorskip("optuna")
sys.path.insert(0, str(Path(__file__).parent))
from small import make, tune


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tune"))


@pytest.fixture(scope="module")
def tuned(place: Path) -> tuple[Path, dict[str, Any]]:
    """Sixteen points, of which those in groups of five cannot be exported, sparse ones are bad."""
    done = tune(
        place, place / "tuned", "--data", str(place / "data.npz"), "--max-drop", "10%",
        "--objective", "size", "--json",
    )  # fmt: skip
    assert done.exit_code in (0, 3), done.stderr
    told = json.loads(done.stdout)
    assert done.exit_code == (0 if told["met"] else 3)
    return place / "tuned", told


def test_every_point_came_to_its_end(tuned: tuple[Path, dict[str, Any]]) -> None:
    output, told = tuned
    table = json.loads((output / "tuning.json").read_text())
    own = [r for r in table["trials"] if r["same"] is None]
    assert sum(told["trials"].values()) == len(own) == 16
    by_group = {(r["params"]["quantize.group"], r["state"]) for r in own}
    assert ("5", "complete") not in by_group
    assert {state for g, state in by_group if g == "0"} == {"complete", "pruned"}
    # 90 % of the connections gone: seen on the first quarter of the samples, never exported.
    hopeless = [r for r in own if r["params"]["prune.sparsity"] == 0.9]
    assert {r["state"] for r in hopeless} == {"pruned"}
    assert all("size_bytes" not in r["figures"] for r in hopeless)
    assert all(r["figures"]["first_low"] > 0.1 for r in hopeless)
    within = [r for r in own if r["state"] == "complete" and r["limits"]["drop"] <= 0]
    best = min(within, key=lambda r: r["figures"]["size_bytes"])
    assert table["best"] == best["number"]
    assert not (output.parent / "tuned.journal").exists()


def test_what_was_chosen_is_what_the_artifact_is(
    tuned: tuple[Path, dict[str, Any]], place: Path
) -> None:
    output, told = tuned
    written = tomllib.loads((output / "recipe.toml").read_text())["step"]
    assert written[0]["sparsity"] == told["params"]["prune.sparsity"]
    assert str(written[1]["bits"]) == told["params"]["quantize.bits"]
    (front,) = (output / "front").iterdir()
    assert front.read_text() == (output / "recipe.toml").read_text()
    assert penjing.verify(output)
    # The samples of the search and those of the figures are halves of what calibration left.
    notes = " ".join(told["notes"])
    assert told["drop"]["samples"] == 78
    assert "searched on 78 samples, figures are on 78 others" in notes
    best = json.loads((output / "tuning.json").read_text())
    chosen = best["trials"][best["best"]]["figures"]
    assert told["after"]["size_bytes"] == chosen["size_bytes"]
    # All samples through torch: 84 of calibration, and both halves.
    whole = penjing.evaluate(output, place / "data.npz", task="classification")["value"]
    halves = (78 * told["after"]["quality"] + 78 * chosen["quality"]) / 240
    assert halves - 0.01 <= whole <= halves + 84 / 240 + 0.01
    assert told["before"]["quality"] == 1.0


def test_the_report_shows_the_trials(tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    import shutil

    output = tmp_path / "copy"
    shutil.copytree(tuned[0], output)
    page = (output / "report.html").read_text()
    for text in ("<h2>Trials</h2>", "prune.sparsity", "importances need 20", "All 16 trials",
                 "cannot express", "a drop of at least"):  # fmt: skip
        assert text in page, text
    assert write(output).read_text().count("<h2>Trials</h2>") == 1
    table = json.loads((output / "tuning.json").read_text())
    table["importances"] = {"size": {"<b>bits": 0.75}}
    table["trials"] = [{"params": {"<i>x": "<script>"}}, None]
    (output / "tuning.json").write_text(json.dumps(table))
    page = write(output).read_text()
    assert "75\u00a0%" in page
    assert not any(tag in page for tag in ("<script", "<i>", "<b>"))


def test_a_cost_of_ones_own(place: Path, tmp_path: Path) -> None:
    own = ["--objective", f"{place / 'net.py'}:cost", "--trials", "16"]
    done = tune(place, tmp_path / "out", *own, "--storage", f"sqlite:///{tmp_path}/t.db")
    assert done.exit_code == 0, done.stderr
    assert "prune.sparsity  0.3" in done.stdout  # of 0, 0.3, 0.6, 0.9 the nearest to 0.25
    assert penjing.load(tmp_path / "out").masks["0.weight"].float().mean() == pytest.approx(
        0.7, abs=0.01
    )


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (["--search", "prune.colour=1|2"], 2, "no option colour"),
        (["--search", "cut.layers=1|2"], 2, "allowed: prune, quantize"),
        (["--objective", "beauty"], 2, "quality, size, latency"),
        (["--objective", "size", "--objective", "size"], 2, "each once"),
        ([], 2, "tune needs data"),
        (["--device", "pi.json"], 2, "not there yet"),
        (["--workers", "5"], 2, "concurrency; got 4; allowed: 5 or more"),
        (["--workers", "2", "--ray", "auto"], 2, "one of them"),
        (["--storage", "sqlite:///t.db", "--journal", "j", "--data", "DATA"], 2, "one of them"),
        (["--objective", "NET:cost", "--max-drop", "1%"], 2, "max_drop with a function"),
        (["--objective", "NET:cost", "--objective", "size"], 2, "give it alone"),
        (["--storage", "bonsai", "--objective", "NET:cost"], 1, "cannot open the storage"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_leaves_nothing(
    more: list[str], status: int, says: str, place: Path, tmp_path: Path
) -> None:
    known = {"DATA": str(place / "data.npz")}
    words = [known.get(w, w.replace("NET", str(place / "net.py"))) for w in more]
    done = tune(place, tmp_path / "out", *words)
    assert done.exit_code == status
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_hopeless_is_beyond_doubt_and_only_where_it_is_asked() -> None:
    def trials(objectives: tuple[str, ...], max_drop: float | None) -> Trials:
        bench = SimpleNamespace(task=SimpleNamespace(metric="accuracy"))
        return Trials(None, None, None, bench, objectives, Budget(max_drop), "")  # type: ignore[arg-type]

    def first(value: float, low: float) -> Drop:
        return Drop(value, low, 1.0, 0.95, 20, False)

    found = trials(("size",), 0.1)._hopeless(first(0.3, 0.15), math.inf)
    assert found is not None
    assert found.state == "pruned"
    assert found.limits == {"drop": pytest.approx(0.05)}
    assert trials(("size",), 0.1)._hopeless(first(0.3, 0.05), math.inf) is None
    only = trials(("quality",), None)
    assert only._hopeless(first(0.3, 0.15), 0.2) is None
    given_up = only._hopeless(first(0.3, 0.15), 0.1)
    assert given_up is not None
    assert given_up.early == 0.3
    assert trials(("quality", "size"), None)._hopeless(first(0.3, 0.15), 0.1) is None


def test_too_little_data_is_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", x=np.zeros((6, 16), np.float32))
    with pytest.raises(InputError, match="too little data"):
        penjing.tune(
            penjing.load(f"{place / 'net.py'}:net", weights="own"), place / "recipe.toml",
            ["quantize.bits=4|8"], tmp_path / "out", data=tmp_path / "few.npz",
        )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["few.npz"]
    with pytest.raises(UsageError, match="trials"):
        penjing.tune(place, place / "recipe.toml", ["quantize.bits=4|8"], tmp_path / "out",
                     trials=0)  # fmt: skip
