"""Errors for users: one line that says what, got, allowed, and what to do next.

Every error carries the exit status of the command line: 1 bad input, 2 usage,
3 done but the budget could not be met.
"""

from __future__ import annotations

from typing import Any

__all__ = ["BudgetError", "ExportError", "InputError", "PenjingError", "UsageError", "printable"]


def printable(value: object, limit: int = 160) -> str:
    """`value` as one line without control characters, cut to `limit` characters.

    Names out of files reach terminals through errors; an escape sequence must not.
    """
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


class PenjingError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: what is wrong, a clause without a full stop.
        got: what was found.
        allowed: what would have been accepted.
        next: what the user can do about it.
    """

    exit_status = 1

    def __init__(
        self,
        what: str,
        *,
        got: object | None = None,
        allowed: object | None = None,
        next: str | None = None,
    ) -> None:
        self.what, self.got, self.allowed, self.next = what, got, allowed, next
        parts = [printable(what, 600)]
        if got is not None:
            parts.append(f"got {printable(got)}")
        if allowed is not None:
            parts.append(f"allowed: {printable(allowed, 400)}")
        if next is not None:
            parts.append(f"next: {printable(next, 400)}")
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        # By its parts, as text: an error crosses from a worker's process to its driver's.
        got = None if self.got is None else str(self.got)
        allowed = None if self.allowed is None else str(self.allowed)
        return _again, (type(self), self.what, got, allowed, self.next)


def _again(
    kind: type[PenjingError], what: str, got: str | None, allowed: str | None, next: str | None
) -> PenjingError:
    return kind(what, got=got, allowed=allowed, next=next)


class InputError(PenjingError):
    """A file, a model or data that cannot be used."""


class UsageError(PenjingError):
    """Options that do not make sense."""

    exit_status = 2


class ExportError(PenjingError):
    """The exported file could not be written or does not agree with the model."""


class BudgetError(PenjingError):
    """The budget is out of reach."""

    exit_status = 3
