"""Quantize: weights become integers with scales, and with `activations` layer inputs too.

Weights: a quantizer of `penjing.quantizers` on the matrix [out, in]. Activations: one unsigned
8-bit range a layer, from calibration data or found at run time (`dynamic`).

With `rotate` a linear layer is quantized in a rotated basis of its inputs, W Q^T with H' = Q H Q^T
(QuaRot, arXiv 2404.00456); the network's own weight stays W, and runtimes make x Q^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from penjing import kernels
from penjing.calibrate import LayerStats, Unit
from penjing.errors import InputError, UsageError
from penjing.linalg import asymmetric_target
from penjing.planes import IntegerPlanes, Scheme
from penjing.recipe import ActivationRange, Edit
from penjing.registry import constant, lookup
from penjing.rotation import Rotation, possible
from penjing.steps._awq import Divide
from penjing.steps._ranges import activation_range, migrations, readers
from penjing.steps._reconstruct import reconstruct
from penjing.steps._select import canonical, matches, selected

__all__ = ["SMALL_TABLE", "Quantize", "about_mean", "activation_range"]

# Tables smaller than this (token types and the like) cost more in metadata than they save.
SMALL_TABLE = 16384
# Least peak of an input channel, over the root mean square of all: half of NNCF's error on
# sentences of other kinds than the calibration data needed 1, without it the error doubled.
_FLOOR = 1.0
# Of all rotations: layers that read one tensor share what runtimes make of it.
_SEED = 0


@dataclass(frozen=True)
class Quantize:
    """Quantize weights, and activations where asked.

    Attributes:
        bits: of linear and convolution weights, 2 to 8 (for `codes` other than integers see
            `penjing.scheme.FAMILIES`); 0 leaves them. An output layer that is tied to an
            embedding is one of them, unless `embeddings` quantized the table before.
        group: inputs that share a scale; 0 is the whole row.
        method: a name of `penjing.quantizers`, or `file.py:function`. With `codes` other than
            integers `gptq` is error feedback, and `rtn` the nearest codes without data. Grouped
            convolutions: `gptq` is `penjing.kernels`, the others have no Gram matrix there.
            `awq` divides inputs first, where what makes them can hold it (`steps._awq`).
        symmetric: integer zero point in the middle; 8-bit activations need it.
        activations: 8 for 8-bit layer inputs, 0 for none; with 8 bits of weights, or 7 for
            processors whose sums of byte products saturate (`penjing.processor`).
        dynamic: find activation ranges at run time instead of from data.
        embeddings: bits of embedding tables, 0 leaves them.
        embedding_group: entries that share a scale in an embedding row; 0 is the whole row.
        observer: how the range of static activations is chosen, a name of `penjing.observers`,
            or `auto`: the one of least error in the layer's output.
        migrate: divide the input channels of linear layers so that an outlier does not set the
            range of all, 0 (not at all) to 1; see `penjing.migration`.
        targets: globs of layer paths; without any, every layer.
        widths: `glob=bits` or `glob=bits/group` of layers that have others than `bits` and
            `group`, the first that matches a path; linear and convolution layers, integer codes.
            `penjing.fit.allocate` finds them.
        skip: globs of layer paths that stay as they are.
        alpha: how far a layer makes up for what was lost before it, 0 to 1.
        codes: the family of codes, see `Scheme`; tables always have integers.
        scale_bits: 32, 16 or 8 of a stored scale.
        bias: where a layer has one, it takes up the mean of the error, and what is left to
            minimise is the error's variance.
        rotate: quantize linear layers in a rotated basis of their inputs, see `penjing.rotation`;
            runtimes rotate the inputs. Not with 8-bit activations, and not a matrix that is also
            an embedding table.
        paired: with 8-bit activations, 8-bit weights of which processors that add two byte
            products in 16 bits (`penjing.processor`) make exact sums: of linear layers and
            convolutions of one place, sums of neighbours are bounded (`penjing.grids`);
            depthwise convolutions have no such sums; what else there is has 7 bits.
        refine: steps of gradient descent on the scales and codes of each finished block, toward
            what the block gave before, see `penjing.steps._reconstruct`.
    """

    name: ClassVar[str] = "quantize"
    scope: ClassVar[str] = "block"
    staged: ClassVar[bool] = True

    bits: float = 8
    group: int = 0
    method: str = "gptq"
    symmetric: bool = False
    activations: int = 0
    dynamic: bool = False
    observer: str = "minmax"
    migrate: float = 0.9
    embeddings: int = 0
    embedding_group: int = 0
    targets: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    alpha: float = 0.5
    codes: str = "integer"
    scale_bits: int = 32
    bias: bool = True
    rotate: bool = False
    paired: bool = False
    refine: int = 0

    def __post_init__(self) -> None:
        if self.bits:
            self._scheme(self.bits, self.group, self.codes)
        if self.embeddings:
            self._scheme(self.embeddings, self.embedding_group)
        if self.widths and (self.activations or self.codes != "integer" or not self.bits):
            raise UsageError(
                "widths", got=f"bits = {self.bits:g}, codes = {self.codes}, "
                f"activations = {self.activations}",
                allowed="with bits, integer codes and float inputs",
            )  # fmt: skip
        for _, bits, group in self._sizes:
            self._scheme(bits, group)
        lookup("quantizers", self.method, "fit")
        if self.codes != "integer":
            if self.method not in ("gptq", "rtn"):
                raise UsageError(
                    f"method of {self.codes} codes", got=self.method, allowed="gptq, rtn"
                )
            lookup("quantizers", self.codes, "fit")
        if self.method == "awq" and (self.activations or self.rotate):
            raise UsageError(
                "method awq", got="8-bit activations" if self.activations else "rotate",
                allowed="weights alone, in their own basis", next="use the method gptq there",
            )  # fmt: skip
        if self.observer != "auto":
            lookup("observers", self.observer, "fit")
        if not 0 <= self.migrate <= 1:
            raise UsageError("migrate", got=self.migrate, allowed="0 to 1")
        if not 0 <= self.alpha <= 1:
            raise UsageError("alpha", got=self.alpha, allowed="0 to 1")
        if self.activations not in (0, 8):
            raise UsageError("activations", got=self.activations, allowed="0 or 8 bits")
        if self.rotate and self.activations:
            raise UsageError(
                "rotated weights with 8-bit activations", allowed="one of the two",
                next="leave rotate out: 8-bit inputs have their channels divided instead",
            )  # fmt: skip
        integers = self.bits in (7, 8) and self.codes == "integer"
        if self.activations and not (integers and not self.group and self.symmetric):
            raise UsageError(
                "8-bit activations",
                got=f"bits = {self.bits:g}, codes = {self.codes}, "
                f"group = {self.group}" + ("" if self.symmetric else ", not symmetric"),
                allowed="with bits = 8 or 7, codes = integer, group = 0 and symmetric weights",
            )

        if self.paired and not (self.activations and self.bits == 8):
            raise UsageError("paired weights", allowed="with bits = 8 and activations = 8")
        if self.refine < 0 or (self.refine and self.activations):
            raise UsageError(
                "refine", got=self.refine,
                allowed="steps of gradient descent, 0 with 8-bit activations",
            )  # fmt: skip
        if self.paired and self.method not in ("gptq", "rtn"):
            raise UsageError("method of paired weights", got=self.method, allowed="gptq, rtn")

    @cached_property
    def _sizes(self) -> list[tuple[str, int, int]]:
        """Globs of `widths`, their bits and groups."""
        found = []
        for text in self.widths:
            glob, _, size = text.rpartition("=")
            bits, _, group = size.partition("/")
            if not glob or not bits.isdigit() or not (group or "0").isdigit():
                raise UsageError("widths", got=text, allowed="GLOB=BITS, such as *.query=4, "
                                 "or GLOB=BITS/GROUP")  # fmt: skip
            found.append((glob, int(bits), int(group) if group else self.group))
        return found

    def _scheme(self, bits: float, group: int, codes: str = "integer") -> Scheme:
        whole = int(bits) if bits == int(bits) else bits
        return Scheme(whole, group, self.symmetric, codes, self.scale_bits)

    def _adding(self, layer: nn.Module, scheme: Scheme) -> Scheme:
        """The scheme of a layer by the sums of two products that its kernel makes."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if weight[0, 0].numel() == 1:
            # Columns are channels, in the order in which they are added.
            return replace(scheme, paired=True)
        depthwise = getattr(layer, "groups", 1) == len(weight) and weight.shape[1] == 1
        return scheme if depthwise else replace(scheme, bits=7)

    @property
    def before(self) -> tuple[Any, ...]:
        """Steps on the whole network that come first."""
        if self.method != "awq" or not self.bits:
            return ()
        scheme = self._scheme(self.bits, self.group)
        return (Divide(scheme, self.bias, self.targets, self.skip),)

    @property
    def needs(self) -> frozenset[str]:
        """Gram matrices unless the method is blind; ranges for static activations."""
        wanted = constant("quantizers", self.method, "needs", frozenset({"gram"}))
        gram = set(wanted) if self.bits else set()
        if ("gram" in gram and self.alpha) or self.refine:
            gram.add("cross")
        static = {"range"} if self.activations and not self.dynamic else set()
        return frozenset(gram | static)

    def layers(self, unit: Unit) -> dict[str, nn.Module]:
        """The layers of a unit that are quantized, by path."""
        skipped = selected(unit, self.skip) if self.skip else {}
        return {
            path: layer
            for path, layer in selected(unit, self.targets).items()
            if path not in skipped
            and (self._sized(path, layer)[0] and layer.weight.numel() >= self._least(layer))  # type: ignore[operator]
        }

    def _sized(self, path: str, layer: nn.Module) -> tuple[float, int]:
        """Bits and group of a layer's weight."""
        if isinstance(layer, nn.Embedding):
            return self.embeddings, self.embedding_group
        own = (size for glob, *size in self._sizes if matches(path, (glob,)))
        bits, group = next(own, (self.bits, self.group))
        # Runtimes have one scale an output channel of a convolution.
        return bits, 0 if isinstance(layer, nn.Conv1d | nn.Conv2d) else int(group)

    def _least(self, layer: nn.Module) -> int:
        return SMALL_TABLE if isinstance(layer, nn.Embedding) else 0

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """Planes for every layer, ranges for every layer input.

        Without `stats` they are taken here, stage by stage: the output projection of an
        attention is calibrated on quantized queries, keys and values.
        """
        chosen = replace(unit, layers=self.layers(unit))
        if not chosen.layers:  # the stream has not entered a block that nothing is wanted of
            return
        for part, found in chosen.staged(self.needs, stats):
            yield from self._plan(part, found)
        if self.refine and unit.index is not None and unit.stream is not None and not stats:
            names = [canonical(unit.model, f"{path}.weight") for path in chosen.layers]
            for edit in reconstruct(unit, names, self.refine):
                unit.stream.outputs = None
                yield edit

    def _plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        shared = {id(unit.model.module.get_parameter(n)) for g in unit.model.tied() for n in g}
        free = {
            path: layer
            for path, layer in unit.layers.items()
            if self.activations and self.migrate and id(layer.weight) not in shared
            and f"{path}.weight" not in unit.model.planes
        }  # fmt: skip
        groups = readers(unit.layers, stats) if self.activations else []
        divided = migrations(free, groups, stats, self.migrate, _FLOOR)
        # One grid of an input that several read: runtimes round it once.
        wide: dict[str, Tensor] = {}
        if self.observer == "auto":
            for group in groups:
                rows = [unit.layers[path].weight.detach() for path in group]  # type: ignore[operator]
                wide |= dict.fromkeys(group, torch.cat(rows))
        for path, layer in unit.layers.items():
            table = isinstance(layer, nn.Embedding)
            name = canonical(unit.model, f"{path}.weight")
            own = stats.get(path, LayerStats())
            channels = divided.get(path)
            # The edit of the weight is made as soon as it is known, and the range is about the
            # weight before it.
            found = None
            # A layer that the data never reached has no range, and needs none.
            if self.activations and not table and (self.dynamic or own.count or path not in stats):
                weight = wide.get(path, layer.weight.detach())  # type: ignore[operator]
                found = self._range(weight, path, own, channels)
            if name not in unit.model.planes:
                tied = id(layer.weight) in shared
                yield from self._quantized(unit, path, layer, name, own, channels, tied=tied)
            elif found is None:
                bits = "+".join(f"{b:g}" for b in unit.model.planes[name].bits)
                yield Edit("left", path, None, f"already in {bits} bits, left as they are")
            if found is not None:
                why = "8-bit input" + (", channels divided" if channels is not None else "")
                yield Edit("activation", path, found, why)

    def _range(
        self, weight: Tensor, path: str, own: LayerStats, channels: Tensor | None
    ) -> ActivationRange:
        if self.dynamic:
            return ActivationRange(0.0, 0, channels)
        return activation_range(own, path, self.observer, channels=channels, weight=weight)

    def _quantized(
        self,
        unit: Unit,
        path: str,
        layer: nn.Module,
        name: str,
        own: LayerStats,
        channels: Tensor | None = None,
        *,
        tied: bool = False,
    ) -> list[Edit]:
        table = isinstance(layer, nn.Embedding)
        bits, group = self._sized(path, layer)
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        codes = "integer" if table else self.codes
        scheme = self._scheme(bits, group, codes)
        if self.paired and not table:
            scheme = self._adding(layer, scheme)
            bits = scheme.bits
        if own.gram is not None and not torch.isfinite(own.gram).all():
            raise InputError(f"the Gram matrix of {path} is not finite")
        matrix = weight.reshape(len(weight), -1).float()  # [out, in]
        bias = getattr(layer, "bias", None) if self.bias else None
        mean, was = own.mean, own.mean if own.was is None else own.was
        if bias is not None:
            own = about_mean(own)
        target = matrix
        if own.gram is not None and own.cross is not None and self.alpha:
            target = asymmetric_target(matrix, own.gram, own.cross, self.alpha)
        if channels is not None:
            target, own = target * channels, _divided(own, channels)
            weight = weight * channels
        held = _unrotatable(layer, tied) if self.rotate else "not asked for"
        if not held:
            basis = Rotation(matrix.shape[1], _SEED)
            target, own = basis.apply(target.double()).float(), _rotated(own, basis)
        blind = codes != "integer" and self.method == "rtn"
        fit = lookup("quantizers", self.method if codes == "integer" else codes, "fit")
        if own.grams is not None and codes == "integer" and self.method == "gptq":
            planes = kernels.fit(target, scheme, own.grams)
        else:
            planes = fit(target, scheme, LayerStats() if blind else own)
        planes = replace(planes, shape=tuple(weight.shape), rotation=None if held else _SEED)
        if (mask := unit.model.masks.get(name)) is not None:
            if not planes.is_integer or planes.rotation is not None:
                raise InputError(
                    f"{path} has removed connections",
                    got=f"{planes.kind}, which have no zero for them",
                    next="use integer codes, not rotated",
                )
            planes = _masked(planes, mask.reshape(matrix.shape))
        error = float((planes.dequantize() - weight).norm() / weight.norm().clamp_min(1e-12))
        said = self.method if codes == "integer" else f"{codes} codes, {self.method}"
        where = f"group {scheme.group}" if scheme.group else "per channel"
        if self.rotate:
            said += f", not rotated: {held}" if held else ", inputs rotated"
        edits = [
            Edit(
                "quantize", name, planes, f"{bits:g} bits {where} by {said}",
                {"bits": float(bits), "weight_error": error},
            )
        ]  # fmt: skip
        if self.rotate and held:
            edits.append(Edit("left", path, None, f"not rotated: {held}"))
        if bias is not None and mean is not None and was is not None:
            made = planes.dequantize().reshape(matrix.shape).double()
            now = _mean_output(made, mean if channels is None else mean / channels)
            moved = _mean_output(matrix.double(), was) - now  # [out]
            value = (bias.detach().double() + moved).to(bias.dtype)
            edits.append(Edit("weight", f"{path}.bias", value, "takes up the mean of the error"))
        return edits


def about_mean(stats: LayerStats) -> LayerStats:
    """Covariances in place of second moments: what a layer with a free bias has to fit."""
    if stats.grams is not None and stats.mean is not None:
        pairs = stats.mean.unsqueeze(2) * stats.mean.unsqueeze(1)  # [groups, row, row]
        return replace(stats, grams=stats.grams - pairs)
    if stats.gram is None or stats.mean is None:
        return stats
    cross = stats.cross
    if cross is not None and stats.was is not None:
        cross = cross - torch.outer(stats.was, stats.mean)
    gram = stats.gram - torch.outer(stats.mean, stats.mean)
    # A constant input has a variance of rounding noise around zero.
    dead = gram.diagonal() <= 1e-9 * stats.gram.diagonal()
    gram[dead], gram[:, dead] = 0.0, 0.0
    return replace(stats, gram=gram, cross=cross)


def _mean_output(matrix: Tensor, mean: Tensor) -> Tensor:
    """[out] of a mean input that is every output's, [in], or its group's, [groups, in]."""
    if mean.ndim == 1:
        return matrix @ mean
    return (matrix * mean.repeat_interleave(len(matrix) // len(mean), 0)).sum(1)


def _unrotatable(layer: nn.Module, tied: bool) -> str:
    """Why the inputs of a layer are not rotated; empty when they can be."""
    if not isinstance(layer, nn.Linear):
        return f"a {type(layer).__name__}"
    if tied:
        return "its matrix has another reader"
    return "" if possible(layer.in_features) else f"{layer.in_features} inputs"


def _rotated(stats: LayerStats, basis: Rotation) -> LayerStats:
    """Statistics of the rotated input, those that quantizers use."""
    if stats.gram is None:
        return LayerStats(count=stats.count)
    gram = basis.both(stats.gram)
    norm = gram.diagonal().clamp_min(0).sqrt().float()
    return LayerStats(gram=gram, norm=norm, count=stats.count)


def _divided(stats: LayerStats, channels: Tensor) -> LayerStats:
    """Statistics of the input over `channels` [in]."""
    wide = channels.double()
    pair = wide[:, None] * wide  # [in, in]
    return replace(
        stats,
        gram=None if stats.gram is None else stats.gram / pair,
        cross=None if stats.cross is None else stats.cross / pair,
        norm=None if stats.norm is None else stats.norm / channels,
    )


def _masked(planes: IntegerPlanes, mask: Tensor) -> IntegerPlanes:
    """Removed connections [out, in] back at the zero point: error feedback fills them."""
    zero = planes.spread(planes.zero_point).to(torch.uint8)  # [out, in]
    return replace(planes, codes=torch.where(mask, planes.codes, zero))
