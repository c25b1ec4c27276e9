"""recover on the command line: a small network of the user's own, cut and trained."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import penjing
from penjing.cli import group

NETWORK = """
import torch
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
    def forward(self, hidden):
        return hidden + self.down(torch.nn.functional.gelu(self.up(hidden)))
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(*(Block() for _ in range(4)))
        self.out = torch.nn.Linear(8, 5)
    def forward(self, x):
        return self.out(self.blocks(x))
def network():
    torch.manual_seed(0)
    return Net()
def example():
    return torch.zeros(2, 3, 8)
"""


def invoke(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(group, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with `cut`, an artifact without two of its blocks, and `x.npz`."""
    (tmp_path / "net.py").write_text(NETWORK)
    x = np.random.default_rng(0).normal(size=(64, 3, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    model, data = f"{tmp_path / 'net.py'}:network", tmp_path / "x.npz"
    status, _, error = invoke(
        "cut", model, "--weights", "own", "--layers", 2, "--data", data, "-o", tmp_path / "cut"
    )
    assert status == 0, error
    return tmp_path


def _off(place: Path, name: str) -> float:
    """Distance of an artifact's outputs from the network's own."""
    x = torch.from_numpy(np.load(place / "x.npz")["x"])
    with torch.no_grad():
        wanted = penjing.load(f"{place / 'net.py'}:network", weights="own").module(x)
        return float((penjing.load(str(place / name)).module(x) - wanted).norm())


@pytest.mark.parametrize(
    "options",
    [
        (),
        (
            "--optimizer",
            "sgd",
            "--schedule",
            "one-cycle",
            "--clip",
            0.5,
            "--accumulate",
            2,
            "--lr",
            0.1,
        ),
        ("--optimizer", "adafactor", "--schedule", "linear", "--warmup", 0, "--l2", 1e-6),
        ("--rank", 2, "--precision", "float32", "--weight-decay", 0.01, "--hidden", 1),
        ("--patience", 3, "--schedule", "constant", "--l1", 1e-7, "--group-lasso", 1e-7),
    ],
)
def test_every_option_trains(place: Path, options: tuple[object, ...]) -> None:
    arguments = ("--data", place / "x.npz", "--steps", 120, "--lr", 5e-3, "--loss", "mse")
    status, out, error = invoke(
        "recover", place / "cut", *arguments, *options, "-o", place / "better"
    )
    assert (status, error.count("error")) == (0, 0), error
    assert "wrote" in out
    assert _off(place, "better") < _off(place, "cut")
    assert not (place / "better.journal").exists()


def test_within_is_kept_with_loading_and_writing(place: Path) -> None:
    begin = time.monotonic()
    arguments = ("--data", place / "x.npz", "--lr", 5e-3, "--loss", "mse", "--within", "6s")
    status, _, error = invoke("recover", place / "cut", *arguments, "-o", place / "better")
    took = time.monotonic() - begin
    assert status == 0, error
    assert 3 < took < 6
    assert _off(place, "better") < _off(place, "cut")


def test_what_does_not_help_is_said(place: Path) -> None:
    arguments = ("--data", place / "x.npz", "--steps", 3, "--lr", 0.9, "--optimizer", "sgd")
    status, _, error = invoke("recover", place / "cut", *arguments, "-o", place / "same")
    assert status == 0
    assert "no better on held-out data" in error
    assert _off(place, "same") == _off(place, "cut")


def test_what_a_single_sample_cannot_judge_is_kept_with_a_word(place: Path) -> None:
    arguments = ("recover", place / "cut", "--data", place / "x.npz", "--steps", 3)
    for samples in (1, 8):
        output = place / f"of{samples}"
        status, _, error = invoke(*arguments, "--samples", samples, "-o", output)
        assert status == 0, error
        alone = samples == 1
        assert error.count("kept unjudged") == alone
        page = (output / "report.html").read_text()
        assert ("kept unjudged" in page) is alone
        assert ("held-out loss" in page) is not alone


def test_a_full_disk_keeps_no_blocks_of_a_training(place: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, old[1]))
        status, _, error = invoke(
            "recover", place / "cut", "--data", place / "x.npz", "--steps", 40, "--lr", 0.003,
            "-o", place / "o",
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert status == 1
    assert "free disk space" in error
    assert "nothing is kept" in error
    assert error.count("kept") == 1
    assert not list(place.glob("o*"))


def test_refusals(place: Path) -> None:
    data = ("--data", place / "x.npz", "-o", place / "o")
    for options, hint in (
        (("--within", "1m", "--seconds", "1m"), "one of them"),
        (("--optimizer", "adagard"), "adamw, sgd, adafactor, file.py:function"),
        (("--schedule", "stairs"), "one-cycle"),
        (("--lr", 2), "0<x<1"),
    ):
        status, _, error = invoke("recover", place / "cut", *options, *data)
        assert (status in (1, 2), hint in error, "Traceback" in error) == (True, True, False), error
    assert not (place / "o").exists()


def _under_torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    run += ["--nproc-per-node", "2", "-m", "penjing", *(str(a) for a in arguments)]
    return subprocess.run(run, capture_output=True, text=True, timeout=300)


def test_two_processes_make_what_one_does_and_the_first_alone_speaks(place: Path) -> None:
    common = ("--data", place / "x.npz", "--steps", 30, "--lr", 5e-3, "--loss", "mse",
              "--precision", "float32", "--json")  # fmt: skip
    done = _under_torchrun("recover", place / "cut", *common, "--to", "onnx", "-o", place / "two")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(place / "two")  # one object, once
    status, _, error = invoke(
        "recover", place / "cut", *common, "--accumulate", 2, "-o", place / "one"
    )
    assert status == 0, error
    assert (place / "two" / "model.onnx").is_file()
    one, two, was = (penjing.load(str(place / name)) for name in ("one", "two", "cut"))
    for name, parameter in one.parameters():
        moved = (parameter - dict(was.parameters())[name]).norm()
        assert (dict(two.parameters())[name] - parameter).norm() <= 1e-3 * moved, name
    curves = [
        json.loads((place / name / "manifest.json").read_text())["metrics"]["curves"][0]["losses"]
        for name in ("one", "two")
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    left = {p.name for p in place.iterdir()} - {"net.py", "x.npz", "cut", "one", "two"}
    assert left <= {"__pycache__"}


def test_what_two_processes_refuse_is_said_once(place: Path) -> None:
    (place / "there").mkdir()
    arguments = ("--data", place / "x.npz", "--steps", 3, "-o", place / "there")
    done = _under_torchrun("recover", place / "cut", *arguments)
    assert done.returncode != 0
    assert done.stderr.count("penjing: error: the output exists") == 1


def test_the_report_of_a_recovery_has_its_curve(place: Path) -> None:
    arguments = ("--data", place / "x.npz", "--steps", 40, "--lr", 5e-3, "--loss", "mse")
    status, _, error = invoke("recover", place / "cut", *arguments, "-o", place / "better")
    assert status == 0, error
    page = (place / "better" / "report.html").read_text("utf-8")
    (path,) = re.findall(r'class="front" d="M([^"]+)"', page)
    assert len(path.split(" L")) == 40
    assert "steps = 40" in page
    assert all(check.ok for check in penjing.verify(place / "better"))
    status, out, error = invoke("report", place / "better")
    assert (status, out.strip()) == (0, str(place / "better" / "report.html")), error
    assert (place / "better" / "report.html").read_text("utf-8") == page
