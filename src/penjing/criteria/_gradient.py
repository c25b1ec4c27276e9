"""Slopes of the loss, for the criteria that ask for them."""

from __future__ import annotations

from typing import Any

from penjing.errors import InputError

__all__ = ["gradient_of"]


def gradient_of(stats: Any, criterion: str) -> Any:
    """`stats.gradient` (`penjing.layerstats.Gradient`).

    Raises:
        InputError: there is none.
    """
    gradient = getattr(stats, "gradient", None)
    if gradient is None:
        raise InputError(
            f"the criterion {criterion} needs gradients on calibration data", got="none",
            next="pass --data, or use --criterion magnitude",
        )  # fmt: skip
    return gradient
