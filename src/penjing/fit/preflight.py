"""Before the work: what machine this is, which number formats are faster on it, and the cost.

A format's time is measured on a chain of distinct linear layers (`penjing.fit.chains`). Speed-ups
are against float32 in the same runtime.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from penjing.errors import PenjingError, UsageError
from penjing.fit import chains
from penjing.fit.space import FORMATS
from penjing.measure import physical_cores
from penjing.registry import lookup
from penjing.runtimes._profile import processor
from penjing.runtimes._worker import settle
from penjing.silence import unheard

__all__ = ["Cost", "Machine", "Speed", "formats", "machine", "predict"]


@dataclass(frozen=True)
class Machine:
    """What this process may use.

    Attributes:
        cores: physical cores.
        memory_bytes: free for new allocations.
        disk_bytes: free in the folder asked about.
        flags: of the processor, those that low-bit arithmetic depends on.
    """

    processor: str
    cores: int
    memory_bytes: int
    disk_bytes: int
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Speed:
    """One linear layer [inputs] -> [outputs] on `tokens` rows, in one format and runtime.

    Attributes:
        microseconds: median of one layer; None where the runtime cannot run the format.
        speedup: float32's time in the same runtime over this one; None as above.
    """

    runtime: str
    format: str
    tokens: int
    inputs: int
    outputs: int
    microseconds: float | None
    speedup: float | None


@dataclass(frozen=True)
class Cost:
    """What a fit is predicted to take."""

    memory_bytes: int
    disk_bytes: int
    minutes: float


def machine(folder: Path = Path()) -> Machine:
    """This machine, and the disk that holds `folder`."""
    name, flags = processor()
    return Machine(
        processor=name,
        cores=physical_cores(),
        memory_bytes=min(psutil.virtual_memory().available, _allowance()),
        disk_bytes=shutil.disk_usage(folder).free,
        flags=flags,
    )


def _allowance() -> int:
    """Bytes left in this process's control group; very many where there is no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return 1 << 62
    return max(int(limit) - used, 0) if limit.isdigit() else 1 << 62


def formats(
    shapes: Sequence[tuple[int, int, int]],
    runtimes: Sequence[str] = ("onnxruntime",),
    *,
    threads: int | None = None,
    seconds: float = 10.0,
) -> list[Speed]:
    """Measure every format of `penjing.fit.space.FORMATS` on linear layers.

    Args:
        shapes: (tokens, in, out) of typical layers.
        runtimes: `onnxruntime`, `openvino`, `executorch`.
        threads: None for the physical cores.
        seconds: about how long it may take; each format is run three times at least.

    Returns:
        By shape, runtime and format.

    Raises:
        UsageError: a size below 1, an unknown runtime, or one that is not installed.
    """
    for shape in shapes:
        if min(shape) < 1:
            raise UsageError("shape of a layer", got=shape, allowed="positive sizes")
    end = time.monotonic() + seconds
    left = len(shapes) * len(runtimes)
    speeds = []
    for shape in shapes:
        for runtime in runtimes:
            share = (end - time.monotonic()) / left
            left -= 1
            measured = _measure(shape, runtime, threads or physical_cores(), share)
            plain = measured["fp32"]
            for name, taken in measured.items():
                speedup = plain / taken if plain and taken else None
                speeds.append(Speed(runtime, name, *shape, taken, speedup))
    return speeds


def _measure(
    shape: tuple[int, int, int], runtime: str, threads: int, seconds: float
) -> dict[str, float | None]:
    """Microseconds of a layer by format, the formats interleaved."""
    end = time.monotonic() + seconds
    tokens, inputs, outputs = shape
    opened = lookup("runtimes", runtime, "open")
    file = lookup("runtimes", runtime, "file")
    weights = chains.weights(inputs, outputs)
    sessions = {}
    with tempfile.TemporaryDirectory() as work:
        for name, form in FORMATS.items():
            path = Path(work) / name / file
            path.parent.mkdir()
            try:
                chains.write(weights, form, runtime, path, tokens=tokens)
                with unheard():
                    sessions[name] = opened(path, threads=threads)
            except PenjingError:
                # A format this runtime lacks is a finding; a runtime that is not there is not.
                if name == "fp32":
                    raise
        batch = chains.inputs(tokens, inputs, runtime)
        calls: dict[str, list[float]] = {name: [] for name in sessions}
        rounds = 0
        while rounds < 3 or time.monotonic() < end:
            for name, session in sessions.items():
                session.run(batch)
                start = time.perf_counter()
                session.run(batch)
                calls[name].append(time.perf_counter() - start)
                settle()
            rounds += 1
    return {
        name: 1e6 * float(np.median(calls[name])) / len(weights) if name in calls else None
        for name in FORMATS
    }


def predict(
    *,
    parameters: int,
    widest: int,
    multiplications: float,
    samples: int,
    evaluations: int,
    exports: int,
    speeds: Sequence[Speed],
) -> Cost:
    """What a fit is predicted to take, before any of it is done.

        memory   0.6 GB for the libraries + 5 float32 copies of the weights (original, edited,
                 candidate, graph, file) + 3 float64 matrices of the widest layer (Gram
                 matrix, factor, work)
        disk     float32 original and artifact, and every export, at 4 bytes a weight
        minutes  samples x evaluations at the float32 speed measured in `speeds`, doubled for
                 what is not a matrix product, + 4 s and 100 ns a weight for each export

    Args:
        parameters: weights of the network.
        widest: most inputs of a linear layer.
        multiplications: of one sample.
        samples, evaluations: how often the network runs over how much data.
        exports: files written and measured.
        speeds: from `formats`.

    Raises:
        UsageError: no float32 speed among `speeds`.
    """
    rates = [
        s.tokens * s.inputs * s.outputs / (s.microseconds * 1e-6)
        for s in speeds
        if s.format == "fp32" and s.microseconds
    ]
    if not rates:
        raise UsageError("no float32 speed to predict from", next="measure with preflight.formats")
    running = 2 * multiplications * samples * evaluations / float(np.median(rates))
    writing = exports * (4.0 + 100e-9 * parameters)
    return Cost(
        memory_bytes=600_000_000 + 5 * 4 * parameters + 3 * 8 * widest * widest,
        disk_bytes=4 * parameters * (2 + exports),
        minutes=(running + writing) / 60,
    )
