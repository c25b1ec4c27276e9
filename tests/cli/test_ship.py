"""Verbs on artifacts refuse what is not one."""

import subprocess
import sys
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


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "measure what"),
        (["{d}", "--profile", "{d}/p.json"], "go alone"),
        (["--profile", "{d}/p.json", "--kit", "{d}/k.pyz"], "go alone"),
        (["--kit", "{d}/k.pyz", "--device", "ssh://host"], "--kit with --device"),
        (["--profile", "{d}/p.json", "--device", "host"], "address of a device"),
        (["--profile", "{d}/there"], "exists"),
        (["--kit", "{d}/none/k.pyz"], "none"),
    ],
)
def test_profiles_and_kits_that_cannot_be(words: list[str], what: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    done = CliRunner().invoke(group, ["measure", *(w.format(d=tmp_path) for w in words)])
    assert done.exit_code in (1, 2)
    assert what in done.stderr
    assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "kept"


def test_a_fit_for_a_device_wants_its_profile(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    words = [str(tmp_path), "--data", str(tmp_path / "data.jsonl"), "--max-drop", "1%"]
    more = ["--device", str(tmp_path / "pi.json"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(group, ["fit", *words, *more])
    assert done.exit_code == 1
    assert "no such profile" in done.stderr


def test_a_broken_profile_is_told_before_any_work(tmp_path: Path) -> None:
    """No reader takes this folder, and no network is needed to see what is wrong."""
    (tmp_path / "data.jsonl").write_text("{}")
    (tmp_path / "pi.json").write_text('{"format": 1}')
    code = """
import sys
from penjing.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    words = ["fit", str(tmp_path), "--data", str(tmp_path / "data.jsonl"), "--max-drop", "1%"]
    more = ["--device", str(tmp_path / "pi.json"), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, *more], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("penjing: error: not a profile of a device; got ")
    assert done.stderr.count("\n") == 1


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
