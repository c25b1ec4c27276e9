"""Verbs on artifacts refuse what is not one."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from penjing.cli import group


@pytest.mark.parametrize("verb", ["measure", "verify", "report", "export"])
def test_a_wrong_path(verb: str) -> None:
    more = ["--to", "onnx"] if verb == "export" else []
    done = CliRunner().invoke(group, [verb, "/no/artifact", *more])
    assert done.exit_code == 1
    assert "got /no/artifact" in done.stderr
    assert done.stderr.count("\n") == 1


def test_export_wants_a_target(tmp_path: Path) -> None:
    done = CliRunner().invoke(group, ["export", str(tmp_path)])
    assert done.exit_code == 2
    assert "--to onnx,openvino" in done.stderr


def test_profiles_are_not_there_yet(tmp_path: Path) -> None:
    done = CliRunner().invoke(group, ["measure", str(tmp_path), "--profile", "p.json"])
    assert done.exit_code == 2
    assert "--profile" in done.stderr


@pytest.mark.parametrize("verb", ["measure", "verify", "report", "export"])
def test_a_folder_that_is_no_artifact(verb: str, tmp_path: Path) -> None:
    more = ["--to", "onnx"] if verb == "export" else []
    done = CliRunner().invoke(group, [verb, str(tmp_path), *more])
    assert done.exit_code == 1
    assert "not an artifact" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_report_needs_results(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    done = CliRunner().invoke(group, ["report", str(tmp_path)])
    assert done.exit_code == 1
    assert "results.json" in done.stderr
