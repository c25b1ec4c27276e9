"""A teacher and a student from a file of the user's, on the command line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import penjing
from penjing.cli import group

NETWORK = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, 12)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))

class Net(nn.Module):
    def __init__(self, blocks, hidden):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(blocks))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

def large():
    return Net(4, 32)

def small():
    return Net(2, 16)

def example():
    return {"x": torch.zeros(2, 6)}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NETWORK)
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x, labels=(x[:, 0] > 0).astype(np.int64))
    return tmp_path


def invoke(place: Path, *more: str) -> tuple[int, str, str]:
    words = ["transfer", f"{place}/net.py:large", f"{place}/net.py:small", "--weights", "own",
             "--data", f"{place}/x.npz", "-o", f"{place}/out", *more]  # fmt: skip
    done = CliRunner().invoke(group, words)
    return done.exit_code, done.stdout, done.stderr


def test_the_student_is_written_and_loads(place: Path) -> None:
    options = ("--features", "hidden=0.5", "--outputs", "kl=2,mse", "--steps", "20", "--json")
    status, out, error = invoke(place, *options, "--lr", "0.005")
    assert status == 0, error
    found = json.loads(out)
    assert found["parameters"] < found["parameters_teacher"]
    assert any("20 steps" in line for line in found["transferred"])
    made = penjing.load(str(place / "out"))
    large = penjing.load(f"{place}/net.py:large", weights="own")
    x = {"x": torch.from_numpy(np.load(place / "x.npz")["x"])}
    fresh = penjing.load(f"{place}/net.py:small", weights="own")
    with torch.no_grad():
        near, far = ((m.run(x) - large.run(x)).norm() for m in (made, fresh))
    assert float(near) < 0.5 * float(far)


def test_without_json_it_says_what_came_out(place: Path) -> None:
    status, out, error = invoke(place, "--steps", "2")
    assert status == 0
    assert "parameters" in out
    assert "2 of 4 blocks" in error


def test_what_a_single_sample_cannot_judge_is_kept_with_a_word(place: Path) -> None:
    status, _, error = invoke(place, "--steps", "2", "--samples", "1")
    assert status == 0, error
    assert "2 steps, kept unjudged" in error
    assert "nan" not in error


def test_a_cache_that_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("x")
    status, _, error = invoke(place, "--steps", "2", "--cache", str(place / "file" / "cache"))
    assert status == 1
    assert "cache cannot be written" in error
    assert "--cache" in error
    # A read-only folder, also where the tests are the superuser's.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    status, _, error = invoke(place, "--steps", "2", "--cache", str(place / "cache"))
    assert status == 1
    assert "read-only; next: name another folder with --cache" in error
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--features", "nothing"), "allowed: none, attention"),
        (("--outputs", "nothing"), "dkd"),
        (("--outputs", "none", "--no-parameters"), "nothing to transfer"),
        (("--lr", "7"), "--lr"),
    ],
)
def test_usage(place: Path, more: tuple[str, ...], words: str) -> None:
    status, _, error = invoke(place, "--steps", "2", *more)
    assert status == 2
    assert words in error
    assert not (place / "out").exists()


def test_no_such_student(place: Path) -> None:
    done = CliRunner().invoke(
        group, ["transfer", f"{place}/net.py:large", "/no/such", "--weights", "own", "--data",
                f"{place}/x.npz", "-o", f"{place}/out"],
    )  # fmt: skip
    assert done.exit_code == 1
    assert "no such model" in done.stderr
