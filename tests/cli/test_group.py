"""One line for every error, and the exit status that scripts rely on; in real processes."""

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from penjing import __version__
from penjing.cli import group
from penjing.cli.group import Group
from penjing.errors import BudgetError

ROOT = Path(__file__).parents[2]


def penjing(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "penjing", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
        check=False,
    )


def one_line(error: str) -> str:
    assert "Traceback" not in error
    assert re.fullmatch(r"penjing: error: [^\n]+\n", error), error
    return error


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = "import sys, penjing.cli; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    begin = time.monotonic()
    done = penjing("--help")
    assert done.returncode == 0
    assert time.monotonic() - begin < 3  # a second alone; torch's import takes several here
    verbs = re.findall(r"^  ([a-z]+)  ", done.stdout, re.MULTILINE)
    wanted = "demo fit inspect evaluate prune shrink cut quantize recover apply tune transfer"
    assert verbs == [*wanted.split(), "export", "measure", "verify", "report"]


@pytest.mark.parametrize("name", ["penjing.cli", "click", "penjing.cli.tune"])
def test_ctrl_c_amid_the_imports_is_one_line(name: str) -> None:
    code = """
import os, signal, sys
class Now:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Now())
from penjing.__main__ import main
main()
"""
    words = [sys.executable, "-c", code, name]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "penjing: error: interrupted\n"


def test_a_ctrl_c_that_a_shell_holds_back_stays_so() -> None:
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.argv = ["penjing", "--version"]
from penjing.__main__ import main
try:
    main()
finally:
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"penjing {__version__}\n"), done.stderr


def test_the_entry_point_stands_before_what_takes_long_to_import() -> None:
    code = """
import sys
before = set(sys.modules)
import penjing.__main__
print(*set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"typing", "click", "penjing.cli"} & set(done.stdout.split())
    script = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert script == {"penjing": "penjing.__main__:main"}


def test_version() -> None:
    assert penjing("--version").stdout == f"penjing {__version__}\n"


def test_a_wrong_path() -> None:
    done = penjing("inspect", "/no/such/model")
    assert (done.returncode, done.stdout) == (1, "")
    assert "got /no/such/model" in one_line(done.stderr)


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    done = penjing("inspect", str(tmp_path / "notes.txt"))
    assert done.returncode == 1
    assert "allowed:" in one_line(done.stderr)


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.ones((4, 4), np.float32))
    (tmp_path / "out.npy").write_bytes(b"mine")
    arguments = ("prune", str(tmp_path / "in.npy"), "--sparsity", "0.5")
    done = penjing(*arguments, "-o", str(tmp_path / "out.npy"))
    assert done.returncode == 1
    assert "--overwrite" in one_line(done.stderr)
    assert (tmp_path / "out.npy").read_bytes() == b"mine"


def test_an_escape_sequence_does_not_reach_the_terminal() -> None:
    done = penjing("inspect", "/no/\x1b[31msuch\nmodel")
    assert "\x1b" not in one_line(done.stderr)


def run(command: click.Command) -> tuple[int, str]:
    program = Group(name="penjing")
    program.add_command(command)
    done = CliRunner().invoke(program, [str(command.name)])
    return done.exit_code, done.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BudgetError("out of reach"), 3),
        (RuntimeError("two\nlines"), 70),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 1),
    ],
)
def test_status_of_an_error(error: BaseException, status: int) -> None:
    @click.command()
    def verb() -> None:
        raise error

    found, text = run(verb)
    assert found == status
    one_line(text.lstrip("\n"))


def test_status_that_a_verb_returns() -> None:
    @click.command()
    def verb() -> int:
        return 3

    assert run(verb) == (3, "")


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENJING_DEBUG", "1")
    done = CliRunner().invoke(group, ["inspect", "/no/such/model"])
    assert done.exception is not None
    assert type(done.exception).__name__ == "InputError"


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["fit"], ["prune", ".", "-o"], ["cut", ".", "-x"]]
)
def test_usage_is_one_line(arguments: list[str]) -> None:
    done = CliRunner().invoke(group, arguments)
    assert done.exit_code == 2
    assert "--help" in one_line(done.stderr)


@pytest.mark.parametrize("verb", sorted(group.commands))
def test_every_verb_explains_itself(verb: str) -> None:
    done = CliRunner().invoke(group, [verb, "--help"])
    assert done.exit_code == 0
    if verb != "tune":
        assert f"penjing {verb} " in done.stdout.split("Options:")[0].split("\n", 1)[1]
        assert "--json" in done.stdout
