"""Numbers for people."""

import json
from pathlib import Path

import numpy as np
import pytest

from penjing.cli.show import count, folder_size, show_json, show_pairs, show_result
from penjing.result import Drop, Latency, Measurement, Result


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "0"), (999, "999"), (1234567, "1.23 M"), (1e9, "1.00 G"), (2e12, "2.00 T")],
)
def test_count(number: float | None, text: str) -> None:
    assert count(number) == text


def test_folder_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_bytes(b"678")
    assert folder_size(tmp_path) == 8
    assert folder_size(tmp_path / "a") == 5


def test_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"n": np.float32(1.5), "path": Path("x"), "text": "a\nb"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"n": 1.5, "path": "x", "text": "a\nb"}
    with pytest.raises(ValueError, match="JSON"):
        show_json({"n": float("nan")})


def test_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    show_pairs({"size": 1.23456789, "ok": True, "latency": {"median": 2.5, "batch": 1}}, "done")
    assert capsys.readouterr().out == (
        "done\n  size     1.23457\n  ok       yes\n  latency  median 2.5, batch 1\n"
    )


@pytest.mark.parametrize(
    ("metric", "relative", "text"),
    [
        ("kl", False, "drop 0.0491 nats, 95% interval 0.0444 nats to 0.0538 nats, 521 samples"),
        ("cosine", False, "drop 0.0491, 95% interval 0.0444 to 0.0538, 521 samples"),
        ("top-1 accuracy", False, "drop 4.91%, 95% interval 4.44% to 5.38%, 521 samples"),
        ("perplexity", True,
         "drop 4.91% of the original, 95% interval 4.44% to 5.38%, 521 samples"),
    ],
)  # fmt: skip
def test_a_drop_is_in_its_own_unit(
    metric: str, relative: bool, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side = Measurement(1000, 100, 80.0, Latency(1.0, 2.0, 1, None), 5000, 0.5)
    drop = Drop(0.0491, 0.0444, 0.0538, 0.95, 521, relative)
    show_result(Result("t", metric, "onnxruntime", 1, side, side, drop, {}, True, None), tmp_path)
    assert text in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("budget", "notes", "verdict"),
    [
        ({"max_size": 2000}, (), "within the budget"),
        ({"within": 60.0}, (), "no limits were given"),
        ({}, ("a note", "no limits were given: the knee of 5 measured points"),
         "no limits were given: the knee of 5 measured points"),
    ],
)  # fmt: skip
def test_without_a_budget_nothing_is_within_it(
    budget: dict[str, float], notes: tuple[str, ...], verdict: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    side = Measurement(1000, 100, 80.0, Latency(1.0, 2.0, 1, None), 5000, None)
    found = Result("t", "kl", "onnxruntime", 1, side, side, None, budget, True, None, notes=notes)
    show_result(found, tmp_path)
    assert capsys.readouterr().out.splitlines()[0] == f"{verdict}; runtime onnxruntime, 1 thread"


def test_what_there_was_no_time_for_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side = Measurement(1000, 100, 80.0, Latency(1.0, 2.0, 1, None), 5000, None)
    notes = ("fp32 in openvino: 3 ms", "no further candidate after 50 s: --within is 60 s")
    show_result(
        Result("t", "kl", "onnxruntime", 1, side, side, None, {}, True, None, notes=notes), tmp_path
    )
    out = capsys.readouterr().out
    assert "1 thread\n" in out
    assert notes[1] in out
    assert notes[0] not in out
