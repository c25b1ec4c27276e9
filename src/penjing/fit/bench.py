"""The bench of a fit: candidates exported, run and evaluated beside the original.

Everything that a result reports passes through here and was measured on an exported file.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from penjing.data import Dataset
from penjing.errors import PenjingError, UsageError
from penjing.evaluate import Evaluation, Predictor, compare
from penjing.export import export
from penjing.measure import Candidate, Measured, Remote, measure_files
from penjing.model import Model
from penjing.result import Drop, Measurement
from penjing.tasks import Task

__all__ = ["Bench", "Exported", "Trial", "runtimes_here"]

# Writer and file of each runtime.
FILES = {"onnxruntime": ("onnx", "model.onnx"), "openvino": ("openvino", "openvino")}


def runtimes_here(wanted: str | None) -> list[str]:
    """Runtimes that are installed, or the one asked for.

    Raises:
        UsageError: the runtime asked for is unknown or not installed.
    """
    from penjing.registry import lookup

    if wanted is not None:
        lookup("runtimes", wanted, "open")
        if wanted not in FILES:
            raise UsageError(
                f"fit measures exported files, and {wanted} runs none", allowed=", ".join(FILES)
            )
        if importlib.util.find_spec(wanted) is None:
            raise UsageError(
                f"runtime {wanted} is not installed", next=f"pip install 'penjing[{wanted}]'"
            )
        return [wanted]
    return [r for r in FILES if importlib.util.find_spec(r) is not None]


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
        return Candidate(self.folder / FILES[self.runtime][1], self.runtime, self.parameters)


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
    """

    folder: Path
    dataset: Dataset | None
    task: Task
    batch: int
    length: int
    threads: int
    confidence: float
    seed: int
    user_batch: int | None = None
    notes: list[str] = field(default_factory=list)
    before: Evaluation | None = None
    original: Exported | None = None

    def export(self, model: Model, name: str, runtime: str) -> Exported | None:
        """Export with parity; None, and a note, where this runtime cannot have it."""
        folder = self.folder / f"{name}-{runtime}"
        folder.mkdir()
        parameters = sum(p.numel() for _, p in model.parameters())
        try:
            export(model, folder, (FILES[runtime][0],))
        except PenjingError as error:
            self.notes.append(f"{name} in {runtime}: {error}")
            return None
        return Exported(name, folder, runtime, parameters, model)

    def time(self, exports: list[Exported], seconds: float = 8.0) -> list[Measured]:
        """Latency, memory and size of several files, interleaved."""
        return measure_files(
            [e.file for e in exports],
            exports[0].model,
            batch=self.batch,
            length=self.length,
            user_batch=self.user_batch,
            threads=self.threads,
            seconds=seconds,
        )

    def evaluate(self, exported: Exported, reference: Predictor | None) -> Evaluation | None:
        """The user's metric through the exported file, in a process of its own."""
        from penjing.evaluate import evaluate

        if self.dataset is None:
            return None
        with Remote(exported.file.path, exported.runtime, threads=self.threads) as session:

            def predict(batch: dict[str, torch.Tensor]) -> Any:
                return session.run({name: tensor.numpy() for name, tensor in batch.items()})

            return evaluate(
                predict,
                exported.model,
                self.dataset,
                self.task,
                length=self.length,
                reference=predict if reference is None else reference,
            )

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
        ratios = [a / b for a, b in zip(was.rounds_ms, now.rounds_ms, strict=True)]
        return Trial(
            exported,
            replace(now.measurement, quality=after.value if after else None),
            drop,
            replace(was.measurement, quality=self.before.value if self.before else None),
            sorted(ratios)[len(ratios) // 2],
        )
