"""What a network costs, by layer and in total: parameters, bytes, MACs, memory, latency.

How MACs and activation memory are counted: `penjing.meter`.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from penjing.errors import InputError, UsageError
from penjing.graph import is_weighted
from penjing.meter import Meter, hooked, metered, sized_batch
from penjing.model import Batch, Model

__all__ = ["SORTS", "Inspection", "Layer", "Totals", "inspect", "left_alone", "sized_batch"]

SORTS = ("order", "parameters", "bytes", "macs", "memory", "latency")


@dataclass(frozen=True)
class Layer:
    """A module that owns parameters or multiplies.

    Attributes:
        name: path of the module; of the parameter for a bare weight file.
        kind: class of the module.
        parameters: own weights; a tied tensor counts at its first owner only.
        bytes: of those weights as an artifact stores them: scales of quantized ones included,
            of pruned ones a bitmask and the values that stay.
        macs: multiply-accumulates of one run, all its calls together.
        calls: times it ran, 0 for a module that never did.
        peak_memory_bytes: most activation bytes alive while it ran, None if nothing was run.
        latency_ms: median time of one run without its submodules; timers add a little.
        tied_to: first owner of a tensor that this layer shares.
    """

    name: str
    kind: str
    parameters: int
    bytes: int
    macs: int = 0
    calls: int = 0
    peak_memory_bytes: int | None = None
    latency_ms: float | None = None
    tied_to: str | None = None


@dataclass(frozen=True)
class Totals:
    """The whole network; `latency_ms` is the median of runs without any timers inside."""

    parameters: int
    bytes: int
    buffer_bytes: int
    stored_bits_per_weight: float
    macs: int | None
    peak_memory_bytes: int | None
    latency_ms: float | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        batch, length: of the run; length is None where there is no sequence.
        threads: torch threads of the run.
        totals: the whole network.
        layers: in the order of the module tree.
        blocks: paths of the repeated units.
        tied: groups of parameter names that are one tensor.
        shared: modules that ran more than once in one pass.
    """

    interface: str
    batch: int
    length: int | None
    threads: int
    totals: Totals
    layers: tuple[Layer, ...]
    blocks: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    shared: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return asdict(self)

    def sorted(self, by: str) -> Inspection:
        """The same with the layers that cost most first; `by` is one of `SORTS`.

        Raises:
            UsageError: an unknown `by`.
        """
        if by not in SORTS:
            raise UsageError("unknown order", got=repr(by), allowed=", ".join(SORTS))
        if by == "order":
            return self
        field = {"memory": "peak_memory_bytes", "latency": "latency_ms"}.get(by, by)
        ranked = sorted(self.layers, key=lambda layer: -(getattr(layer, field) or 0))
        return replace(self, layers=tuple(ranked))


def inspect(
    model: Model, *, batch: int = 1, length: int | None = None, latency: bool = True
) -> Inspection:
    """Measure a network by running it once for counts and a few times for latency.

    Args:
        model: may sit on the meta device; then nothing is computed and latency is None.
        batch: samples of a run, at least 1.
        length: tokens a sample for text models, by default 128 or as many as the network
            takes; others have no length.
        latency: whether to measure it.

    Raises:
        UsageError: a batch or length that makes no sense for the network.
        InputError: the network does not run at that batch and length.
    """
    layers = _weights(model)
    counted = sum(layer.parameters for layer in layers.values())
    stored = sum(layer.bytes for layer in layers.values())
    totals = Totals(
        parameters=counted,
        bytes=stored,
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.module.buffers()),
        stored_bits_per_weight=8 * stored / max(counted, 1),
        macs=None,
        peak_memory_bytes=None,
        latency_ms=None,
    )
    used_length = None
    shared: tuple[str, ...] = ()
    if model.interface != "weights":
        inputs = sized_batch(model, batch=batch, length=length)
        used_length = inputs["input_ids"].shape[1] if "input_ids" in model.example else None
        with _named_failure(batch, used_length):
            meter = metered(model, inputs)
            times, total = (
                _time(model, inputs) if latency and model.device.type != "meta" else ({}, None)
            )
        totals = replace(
            totals,
            macs=sum(meter.macs.values()),
            peak_memory_bytes=meter.peak,
            latency_ms=total,
        )
        layers = _merge(model, layers, meter, times)
        shared = tuple(layer.name for layer in layers.values() if layer.calls > 1)
    return Inspection(
        interface=model.interface,
        batch=batch,
        length=used_length,
        threads=torch.get_num_threads(),
        totals=totals,
        layers=tuple(layers.values()),
        blocks=tuple(model.blocks),
        tied=tuple(model.tied()),
        shared=shared,
    )


def left_alone(model: Model) -> list[str]:
    """Modules whose weights can be neither pruned nor quantized, as `path (class, weights)`.

    Recurrent layers are such, whose hidden units may still go. Small tables are not worth a word.
    """
    found = []
    for path, module in model.module.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        count = sum(p.numel() for p in own)
        if count >= 1024 and not is_weighted(module) and model.interface != "weights":
            found.append(f"{path or 'the network itself'} ({type(module).__name__}, {count:,})")
    return found


@contextlib.contextmanager
def _named_failure(batch: int, length: int | None) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise InputError(
            f"the network does not run at batch {batch}"
            + (f" x {length} tokens" if length else ""),
            got=f"{type(error).__name__}: {error}",
            next="try --batch 1 and the length it was trained with",
        ) from error


def _weights(model: Model) -> dict[str, Layer]:
    """Layers that own parameters, by module path; nothing is run."""
    edited = {id(model.module.get_parameter(n)): n for n in (*model.masks, *model.planes)}
    owners: dict[int, str] = {}
    layers: dict[str, Layer] = {}
    for path, module in model.module.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            key, kind = path, type(module).__name__
            if model.interface == "weights":
                key, kind = full, "x".join(map(str, parameter.shape)) or "scalar"
            layer = layers.setdefault(key, Layer(key, kind, 0, 0))
            first = owners.setdefault(id(parameter), key)
            if first != key:
                layers[key] = replace(layer, tied_to=first)
                continue
            layers[key] = replace(
                layer,
                parameters=layer.parameters + parameter.numel(),
                bytes=layer.bytes + model.stored_bytes(edited.get(id(parameter), full)),
            )
    return layers


def _merge(
    model: Model, weights: dict[str, Layer], meter: Meter, times: dict[str, float]
) -> dict[str, Layer]:
    """Weights, counts and times together, in the order of the module tree."""
    merged = {}
    for path, module in model.module.named_modules():
        if path not in weights and not meter.macs[path]:
            continue
        layer = weights.get(path, Layer(path, type(module).__name__, 0, 0))
        merged[path] = replace(
            layer,
            macs=meter.macs[path],
            calls=meter.calls[path],
            peak_memory_bytes=meter.peaks[path],
            latency_ms=times.get(path),
        )
    return merged


# --- latency --------------------------------------------------------------------------------

RUNS = 7
ENOUGH = 3.0  # seconds; a slow network gets three runs


def _repeat(run: Callable[[], None]) -> None:
    run()  # warm-up
    begin = time.perf_counter()
    for done in range(1, RUNS + 1):
        run()
        if done >= 3 and time.perf_counter() - begin > ENOUGH:
            return


def _time(model: Model, inputs: Batch) -> tuple[dict[str, float], float]:
    """Median milliseconds by module, its submodules taken off, and of the whole network."""
    totals: list[float] = []

    def whole() -> None:
        begin = time.perf_counter()
        model.run(inputs)
        totals.append(1e3 * (time.perf_counter() - begin))

    samples: defaultdict[str, list[float]] = defaultdict(list)
    own: Counter[str] = Counter()
    begun: list[float] = []
    inside: list[float] = [0.0]

    def enter(_: str) -> None:
        inside.append(0.0)
        begun.append(time.perf_counter())

    def leave(path: str) -> None:
        spent = 1e3 * (time.perf_counter() - begun.pop())
        own[path] += spent - inside.pop()  # type: ignore[assignment]
        inside[-1] += spent

    def by_layer() -> None:
        own.clear()
        model.run(inputs)
        for path, spent in own.items():
            samples[path].append(spent)

    with torch.no_grad():
        _repeat(whole)
        with hooked(model.module, enter, leave):
            _repeat(by_layer)
    # The first of each is the warm-up.
    medians = {path: statistics.median(times[1:]) for path, times in samples.items()}
    return medians, statistics.median(totals[1:])
