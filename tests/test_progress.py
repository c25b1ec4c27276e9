"""Bars on a pseudo terminal after the delay, silence everywhere else."""

import os
import pty
import subprocess
import sys

import pytest

from penjing import progress

BODY = """
import sys, time
from penjing import progress
progress.DELAY = {delay}
with progress.task("outer [part]"):
    print(sum(progress.track(range(6), "inner", total=6)), flush=True)
    for _ in progress.track(range(4), "slow"):
        time.sleep(0.15)
"""


def on_a_terminal(delay: float) -> tuple[str, str]:
    """Standard output, and what a terminal on standard error received."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", BODY.format(delay=delay)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
    ) as process:
        os.close(theirs)
        received = b""
        try:
            while chunk := os.read(ours, 4096):
                received += chunk
        except OSError:
            pass  # Linux reports the closed other end of a terminal as an error
        assert process.stdout is not None
        out = process.stdout.read().decode()
        assert process.wait() == 0
    os.close(ours)
    return out, received.decode()


def test_shown_on_a_terminal_after_the_delay() -> None:
    out, received = on_a_terminal(0.1)
    assert out == "15\n"
    assert "outer [part]" in received
    assert "slow" in received
    assert "left" in received


def test_quick_work_shows_nothing() -> None:
    assert on_a_terminal(30.0) == ("15\n", "")


def test_silent_off_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.task("work"):
        assert list(progress.track(iter("abc"), "letters")) == ["a", "b", "c"]
    assert capfd.readouterr() == ("", "")


def test_an_error_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), progress.task("work"):
        raise ZeroDivisionError
