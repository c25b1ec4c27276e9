"""Budgets and names are refused before any model is read."""

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from penjing.cli import group
from penjing.cli.options import RATIO, SIZE, TIME, check_model, set_threads


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(group, list(arguments))
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_quantities() -> None:
    assert SIZE.convert("25MB", None, None) == 25_000_000
    assert TIME.convert("20ms", None, None) == pytest.approx(0.02)
    assert RATIO.convert("1%", None, None) == RATIO.convert("0.01", None, None) == 0.01


@pytest.mark.parametrize(
    ("option", "text", "hint"),
    [
        ("--max-size", "25XB", "KB MB GB"),
        ("--max-size", "0MB", "more than 0"),
        ("--max-latency", "soon", "20ms"),
        ("--max-drop", "1 apple", "1% or 0.01"),
        ("--max-memory", "-1GB", "25MB"),
        ("--within", "0", "more than 0"),
    ],
)
def test_a_bad_budget(option: str, text: str, hint: str, tmp_path: Path) -> None:
    # The model does not exist either: the budget is what is looked at first.
    error = refused("fit", "/no/model", "--data", str(tmp_path), option, text, "-o", "x")
    assert option in error
    assert hint in error


def test_unknown_names_list_the_choices() -> None:
    error = refused("prune", "/no/model", "--sparsity", "0.5", "--criterion", "zz", "-o", "x")
    assert "fisher, magnitude, random, taylor, wanda" in error
    assert "gptq" in refused("quantize", "/no/model", "--method", "zz", "-o", "x")
    error = refused("fit", "/no/model", "--data", ".", "--metric", "zz", "-o", "x")
    assert "classification" in error
    assert "onnx" in refused("export", ".", "--to", "onnx,zz")
    assert "artifact" not in refused("export", ".", "--to", "zz").replace("ARTIFACT", "")


def test_a_function_of_the_users_own_is_a_name() -> None:
    arguments = ["prune", "/no/model", "--sparsity", "0.5", "--criterion", "own.py:f", "-o", "x"]
    done = CliRunner().invoke(group, arguments)
    assert done.exit_code == 1
    assert "no such model" in done.stderr


def test_data_that_is_not_there() -> None:
    done = CliRunner().invoke(group, ["evaluate", ".", "--data", "/no/data.jsonl"])
    assert done.exit_code == 1
    assert "--data" in done.stderr
    assert "/no/data.jsonl" in done.stderr


def test_options_that_are_not_there_yet(tmp_path: Path) -> None:
    error = refused("tune", ".", "r", "--data", str(tmp_path), "--device", "pi", "-o", "x")
    assert "--device is not there yet" in error


def test_threads() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        set_threads(1)
        assert torch.get_num_threads() == 1
        set_threads(None)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert "torch" in sys.modules


def test_an_artifact_of_a_factory_says_what_reading_it_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn, zeros\n\n\ndef net():\n    return nn.Linear(3, 2)\n\n\n"
        "def example():\n    return {'x': zeros(2, 3)}\n"
    )
    place = f"{tmp_path / 'net.py'}:net"
    api = pytest.importorskip("penjing.api")
    api.save(api.load(place, weights="own"), tmp_path / "artifact")
    check_model(str(tmp_path / "artifact"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "was made from a factory" in said
    assert place in said
    # The factory itself was named by the user, and other folders call nothing.
    (tmp_path / "folder").mkdir()
    for model in (place, str(tmp_path / "folder")):
        check_model(model)
        assert capsys.readouterr().err == ""
