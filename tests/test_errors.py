"""Errors are one printable line with the parts a user needs, and carry the exit status."""

import pytest

from penjing.errors import BudgetError, ExportError, InputError, PenjingError, UsageError, printable


def test_the_line() -> None:
    error = InputError("no such file", got="a.npy", allowed="files", next="check the path")
    assert str(error) == "no such file; got a.npy; allowed: files; next: check the path"
    assert (error.what, error.got, error.allowed, error.next) == (
        "no such file",
        "a.npy",
        "files",
        "check the path",
    )
    assert str(UsageError("bits")) == "bits"


def test_falsy_values_are_shown() -> None:
    assert str(InputError("samples", got=0, allowed=">= 1")) == "samples; got 0; allowed: >= 1"


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\nb", "a\rb", "a\x00b", "a\u202eb"])
def test_no_control_character_reaches_a_terminal(text: str) -> None:
    for line in (str(InputError(text)), str(InputError("x", got=text, allowed=text, next=text))):
        assert line.isprintable()
        assert "\n" not in line


def test_long_values_are_cut() -> None:
    assert printable("x" * 500) == "x" * 157 + "..."
    assert printable("x" * 160) == "x" * 160


def test_exit_statuses() -> None:
    statuses = {InputError: 1, ExportError: 1, UsageError: 2, BudgetError: 3}
    assert {kind: kind("x").exit_status for kind in statuses} == statuses
    assert all(issubclass(kind, PenjingError) for kind in statuses)
