"""Measure exported files by running them, each in a fresh process.

Latencies of several files are taken in interleaved bursts, so that a machine's noise falls on
all of them: a round is one burst of each file, its figure the median of the burst. A ratio of
two files is the median over rounds of the rounds' ratios. A decoder with a cache is timed on
one token with `length` tokens in the cache; reading a prompt is timed apart. Peak memory is
that of a process that opened the file and ran these, and holds neither torch nor transformers.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from penjing.data import Dataset
from penjing.errors import InputError, UsageError
from penjing.evaluate import Evaluation, Predictor, evaluate
from penjing.model import Model
from penjing.result import Latency, Measurement
from penjing.runtimes._remote import Remote
from penjing.runtimes._ssh import Host
from penjing.tasks import Task

__all__ = [
    "Candidate",
    "Measured",
    "Remote",
    "inputs_of",
    "measure_files",
    "median_ratio",
    "physical_cores",
    "quality",
    "stored_size",
]

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Candidate:
    """One exported file to be measured.

    Attributes:
        path: the `.onnx` file, or the folder or `.xml` of OpenVINO.
        runtime: name in `penjing.runtimes`.
        parameters: weights of the network, for `stored_bits_per_weight`.
        name: for messages.
    """

    path: Path
    runtime: str
    parameters: int
    name: str = ""


@dataclass(frozen=True)
class Measured:
    """A measurement with what ratios need.

    Attributes:
        measurement: as results.json holds it, quality None.
        rounds_ms: latency of each round, milliseconds; round i of two files is comparable.
        batch_rounds_ms: the same at the user's batch, empty where none was asked for.
        prefill_ms: decoders only, latency of reading the whole prompt.
    """

    measurement: Measurement
    rounds_ms: tuple[float, ...]
    batch_rounds_ms: tuple[float, ...] = ()
    prefill_ms: Latency | None = None


def physical_cores() -> int:
    """The default number of threads: physical cores this process may use, at least 1.

    As torch does, never more than the environment's OMP_NUM_THREADS.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1 << 16
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        allowed = min(allowed, int(asked))
    return max(1, min(psutil.cpu_count(logical=False) or os.cpu_count() or 1, allowed))


def stored_size(path: Path) -> int:
    """Bytes of an exported model, all its files: a folder, an IR, or ONNX with external data.

    Raises:
        InputError: a file is missing.
    """
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    files = {path}
    if path.suffix == ".xml":
        files.add(path.with_suffix(".bin"))
    elif path.suffix == ".onnx":
        files |= {path.parent / name for name in _external_data(path)}
    if missing := [file for file in files if not file.is_file()]:
        raise InputError("a file of the exported model is missing", got=missing[0])
    return sum(file.stat().st_size for file in files)


def _external_data(path: Path) -> set[str]:
    import onnx

    if not path.is_file():
        return set()
    graph = onnx.load(path, load_external_data=False).graph
    return {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def inputs_of(model: Model, *, batch: int = 1, length: int = 128, seed: int = 0) -> dict[str, Any]:
    """Benchmark inputs [batch, ...]: random token ids under a full mask, or random images.

    Inputs whose example has a length of its own (text) get `length`; others keep their shape.
    """
    random = np.random.default_rng(seed)
    config = getattr(model.module, "config", None)
    made: dict[str, Any] = {}
    for name, tensor in model.example.items():
        shape = (batch, *tensor.shape[1:])
        if "input_ids" in model.example and tensor.ndim == 2:
            shape = (batch, length)
        if name == "input_ids":
            words = getattr(config, "vocab_size", None) or int(tensor.max()) + 1
            made[name] = random.integers(0, words, shape)
        elif name == "attention_mask":
            made[name] = np.ones(shape, np.int64)
        elif tensor.is_floating_point():
            made[name] = random.standard_normal(shape, np.float32)
        else:
            made[name] = np.zeros(shape, np.int64)
    return made


def _calls(session: Remote, example: Model, prompt: Arrays) -> Arrays:
    """What one timed call is given: the prompt, or one token after it."""
    step = _decode(session, prompt) if example.interface == "causal" else None
    return prompt if step is None else step


def _decode(session: Remote, inputs: Arrays) -> dict[str, np.ndarray] | None:
    """Inputs of one token after the prompt `inputs`; None where there is no cache."""
    rows, length = inputs["input_ids"].shape
    random = np.random.default_rng(1)
    made: dict[str, np.ndarray] = {}
    for name, shape in session.inputs().items():
        if name.startswith("past_key_values."):
            heads, width = shape[1], shape[3]  # [batch, heads, past, width]
            # Small and not negative: codes where the cache has integers.
            made[name] = 2 * random.random((rows, heads or 1, length, width or 1), np.float32)
    if not made:
        return None
    mask = np.ones((rows, length + 1), np.int64)
    return {"input_ids": inputs["input_ids"][:, :1], "attention_mask": mask, **made}


@dataclass
class _Timing:
    """Every call's seconds, and each round's median."""

    calls: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)

    def latency(self, batch: int, length: int | None) -> Latency:
        p95 = float(np.percentile(self.calls, 95))
        return Latency(1e3 * float(np.median(self.rounds)), 1e3 * p95, batch, length)

    @property
    def rounds_ms(self) -> tuple[float, ...]:
        return tuple(1e3 * seconds for seconds in self.rounds)


def _interleave(
    sessions: Sequence[Remote], inputs: Sequence[Arrays], runs: int, seconds: float
) -> list[_Timing]:
    """Time every session on its inputs, `runs` calls each or about `seconds` in all."""
    timings = [_Timing() for _ in sessions]
    slowest = 0.0
    for session, batch in zip(sessions, inputs, strict=True):
        session.prepare(batch)
        slowest = max(slowest, session.bench(2)[-1])
    # A burst is long enough to be a median and short enough that a round sees one weather.
    burst = max(1, min(7, int(seconds / 20 / max(slowest, 1e-6) / len(sessions))))
    rounds = max(3, math.ceil(runs / burst))
    end = time.monotonic() + seconds
    for index in range(rounds):
        if index >= 3 and time.monotonic() > end:
            break
        order = range(len(sessions)) if index % 2 == 0 else reversed(range(len(sessions)))
        for position in order:
            calls = sessions[position].bench(burst + 1)[1:]
            timings[position].calls += calls
            timings[position].rounds.append(float(np.median(calls)))
    return timings


def measure_files(
    files: Sequence[Candidate],
    example: Model,
    *,
    batch: int = 1,
    length: int = 128,
    user_batch: int | None = None,
    threads: int | None = None,
    runs: int = 60,
    seconds: float = 20.0,
    host: Host | None = None,
) -> list[Measured]:
    """Measure exported files against each other.

    Args:
        files: of one network and its edited forms; the same inputs go to all.
        example: the model whose `example` says what the inputs are.
        batch, length: of the reported latency, warm-up excluded; `length` is for texts, and
            for decoders the tokens in the cache when one more is computed.
        user_batch: also report latency and throughput (a decoder: tokens) at this batch size.
        threads: None for the physical cores.
        host: a device to run them on in place of this machine.
        runs: calls a file at most.
        seconds: about how long each of the timings may take, all files together.

    Returns:
        One per file, in order.

    Raises:
        UsageError: a size below 1.
        InputError, ExportError: a file that cannot be opened or run.
    """
    sizes = {"batch": batch, "length": length, "user_batch": user_batch, "runs": runs}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise UsageError(name, got=value, allowed="at least 1")
    cores = threads or (physical_cores() if host is None else host.cores)
    length = example.at_most(length)
    text = length if "input_ids" in example.example else None
    sessions: list[Remote] = []
    try:
        for file in files:
            sessions.append(Remote(file.path, file.runtime, threads=cores, host=host))
        prompt = inputs_of(example, batch=batch, length=length)
        calls = [_calls(session, example, prompt) for session in sessions]
        single = _interleave(sessions, calls, runs, seconds)
        prefill = None
        if any(call is not prompt for call in calls):
            prefill = _interleave(sessions, [prompt] * len(files), runs // 4, seconds / 4)
        peaks = [session.peak_memory() for session in sessions]
        several = None
        if user_batch is not None:
            many = inputs_of(example, batch=user_batch, length=length)
            calls = [_calls(session, example, many) for session in sessions]
            several = _interleave(sessions, calls, runs, seconds)
    finally:
        for session in sessions:
            session.close()
    found = []
    for index, file in enumerate(files):
        size = stored_size(file.path)
        at_batch = rate = None
        if several is not None and user_batch is not None:
            at_batch = several[index].latency(user_batch, text)
            rate = 1e3 * user_batch / at_batch.median
        measurement = Measurement(
            size_bytes=size,
            parameters=file.parameters,
            stored_bits_per_weight=8 * size / max(file.parameters, 1),
            latency_ms=single[index].latency(batch, text),
            peak_memory_bytes=peaks[index],
            throughput_per_second=rate,
            latency_batch_ms=at_batch,
        )
        rounds = several[index].rounds_ms if several is not None else ()
        whole = prefill[index].latency(batch, text) if prefill is not None else None
        found.append(Measured(measurement, single[index].rounds_ms, rounds, whole))
    return found


def median_ratio(before: Measured, after: Measured) -> float:
    """How many times faster `after` is: the median over rounds of before / after.

    Both must come from one `measure_files` call.
    """
    pairs = zip(before.rounds_ms, after.rounds_ms, strict=True)
    return float(np.median([was / now for was, now in pairs]))


def quality(
    file: Candidate,
    model: Model,
    dataset: Dataset,
    task: Task,
    *,
    length: int = 128,
    batch: int = 32,
    threads: int | None = None,
    reference: Predictor | None = None,
) -> Evaluation:
    """`penjing.evaluate.evaluate` through the exported file, in a fresh process.

    Args:
        file: the exported file.
        model: tells how the data is encoded.
        dataset, task, length, batch, reference: as `evaluate` takes them.

    """
    with Remote(file.path, file.runtime, threads=threads or physical_cores()) as session:

        def predict(inputs: Mapping[str, Any]) -> np.ndarray:
            return session.run({name: tensor.numpy() for name, tensor in inputs.items()})

        return evaluate(
            predict, model, dataset, task, length=length, batch=batch, reference=reference
        )
