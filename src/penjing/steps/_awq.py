"""AWQ's divisors folded into the weights: what `quantize` with the method `awq` begins with.

    writers W / s, b / s;   readers W s;   s from `penjing.migration.activation_aware`

(Lin et al., arXiv 2306.00978.) Writers are norms, the values of an attention, the linear branch of
an MLP, convolutions before ReLUs (`penjing.channels`); nothing is left to compute. The network
gives what it gave, so that all of s is found in one pass over the unedited network, block by block.
A layer whose inputs nothing can divide is left with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from penjing.batching import rebatched
from penjing.calibrate import LayerStats, Stream, Unit, units_of
from penjing.channels import Channels, last_channels, shared_channels
from penjing.errors import UsageError
from penjing.migration import activation_aware
from penjing.model import Model
from penjing.planes import Scheme
from penjing.progress import track
from penjing.quantizers import awq
from penjing.recipe import Edit
from penjing.steps._divide import division, is_plain, same
from penjing.steps._select import matches, selected

__all__ = ["Divide"]

# Rows of a weight that the search looks at: rows do not depend on each other.
_ROWS = 512


@dataclass(frozen=True)
class Divide:
    """Divide the inputs of layers as AWQ does, where what makes them can hold it.

    Attributes:
        scheme: that the weights are rounded in after it.
        bias: their biases take up the mean of the error.
        targets, skip: globs of the layers that are rounded.
    """

    name: ClassVar[str] = "awq"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    scheme: Scheme
    bias: bool = True
    targets: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """New weights, biases and gains, and the layers that are left."""
        model = unit.model
        if not unit.batches:
            raise UsageError("method awq without data", next="give --data, or use the method clip")
        stream = Stream(model, rebatched(model, unit.batches))
        held = {name for group in model.tied() for name in group}
        wanted: dict[str, str] = {}
        planned: list[tuple[Channels, Tensor]] = []
        for part in units_of(model, stream):
            layers = {
                n: m for n, m in selected(part, self.targets).items()
                if not isinstance(m, nn.Embedding) and not (self.skip and matches(n, self.skip))
            }  # fmt: skip
            wanted |= {n: _own_reason(model, n, held) for n in layers}
        ready = {n for n, reason in wanted.items() if not reason}
        whole = [s for s in shared_channels(model) if self._usable(model, s, ready, held)]
        planned += self._searched(model, whole, Unit("", model, {}, stream, None))
        for part in track(list(units_of(model, stream)), self.name):
            taken = {name for found, _ in planned for name in found.readers}
            if not (own := tuple(n for n in part.layers if n in ready - taken)):
                continue
            if part.index is not None:
                stream.enter(part.index)
            sets = [f for f in _sets(part, own) if self._usable(model, f, ready, held)]
            planned += self._searched(model, sets, part)
        if planned and not same(model, planned):  # all at once settles the usual network
            planned = [one for one in planned if same(model, [one])]
        yield from division(model, planned)
        divided = {name for found, _ in planned for name in found.readers}
        for name, reason in wanted.items():
            if name not in divided:
                why = reason or "nothing that makes its inputs can hold them"
                yield Edit("left", name, None, f"rounded without awq's divisors: {why}")

    def _usable(self, model: Model, found: Channels, ready: set[str], held: set[str]) -> bool:
        names = [f"{n}.{p}" for n in found.writers for p, _ in _own(model, n)]
        return set(found.readers) <= ready and not held & set(names) and all(
            is_plain(model, n) for n in found.writers
        )  # fmt: skip

    def _searched(
        self, model: Model, sets: list[Channels], part: Unit
    ) -> list[tuple[Channels, Tensor]]:
        readers = {n: model.module.get_submodule(n) for own in sets for n in own.readers}
        if not readers or part.stream is None:
            return []
        stats = part.stream.collect(replace(part, layers=readers), frozenset({"gram"}))
        seen = [own for own in sets if all(stats[n].gram is not None for n in own.readers)]
        return [(own, self._divisors(own, readers, stats)) for own in seen]

    def _divisors(
        self, found: Channels, layers: dict[str, nn.Module], stats: dict[str, LayerStats]
    ) -> Tensor:
        """s, float32 [channels]."""
        grams, weights, columns = [], [], []
        for name in found.readers:
            layer, own = layers[name], stats[name]
            weight: Tensor = layer.weight.detach().float()  # type: ignore[operator]
            gram = own.gram
            assert gram is not None
            if self.bias and layer.bias is not None and own.mean is not None:
                gram = gram - torch.outer(own.mean, own.mean)
            channel = torch.tensor(found.columns) if found.columns else torch.arange(found.count)
            places = weight[0, 0].numel()  # of a kernel
            columns.append(channel.repeat_interleave(places))
            grams.append(gram)
            weights.append(weight.flatten(1)[:: -(-len(weight) // _ROWS)])
        kernels = any(isinstance(layers[n], nn.Conv2d) for n in found.readers)
        # Convolutions have one scale an output channel.
        scheme = replace(self.scheme, group=0) if kernels else self.scheme

        def rounded(weight: Tensor, gram: Tensor) -> Tensor:
            return awq.fit(weight, scheme, LayerStats(gram=gram)).dequantize()

        return activation_aware(grams, weights, rounded, columns=columns)


def _own(model: Model, path: str) -> Iterator[tuple[str, nn.Parameter]]:
    return model.module.get_submodule(path).named_parameters()


def _own_reason(model: Model, path: str, held: set[str]) -> str:
    """Why a layer cannot hold s; empty when it can."""
    layer = model.module.get_submodule(path)
    if f"{path}.weight" in held:
        return "its matrix has another reader"
    if f"{path}.weight" in model.planes:
        return "it is quantized already"
    if path in model.activations:
        return "its inputs are in 8 bits already"
    if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
        return "a grouped convolution" if isinstance(layer, nn.Conv2d) else "not a linear layer"
    return ""


def _sets(part: Unit, paths: tuple[str, ...]) -> list[Channels]:
    """The sets of a block, or of what stands outside the blocks, by their whole paths."""
    assert part.stream is not None
    model = part.model
    linear = [n for n, m in part.layers.items() if isinstance(m, nn.Linear)]
    if part.index is None:
        return last_channels(model.module, lambda: model.run(model.example), paths, linear)
    call = part.stream.sample()
    if call.hidden.ndim == 3:
        call = call.first(batch=2, length=16)
    own = model.module.get_submodule(part.name)
    block, wide = copy.deepcopy(own).double(), call.double()
    try:
        wide.run(block, wide.hidden)
    except RuntimeError:  # an operator that has no float64, as a product of experts
        block = copy.deepcopy(own)
    else:
        call = wide
    prefix = f"{part.name}."
    inner, makers = ({n.removeprefix(prefix) for n in names} for names in (paths, linear))

    def within(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(prefix + name for name in names)

    sets = last_channels(block, lambda: call.run(block, call.hidden), inner, makers)
    return [replace(s, writers=within(s.writers), readers=within(s.readers)) for s in sets]
