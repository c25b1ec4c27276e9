"""The bench of a fit: candidates exported, run and evaluated beside the original.

Everything that a result reports passes through here and was measured on an exported file.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from penjing.data import Dataset
from penjing.errors import PenjingError, UsageError
from penjing.evaluate import Evaluation, Predictor, compare
from penjing.export import TARGETS, export
from penjing.fit.device import Device
from penjing.measure import Candidate, Measured, measure_files, median_ratio, quality
from penjing.model import Model
from penjing.registry import constant, lookup
from penjing.result import Drop, Measurement
from penjing.runtimes._ssh import Host
from penjing.tasks import Task
from penjing.workers import quiet

__all__ = ["Bench", "Exported", "Trial", "runtimes_here"]

# The writer whose files a runtime runs.
WRITERS = {runtime: target for target, runtime in TARGETS.items()}


def runtimes_here(wanted: str | None) -> list[str]:
    """Runtimes that are installed, or the one asked for.

    Raises:
        UsageError: the runtime asked for is unknown or not installed.
    """
    if wanted is not None:
        lookup("runtimes", wanted, "open")
        if wanted not in WRITERS:
            raise UsageError(
                f"fit measures exported files, and {wanted} runs none", allowed=", ".join(WRITERS)
            )
        if importlib.util.find_spec(wanted) is None:
            raise UsageError(
                f"runtime {wanted} is not installed",
                next=f"pip install 'penjing[{constant('runtimes', wanted, 'extra', wanted)}]'",
            )
        return [wanted]
    here = [r for r in WRITERS if importlib.util.find_spec(r) is not None]
    return [r for r in here if not constant("runtimes", r, "asked_for", False)]


@dataclass
class Exported:
    """A network on disk in one runtime's format."""

    name: str
    folder: Path
    runtime: str
    parameters: int
    model: Model

    @property
    def file(self) -> Candidate:
        """What `measure` takes."""
        path = self.folder / str(lookup("runtimes", self.runtime, "file"))
        return Candidate(path, self.runtime, self.parameters)


@dataclass
class Trial:
    """A measured candidate."""

    exported: Exported
    measured: Measurement
    drop: Drop | None
    baseline: Measurement
    ratio: float


@dataclass
class Bench:
    """Exports, measures and evaluates.

    Args:
        folder: for exported files; removed by the caller.
        dataset: evaluation data, None for none.
        task: what to measure on it.
        device: whose latencies count, by its profile; None for this machine's.
        host: a device to take latencies and memory on, in place of this machine.
    """

    folder: Path
    dataset: Dataset | None
    task: Task
    batch: int
    length: int
    threads: int
    confidence: float
    seed: int
    device: Device | None = None
    host: Host | None = None
    notes: list[str] = field(default_factory=list)
    before: Evaluation | None = None
    original: Exported | None = None

    def export(self, model: Model, name: str, runtime: str) -> Exported | None:
        """Export with parity; None, and a note, where this runtime cannot have it."""
        folder = self.folder / f"{name}-{runtime}"
        folder.mkdir()
        try:
            export(model, folder, (WRITERS[runtime],))
        except PenjingError as error:
            self.notes.append(f"{name} in {runtime}: {error}")
            return None
        return Exported(name, folder, runtime, model.parameter_count, model)

    def time(self, exports: list[Exported], seconds: float = 8.0) -> list[Measured]:
        """Latency, memory and size of several files, interleaved; beside no other worker."""
        with quiet():
            found = measure_files(
                [e.file for e in exports],
                exports[0].model,
                batch=self.batch,
                length=self.length,
                threads=self.threads,
                seconds=seconds,
                host=self.host,
            )
        if (device := self.device) is None:
            return found
        return [
            device.there(e.model, one, batch=self.batch, length=self.length)
            for e, one in zip(exports, found, strict=True)
        ]

    @property
    def place(self) -> dict[str, Any] | None:
        """Which device latencies are of, and whether they were taken on it; None for this one."""
        if self.host is not None:
            return {"name": self.host.address, "threads": self.threads, "measured": True}
        if self.device is not None:
            about = {"name": self.device.name, "processor": self.device.profile.processor}
            return about | {"threads": self.device.threads, "measured": False}
        return None

    def evaluate(self, exported: Exported, reference: Predictor | None) -> Evaluation | None:
        """The user's metric through the exported file, in a process of its own."""
        if self.dataset is None:
            return None
        return quality(
            exported.file, exported.model, self.dataset, self.task, length=self.length,
            threads=self.threads, reference=reference,
        )  # fmt: skip

    def start(self, original: Exported, reference: Predictor) -> None:
        """Evaluate the original's export; every drop is against it."""
        self.original = original
        self.before = self.evaluate(original, reference if self.task.needs_reference else None)

    def trial(self, exported: Exported, reference: Predictor) -> Trial:
        """Measure a candidate beside the original, in one run."""
        assert self.original is not None
        was, now = self.time([self.original, exported])
        after = self.evaluate(exported, reference)
        drop = None
        if self.before is not None and after is not None:
            drop = compare(
                self.before, after, self.task, confidence=self.confidence, seed=self.seed
            )
        return Trial(
            exported,
            replace(now.measurement, quality=after.value if after else None),
            drop,
            replace(was.measurement, quality=self.before.value if self.before else None),
            median_ratio(was, now),
        )
