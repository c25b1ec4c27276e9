"""Lists of indices as text: runs of successive ones as first and last, `0-3 5 8-15`."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["from_text", "to_text"]

# No axis of a parameter is longer; a short text must not fill the memory.
_MOST = 1 << 24


def to_text(indices: Iterable[int]) -> str:
    """Text of any indices >= 0, in their order."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)


def from_text(text: str) -> list[int]:
    """Inverse of `to_text`.

    Raises:
        ValueError: no such text, or one of more indices than any axis has.
    """
    found: list[int] = []
    for run in text.split():
        first, _, last = run.partition("-")
        start, stop = int(first), int(last or first) + 1
        if len(found) + stop - start > _MOST:
            raise ValueError(f"more than {_MOST} indices")
        found += range(start, stop)
    return found
