"""Allocate: bits and group of every layer, for the least divergence in so many stored bytes.

    cost[layer, size] = D(layer)^0.8 * e(layer, size) / e(layer, uniform)

D is the divergence of the network's outputs with that layer alone quantized, one run of the network
a layer, from its block on; e = tr(E H E^T) / 2 is the layer's own error E at a size, H the mean
outer product of its inputs, of error feedback without refits, whose ratios are those of the whole
method. An integer program takes a size for every layer, within the bytes of the uniform one.

The power is because layers differ less in the quantized network than one by one: of the uniform
error of MiniLM in 3 bits powers of 1, 0.8 and 0.6 left 0.770, 0.765 and 0.781 on 600 sentences.

Layers are fitted to what comes in and to what should have come (`Quantize.alpha`), so costs do not
quite add up, least where bits are fewest. So the program is solved twice, with and without sizes of
fewer bits than the uniform one; both are carried out, and of these and the uniform one that is kept
whose outputs are nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from penjing.apply import apply
from penjing.calibrate import LayerStats, Stream, Unit, units_of
from penjing.divergence import divergence
from penjing.errors import InputError, UsageError
from penjing.fit.solve import Constraint, solve
from penjing.fit.variant import Suffixes, variant
from penjing.given import BATCH
from penjing.model import Batch, Model
from penjing.planes import Scheme
from penjing.progress import track
from penjing.quantizers import gptq
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize, about_mean

__all__ = ["GROUPS", "Allocation", "Size", "allocate", "allocated", "sizes_near"]

Size = tuple[int, int]
"""Bits and group; a group of 0 is the whole row."""

GROUPS = (32, 64, 128, 256, 0)
"""Groups that may be chosen."""
# Divergences of less are the float32 arithmetic's, and better is what is so by more than chance.
_NOISE, _BETTER = 1e-6, 0.99
# Of a layer's divergence.
_POWER = 0.8
# Of so many batches one is for comparing outputs.
_HELD = 5


def sizes_near(bits: int, widths: Sequence[int] = tuple(range(2, 9))) -> list[Size]:
    """Sizes of one step fewer and two more bits than `bits`, of the `widths` there are."""
    below = [w for w in widths if w < bits][-1:]
    above = [w for w in widths if w > bits][:2]
    return [(w, group) for w in (*below, bits, *above) for group in GROUPS]


@dataclass(frozen=True)
class Allocation:
    """What was found.

    Attributes:
        step: the step with `widths`; without any where the uniform size is as good.
        sizes: of every layer, by path.
        uniform, divergence: of the network's outputs on `search`, with one size for all layers
            and with these.
        evaluations: runs of a whole network or of its last part.
    """

    step: Quantize
    sizes: dict[str, Size]
    uniform: float
    divergence: float
    evaluations: int


@dataclass
class _Layer:
    """One layer: its divergence alone, and its own error and bits in each size."""

    path: str
    measured: float
    errors: list[float]
    bits: list[float]


def allocate(
    model: Model,
    step: Quantize,
    calibration: Sequence[Batch],
    search: Sequence[Batch],
    sizes: Sequence[Size] | None = None,
) -> Allocation:
    """Sizes for the layers that `step` quantizes, in no more bytes than its own size takes.

    Args:
        model: the network, norms folded.
        step: its bits, group and options are the uniform size, and where it is better it stays.
        calibration: what codes are fitted to.
        search: other samples, that outputs are compared on.
        sizes: what may be chosen, `sizes_near` its own bits by default; its own joins them.

    Raises:
        UsageError: codes other than integers, 8-bit inputs, or a method without a Gram matrix.
        InputError: no layer with a matrix.
    """
    if step.codes != "integer" or step.activations or "gram" not in step.needs:
        raise UsageError(
            "sizes by layer", got=f"codes {step.codes}, method {step.method}, "
            f"inputs of {step.activations or 32} bits",
            allowed="integer codes by a method that uses data, and float inputs",
        )  # fmt: skip
    own = (int(step.bits), step.group)
    sizes = tuple(dict.fromkeys((own, *(sizes_near(own[0]) if sizes is None else sizes))))
    with torch.no_grad():
        reference = [model.run(batch) for batch in search]

    def far(edited: Model) -> float:
        with torch.no_grad():
            runs = (edited.run(batch) for batch in search)
            return divergence(model.interface, search, reference, runs)

    layers = _measured(model, step, calibration, search, reference, sizes)
    if not layers:
        raise InputError("no layer can have a size of its own", next="leave mixed out")
    uniform = far(apply(model, Recipe((step,)), calibration).model)
    best, least = {layer.path: own for layer in layers}, uniform
    tried = {tuple(best.values())}
    evaluations = len(layers) + 1
    for fewest in (2, own[0]):
        found = _solved(layers, sizes, fewest)
        if (key := tuple(found.values())) in tried:
            continue
        tried.add(key)
        evaluations += 1
        distance = far(apply(model, Recipe((_with(step, found),)), calibration).model)
        if distance < min(least, _BETTER * uniform) and uniform > _NOISE:
            best, least = found, distance
    return Allocation(_with(step, best), best, uniform, least, evaluations)


def allocated(
    model: Model, step: Quantize, batches: Sequence[Batch], widths: Sequence[int] | None = None
) -> Quantize:
    """The step with sizes by layer; of the batches a few are kept to compare outputs on.

    Args:
        widths: bits that layers may have; None for 2 to 8.

    Raises:
        InputError: a single batch.
    """
    if len(batches) < 2:
        count = sum(len(next(iter(batch.values()))) for batch in batches)
        raise InputError(
            "bits by layer", got=f"one batch, of {count} samples", allowed="two batches or more",
            next=f"give at least {BATCH + 1} samples",
        )  # fmt: skip
    # Spread over the data, whose kinds may follow each other.
    search = [batch for i, batch in enumerate(batches) if i % _HELD == _HELD - 1] or batches[-1:]
    kept = {id(batch) for batch in search}
    rest = [batch for batch in batches if id(batch) not in kept]
    sizes = None if widths is None else sizes_near(int(step.bits), sorted(widths))
    return allocate(model, step, rest, search, sizes).step


def _with(step: Quantize, sizes: dict[str, Size]) -> Quantize:
    own = (int(step.bits), step.group)
    return replace(step, widths=tuple(
        f"{path}={bits}/{group}" for path, (bits, group) in sizes.items() if (bits, group) != own
    ))  # fmt: skip


def _measured(
    model: Model, step: Quantize, calibration: Sequence[Batch], search: Sequence[Batch],
    reference: Sequence[Tensor], sizes: Sequence[Size],
) -> list[_Layer]:  # fmt: skip
    """Every layer alone in the uniform size, and its own error in all of them."""
    alone = replace(step, alpha=0.0, refine=0, embeddings=0)
    suffixes, stream = Suffixes(model, search), Stream(model, calibration)
    found = []
    with torch.no_grad():
        for unit in track(list(units_of(model, stream)), "sizes"):
            suffixes.enter(unit)
            if unit.index is not None:
                stream.enter(unit.index)
            chosen = replace(unit, layers=_matrices(alone, unit))
            if not chosen.layers:
                continue
            stats = stream.collect(chosen, frozenset({"gram"}))
            for path, layer in chosen.layers.items():
                if stats[path].gram is None:
                    continue
                edits = list(alone.plan(replace(chosen, layers={path: layer}), stats))
                outputs = suffixes.outputs(variant(model, edits), edits)
                distance = divergence(model.interface, search, reference, outputs)
                found.append(_sized(path, layer, distance, stats[path], step, sizes))
    return found


def _matrices(step: Quantize, unit: Unit) -> dict[str, nn.Module]:
    return {p: m for p, m in step.layers(unit).items() if isinstance(m, nn.Linear)}


def _sized(
    path: str, layer: nn.Module, distance: float, stats: LayerStats, step: Quantize,
    sizes: Sequence[Size],
) -> _Layer:  # fmt: skip
    weight: Tensor = layer.weight.detach().float()  # type: ignore[operator]
    if getattr(layer, "bias", None) is not None and step.bias:
        stats = about_mean(stats)
    assert stats.gram is not None  # of others there is no such layer
    errors, bits = [], []
    for size, group in sizes:
        scheme = Scheme(size, group, step.symmetric, scale_bits=step.scale_bits)
        planes = gptq.fit(weight, scheme, stats, rounds=0)
        off = planes.dequantize().double() - weight.double()
        errors.append(float(((off @ stats.gram) * off).sum()))
        bits.append(planes.stored_bits * weight.numel())
    return _Layer(path, distance, errors, bits)


def _solved(layers: Sequence[_Layer], sizes: Sequence[Size], fewest: int) -> dict[str, Size]:
    """The cheapest sizes of at least so many bits."""
    costs, amounts = [], []
    for layer in layers:
        scale = layer.measured**_POWER / max(layer.errors[0], 1e-300)
        costs.append([
            scale * error if bits >= fewest else math.inf
            for error, (bits, _) in zip(layer.errors, sizes, strict=True)
        ])  # fmt: skip
        amounts.append(layer.bits)
    limit = sum(layer.bits[0] for layer in layers)
    chosen = solve(costs, {"bits": Constraint(amounts, limit)})
    assert chosen is not None  # the uniform size fits
    return {layer.path: sizes[i] for layer, i in zip(layers, chosen, strict=True)}
