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
fewer bits than the uniform one; both are carried out, what came of them corrects the costs
(`penjing.fit.belief`), and more choices are made as long as one may be better and there are samples
enough to tell. The one is kept that is then believed to be nearest: the least that was measured is
often so by chance (bench/enumeration.py, beside all recipes of a small network).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from penjing.apply import apply
from penjing.calibrate import LayerStats, Stream, Unit, units_of
from penjing.divergence import divergence, divergences
from penjing.errors import InputError, UsageError
from penjing.fit.sizesearch import TRIES, Layer, Size, searched
from penjing.fit.variant import Suffixes, variant
from penjing.given import BATCH
from penjing.model import Batch, Model
from penjing.planes import Scheme
from penjing.progress import track
from penjing.quantizers import gptq
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize, about_mean

__all__ = ["GROUPS", "Allocation", "Size", "allocate", "allocated", "sizes_near"]

GROUPS = (32, 64, 128, 256, 0)
"""Groups that may be chosen."""
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


def allocate(
    model: Model,
    step: Quantize,
    calibration: Sequence[Batch],
    search: Sequence[Batch],
    sizes: Sequence[Size] | None = None,
    *,
    limit: float | None = None,
    tries: int = TRIES,
) -> Allocation:
    """Sizes for the layers that `step` quantizes, in no more bytes than its own size takes.

    Args:
        model: the network, norms folded.
        step: its bits, group and options are the uniform size, and where it is better it stays.
        calibration: what codes are fitted to.
        search: other samples, that outputs are compared on.
        sizes: what may be chosen, `sizes_near` its own bits by default; its own joins them.
        limit: stored bits of all these layers, in place of what its own size takes.
        tries: networks that are made at the most, besides the uniform one.

    Raises:
        UsageError: codes other than integers, 8-bit inputs, a method without a Gram matrix, or a
            limit that no sizes meet.
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

    def run(step: Quantize) -> Tensor:
        edited = apply(model, Recipe((step,)), calibration).model
        with torch.no_grad():
            outputs = (edited.run(batch) for batch in search)
            return divergences(model.interface, search, reference, outputs)

    layers = _measured(model, step, calibration, search, reference, sizes)
    if not layers:
        raise InputError("no layer can have a size of its own", next="leave mixed out")
    best, made = searched(
        layers, sizes, lambda choice: run(_with(step, _named(layers, choice, sizes))), limit, tries
    )
    if best is None:
        least = sum(min(layer.bits) for layer in layers)
        raise UsageError("stored bits", got=f"{limit:g}", allowed=f"{least:g} or more")
    found, uniform = _named(layers, best, sizes), made[(0,) * len(layers)]
    return Allocation(_with(step, found), found, uniform, made[best], len(layers) + len(made))


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
) -> list[Layer]:  # fmt: skip
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
) -> Layer:  # fmt: skip
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
    return Layer(path, distance, errors, bits)


def _named(
    layers: Sequence[Layer], choice: Sequence[int], sizes: Sequence[Size]
) -> dict[str, Size]:
    return {layer.path: sizes[i] for layer, i in zip(layers, choice, strict=True)}
