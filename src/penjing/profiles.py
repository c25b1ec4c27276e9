"""A device's profile: what its kernels take, as the file of a kit tells it.

Nothing large is imported: a file that is no profile is refused before any other work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.errors import InputError, UsageError

__all__ = ["FORMATS", "Product", "Profile", "parse", "read"]

FORMATS = ("fp32", "int8", "w8", "w4")
"""Number formats that every profile has, those of `penjing.fit.space`."""
_FORMAT = 1


@dataclass(frozen=True)
class Product:
    """One layer [inputs] -> [outputs] on `tokens` rows, all of a batch, in a format."""

    format: str
    tokens: float
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Profile:
    """What a kit found.

    Attributes:
        processor, cores, memory_bytes, bytes_per_second: of the machine.
        rates: multiplications a second by (threads, format) and (tokens, inputs, outputs).
    """

    processor: str
    cores: int
    memory_bytes: int
    bytes_per_second: float
    rates: Mapping[tuple[int, str], Mapping[tuple[int, int, int], float]]

    @property
    def threads(self) -> list[int]:
        """Numbers of threads it was recorded with, ascending."""
        return sorted({threads for threads, _ in self.rates})

    def seconds(self, layers: Sequence[Product], threads: int) -> float:
        """Time of products, one after the other."""
        return math.fsum(
            layer.tokens * layer.inputs * layer.outputs / self._rate(layer, threads)
            for layer in layers
        )

    def _rate(self, layer: Product, threads: int) -> float:
        own = self.rates[threads, layer.format]
        place = [math.log(max(1.0, n)) for n in (layer.tokens, layer.inputs, layer.outputs)]
        total = weight = 0.0
        for shape, rate in own.items():
            far = sum((math.log(n) - p) ** 2 for n, p in zip(shape, place, strict=True))
            total += rate / (far + 1e-6)
            weight += 1 / (far + 1e-6)
        return total / weight


def read(path: Path, threads: int | None = None) -> Profile:
    """Read a profile, which must hold that number of threads.

    Raises:
        InputError: it is no such file.
        UsageError: it was not recorded with so many threads.
    """
    try:
        found = parse(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "not a profile of a device", got=f"{path} ({type(error).__name__}: {error})",
            next="penjing measure --profile device.json writes one",
        ) from error  # fmt: skip
    if threads is not None and threads not in found.threads:
        raise UsageError(
            f"threads that {path} was recorded with", got=threads,
            allowed=", ".join(map(str, found.threads)),
            next=f"record it again with --threads {threads}",
        )  # fmt: skip
    return found


def parse(table: Mapping[str, Any]) -> Profile:
    """A profile of what a kit wrote.

    Raises:
        ValueError, KeyError, TypeError: it has another form.
    """
    if table["format"] != _FORMAT:
        raise ValueError(f"format {table['format']}, not {_FORMAT}")
    rates: dict[tuple[int, str], dict[tuple[int, int, int], float]] = {}
    for kernel in table["kernels"]:
        shape = (int(kernel["tokens"]), int(kernel["inputs"]), int(kernel["outputs"]))
        seconds = float(kernel["microseconds"]) * 1e-6
        if not 0 < seconds < math.inf or min(shape) < 1:
            raise ValueError(f"a kernel of {shape} in {kernel['microseconds']} microseconds")
        key = int(kernel["threads"]), str(kernel["format"])
        rates.setdefault(key, {})[shape] = math.prod(shape) / seconds
    if not rates or any((threads, name) not in rates for threads, _ in rates for name in FORMATS):
        raise ValueError(f"a number of threads without one of {', '.join(FORMATS)}")
    return Profile(
        str(table["processor"]), int(table["cores"]), int(table["memory_bytes"]),
        float(table["bytes_per_second"]), rates,
    )  # fmt: skip
