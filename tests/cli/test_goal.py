"""fit's checks before work, and what it prints of a result."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from penjing.cli import goal, group
from penjing.result import Drop, Latency, Measurement, Result


def result(met: bool) -> Result:
    slow, fast = Latency(20.0, 22.0, 1, 128), Latency(4.0, 5.0, 1, 128)
    before = Measurement(90_000_000, 22_700_000, 31.7, slow, 300_000_000, 0.957)
    after = Measurement(15_000_000, 11_000_000, 10.9, fast, 90_000_000, 0.95)
    return Result(
        task="retrieval",
        metric="accuracy",
        runtime="onnxruntime",
        threads=2,
        before=before,
        after=after,
        drop=Drop(0.0073, -0.001, 0.016, 0.95, 445, False),
        budget={"max_drop": 0.01},
        met=met,
        why=None if met else "latency 4.0 ms is above 2.0 ms",
    )


def finish(met: bool, tmp_path: Path, as_json: bool = False) -> tuple[int, str, str]:
    @click.command()
    def verb() -> None:
        click.get_current_context().exit(goal.finish(result(met), tmp_path, as_json))

    done = CliRunner().invoke(verb)
    return done.exit_code, done.stdout, done.stderr


def test_summary_of_a_met_budget(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("x")
    status, out, error = finish(True, tmp_path)
    assert (status, error) == (0, "")
    assert "6.00x" in out  # 90 MB to 15 MB
    assert "5.00x" in out  # 20 ms to 4 ms
    assert "drop 0.73%, 95% interval -0.10% to 1.60%, 445 samples" in out
    assert str(tmp_path / "report.html") in out


def test_a_budget_that_is_not_met_is_status_3_and_one_line(tmp_path: Path) -> None:
    status, out, error = finish(False, tmp_path)
    assert status == 3
    assert "NOT within the budget" in out
    assert error == "penjing: budget not met: latency 4.0 ms is above 2.0 ms\n"


def test_json_is_one_object(tmp_path: Path) -> None:
    status, out, _ = finish(False, tmp_path, as_json=True)
    table = json.loads(out)
    assert status == 3
    assert (table["met"], table["output"], table["format"]) == (False, str(tmp_path), 1)


def test_fit_and_tune_say_the_same_of_what_they_share() -> None:
    """Their own are those of one of them alone; the runtimes they begin with differ."""
    fit, tune = ({p.name: p.to_info_dict() for p in group.commands[v].params}
                 for v in ("fit", "tune"))  # fmt: skip
    shared = {"calibration", "task", "max_drop", "max_size", "max_latency", "runtime", "within",
              "batch", "length", "threads", "seed", "confidence", "data"}  # fmt: skip
    assert shared <= fit.keys() & tune.keys()
    for name in shared:
        differing = {key for key, value in fit[name].items() if tune[name][key] != value}
        assert differing == {"runtime": {"help"}, "data": {"required"}}.get(name, set())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "eval.jsonl"
    path.write_text('{"text": "a b c", "label": 0}\n')
    return path


def test_fit_does_not_touch_an_existing_output(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    done = CliRunner().invoke(
        group,
        ["fit", str(tmp_path), "--data", str(data), "--max-drop", "1%", "-o", str(output)],
    )
    assert done.exit_code == 1
    assert "--overwrite" in done.stderr
    assert list(output.iterdir()) == []


def test_demo_does_not_touch_an_existing_output(tmp_path: Path) -> None:
    done = CliRunner().invoke(group, ["demo", "-o", str(tmp_path)])
    assert done.exit_code == 1
    assert "--overwrite" in done.stderr
