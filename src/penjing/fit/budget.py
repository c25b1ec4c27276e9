"""What the user asked for, and whether a measured result meets it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from penjing.errors import UsageError
from penjing.result import Drop, Measurement, show_drop
from penjing.units import format_size, format_time

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """Limits; None is no limit.

    Attributes:
        max_drop: of the metric, absolute or relative as the task says, 0 to 1.
        max_size: bytes of the exported model.
        max_latency: seconds, median of one call.
        max_memory: bytes, peak of the process that runs it.
        within: seconds of work.

    Raises:
        UsageError: a limit that is not a finite number above 0 (a drop of 0 is allowed).
    """

    max_drop: float | None = None
    max_size: int | None = None
    max_latency: float | None = None
    max_memory: int | None = None
    within: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None:
                continue
            real = isinstance(value, int | float) and math.isfinite(value)
            if not real or value < 0 or (value == 0 and name != "max_drop"):
                allowed = "0 or more, e.g. 0.01" if name == "max_drop" else "a number above 0"
                raise UsageError(f"--{name.replace('_', '-')}", got=repr(value), allowed=allowed)

    @property
    def is_open(self) -> bool:
        """Whether nothing but time is limited: the knee of what was measured is wanted."""
        limits = (self.max_drop, self.max_size, self.max_latency, self.max_memory)
        return all(limit is None for limit in limits)

    def to_json(self) -> dict[str, Any]:
        """Only what was asked."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def excess(
        self, measured: Measurement, drop: Drop | None, metric: str = ""
    ) -> dict[str, tuple[float, str]]:
        """Limits that are not met: by name, how many times over, and a clause that says so.

        `metric` is the name of what dropped; it says how a drop is written.
        """
        found: dict[str, tuple[float, str]] = {}

        def check(
            name: str, value: float, limit: float | None, what: str, show: Callable[[float], str]
        ) -> None:
            if limit is not None and value > limit:
                text = f"{what} is {show(value)}, asked {show(limit)}"
                if show(value) == show(limit):
                    text += f" ({value - limit:.3g} more)"
                found[name] = (value / limit if limit else float("inf"), text)

        size, latency = measured.size_bytes, measured.latency_ms.median / 1e3
        memory = measured.peak_memory_bytes
        check("size", size, self.max_size, "size", format_size)
        check("latency", latency, self.max_latency, "latency", format_time)
        check("memory", memory, self.max_memory, "peak memory", format_size)
        if drop is not None:
            kind = drop.relative

            def shown(value: float) -> str:
                return show_drop(value, metric, kind)

            check("drop", drop.value, self.max_drop, "the drop", shown)
        return found
