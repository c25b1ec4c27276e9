"""Before any work: what it will need, what there is, and which number formats are faster here."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from penjing.errors import InputError
from penjing.fit.preflight import Speed, formats, machine, predict
from penjing.fit.space import formats_for
from penjing.inspect import inspect, left_alone
from penjing.model import Model
from penjing.processor import weight_bits
from penjing.units import format_size

__all__ = ["preflight", "worth", "zeros"]

# Of a layer in a runtime's best format, over the best runtime's: a whole network is more than that
# layer, so a little behind is still worth an export.
_SLOWER = 1.5


def preflight(
    model: Model, folder: Path, runtimes: list[str], threads: int, length: int, samples: int
) -> tuple[list[str], list[str]]:
    """Notes for the report, and the runtimes that are worth an export.

    Args:
        model: the original.
        folder: where candidates will be written.
        runtimes, threads: that will be measured.
        length: tokens of a text.
        samples: of evaluation.

    Raises:
        InputError: the disk is too small for the files that a fit writes.
    """
    here = machine(folder)
    shapes = [
        (m.in_features, m.out_features) for m in model.module.modules() if isinstance(m, nn.Linear)
    ] or [(256, 256)]
    # The largest layer outside the head: a vocabulary-wide one is not typical.
    inputs, outputs = max(
        (s for s in shapes if max(s) < 16384), key=lambda s: s[0] * s[1], default=shapes[0]
    )
    tokens = 1 if model.interface == "causal" else length
    speeds = formats([(tokens, inputs, outputs)], runtimes, threads=threads, seconds=4.0)
    cost = predict(
        parameters=model.parameter_count,
        widest=max(s[0] for s in shapes),
        multiplications=inspect(model, length=length, latency=False).totals.macs or 0,
        samples=samples,
        evaluations=6,
        exports=4 * len(runtimes),
        speeds=speeds,
    )
    if cost.disk_bytes > here.disk_bytes:
        raise InputError(
            "the disk is too small for the candidates of a fit",
            got=f"{format_size(here.disk_bytes)} free in {folder.parent}",
            allowed=f"{format_size(cost.disk_bytes)} or more",
            next="free disk space or choose another -o",
        )
    notes = [
        f"predicted before the work: {format_size(cost.memory_bytes)} of memory "
        f"({format_size(here.memory_bytes)} free), {format_size(cost.disk_bytes)} of disk, "
        f"{cost.minutes:.1f} minutes; {here.processor}, {here.cores} cores"
    ]
    if (bits := weight_bits()) < 8:
        notes.append(
            f"where 8-bit weights meet 8-bit inputs they have {bits} bits: this processor has no "
            "VNNI, its sums of 8-bit products saturate"
        )
    notes += zeros(model)
    if alone := left_alone(model):
        more = f" and {len(alone) - 6} more" if len(alone) > 6 else ""
        names = f"{', '.join(alone[:6])}{more}"
        notes.append(f"their weights stay in floats, their kind cannot be quantized: {names}")
    notes += [
        f"a layer of {inputs} x {outputs} on {tokens} tokens in {speed.runtime}: "
        f"{speed.format} runs {speed.speedup:.2f}x as fast as fp32"
        for speed in speeds
        if speed.speedup is not None and speed.format != "fp32"
    ]
    kept = worth(model, runtimes, speeds)
    notes += [
        f"{runtime} is not tried further: at best that layer took more than {_SLOWER:g} times as "
        "long there; --runtime asks for it"
        for runtime in runtimes
        if runtime not in kept
    ]
    return notes, kept


def zeros(model: Model) -> list[str]:
    """What connections that were removed before a fit do and do not gain."""
    gone = sum(mask.numel() - int(mask.sum()) for mask in model.masks.values())
    if not gone:
        return []
    return [
        f"{gone / model.parameter_count:.0%} of the weights were pruned before: no runtime here "
        "skips zeros, and exported files hold them like other numbers"
    ]


def worth(model: Model, runtimes: list[str], speeds: list[Speed]) -> list[str]:
    """The runtimes whose best format is not far behind the best of all.

    All of them where linear layers are not most of the network's weights: then one such layer
    says little.
    """
    linear = sum(m.weight.numel() for m in model.module.modules() if isinstance(m, nn.Linear))
    tables = sum(m.weight.numel() for m in model.module.modules() if isinstance(m, nn.Embedding))
    if linear < 0.9 * (model.parameter_count - tables):
        return runtimes
    best: dict[str, float] = {}
    for speed in speeds:
        if speed.microseconds is not None and speed.format in formats_for(model):
            best[speed.runtime] = min(speed.microseconds, best.get(speed.runtime, math.inf))
    bar = _SLOWER * min(best.values(), default=math.inf)
    return [runtime for runtime in runtimes if best.get(runtime, 0.0) <= bar]
