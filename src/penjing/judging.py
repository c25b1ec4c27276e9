"""Verbs whose answer is figures: evaluate, measure, fit."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penjing import profiles
from penjing.data import Dataset
from penjing.errors import InputError, UsageError
from penjing.evaluate import evaluate as _evaluate
from penjing.evaluate import torch_predictor
from penjing.export import TARGETS
from penjing.files import check_output, read_json
from penjing.fit import Budget, Settings
from penjing.fit import fit as _fit
from penjing.given import Place, dataset_of, model_of
from penjing.load import load, original
from penjing.measure import Candidate, measure_files, physical_cores, quality
from penjing.model import Model
from penjing.registry import lookup
from penjing.result import Result
from penjing.runtimes._ssh import Host
from penjing.tasks import find
from penjing.workers import Where

__all__ = ["evaluate", "fit", "measure", "result_of"]


def _exported(artifact: Path, runtime: str | None) -> tuple[str, Path]:
    """Runtime and file of an artifact's export."""
    there = {}
    if runtime == "packed":  # runs the artifact itself
        return runtime, artifact
    for name in TARGETS.values():
        path = artifact / str(lookup("runtimes", name, "file"))
        if path.exists():
            there[name] = path
    if not there or (runtime is not None and runtime not in there):
        target = next((t for t, runs in TARGETS.items() if runs == runtime), "onnx")
        raise InputError(
            "the artifact has no export for this runtime" if runtime else "nothing is exported",
            got=runtime or artifact, allowed=", ".join(there) or None,
            next=f"penjing export {artifact} --to {target}, or --runtime packed",
        )  # fmt: skip
    name = runtime or _measured_runtime(artifact) or next(iter(there))
    return (name, there[name]) if name in there else next(iter(there.items()))


def _measured_runtime(artifact: Path) -> str | None:
    path = artifact / "results.json"
    return str(read_json(path).get("runtime")) if path.exists() else None


def evaluate(
    model: Model | Place,
    data: Dataset | Place,
    *,
    task: Any = None,
    runtime: str | None = None,
    length: int = 128,
    batch: int = 32,
) -> dict[str, Any]:
    """A task's metric on data, through torch, or through an artifact's exported file."""
    loaded, dataset = model_of(model), dataset_of(data)
    length = loaded.at_most(length)
    measure_of = find(task, dataset, loaded)
    reference = torch_predictor(original(loaded)) if measure_of.needs_reference else None
    if runtime in (None, "torch"):
        found = _evaluate(torch_predictor(loaded), loaded, dataset, measure_of, length=length,
                          batch=batch, reference=reference)  # fmt: skip
    else:
        if isinstance(model, Model):
            raise UsageError("an exported file is evaluated from its artifact's path")
        name, path = _exported(Path(model), runtime)
        found = quality(Candidate(path, name, loaded.parameter_count), loaded, dataset, measure_of,
                        length=length, batch=batch, reference=reference)  # fmt: skip
    return {"metric": measure_of.metric, "value": found.value, "samples": found.samples,
            "runtime": runtime or "torch"}  # fmt: skip


def measure(
    artifact: Place,
    *,
    runtime: str | None = None,
    data: Dataset | Place | None = None,
    task: Any = None,
    batch: int | None = None,
    length: int | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Size, latency, throughput, memory, and quality on data, of an artifact's exported file.

    Args:
        length: tokens of a text; without one 128, or as many as the network takes.
        device: whose latency and memory, an `ssh://user@host`; None for this machine.

    Raises:
        UsageError: a length that the network does not take.
    """
    if device is not None and runtime not in (None, "onnxruntime"):
        raise UsageError("--runtime with --device", got=runtime, allowed="onnxruntime")
    model = load(os.fspath(artifact))
    if length is not None and "input_ids" in model.example and model.at_most(length) < length:
        raise UsageError(
            "length", got=f"{length} tokens", allowed=f"up to {model.longest}, what it takes",
            next="choose a smaller --length",
        )  # fmt: skip
    length = model.at_most(128) if length is None else length
    name, path = _exported(Path(artifact), "onnxruntime" if device else runtime)
    with Host(device) if device else contextlib.nullcontext() as host:
        cores = threads or (physical_cores() if host is None else host.cores)
        found = measure_files(
            [Candidate(path, name, model.parameter_count)], model, length=length,
            user_batch=batch, threads=cores, host=host,
        )[0].measurement  # fmt: skip
    table: dict[str, Any] = {"runtime": name, "threads": cores}
    table |= {"device": device} if device else {}
    table |= asdict(found)
    if data is not None:
        scored = evaluate(artifact, data, task=task, runtime=name, length=length)
        table |= {"metric": scored["metric"], "quality": scored["value"]}
        table["samples"] = scored["samples"]
    return table


def fit(
    model: Model | Place,
    data: Dataset | Place,
    output: Place,
    *,
    calibration: Dataset | Place | None = None,
    task: Any = None,
    max_drop: float | None = None,
    max_size: int | None = None,
    max_latency: float | None = None,
    max_memory: int | None = None,
    runtime: str | None = None,
    within: float | None = None,
    batch: int = 1,
    length: int = 128,
    threads: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    confidence: float = 0.95,
    recover: float = 20.0,
    workers: int | None = None,
    ray: str | None = None,
    insecure: bool = False,
    device: str | None = None,
) -> Result:
    """The smallest and fastest artifact within a budget, every number measured by running it.

    Args:
        data: what quality is measured on; calibration data is split off it without `calibration`.
        output: the artifact folder.
        task: a name, `file.py:function`, a callable, or None for what suits data and model.
        max_drop: of the metric, a fraction; relative where the task says so (perplexity).
        max_size: bytes.
        max_latency: seconds.
        max_memory: bytes.
        within: seconds of work.
        recover: seconds of distillation of a candidate.
        workers, ray, insecure: where units are surveyed, see `penjing.workers.Where`; a worker
            has `threads` (1) threads.
        device: a profile of the device that will run it, or `ssh://user@host`; its latency
            counts. None for this machine.

    Raises:
        InputError: unusable model or data, or an output that exists.
    """
    where = Where(workers, ray, threads or 1, insecure)
    budget = Budget(max_drop, max_size, max_latency, max_memory, within)
    place = Path(output)
    check_output(place, overwrite)
    if device is not None and not device.startswith("ssh:"):
        profiles.read(Path(device), threads)
    loaded = model_of(model)
    length = loaded.at_most(length)
    dataset = dataset_of(data)
    tuned = None if calibration is None else dataset_of(calibration)
    words = ["penjing", "fit", loaded.source.path]
    words += [] if isinstance(data, Dataset) else ["--data", os.fspath(data)]
    words += ["--calibration", os.fspath(calibration)] if isinstance(calibration, str) else []
    words += [w for k, v in budget.to_json().items() for w in (f"--{k.replace('_', '-')}", f"{v}")]
    chosen = {"metric": task if isinstance(task, str) else None, "runtime": runtime,
              "weights": loaded.source.details.get("weights"), "threads": threads,
              "device": device}  # fmt: skip
    chosen |= {k: v for k, v, plain in (("batch", batch, 1), ("length", length, 128),
               ("seed", seed, 0), ("confidence", confidence, 0.95)) if v != plain}  # fmt: skip
    words += [w for k, v in chosen.items() if v is not None for w in (f"--{k}", f"{v}")]
    settings = Settings(
        runtime, batch, length, threads, confidence, seed, recover=recover, where=where,
        command=shlex.join([*words, "-o", place.name]), device=device,
    )  # fmt: skip
    found = find(task, dataset, loaded)
    return _fit(
        loaded, dataset, place, found, budget, settings, calibration=tuned, overwrite=overwrite
    )


def result_of(artifact: Place) -> Result:
    """The result that an artifact holds."""
    return Result.from_json(json.loads((Path(artifact) / "results.json").read_text("utf-8")))
