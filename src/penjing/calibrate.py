"""Calibration: hidden states block by block, and statistics of every layer's input.

A later block is calibrated on the already edited earlier ones. Where blocks form a chain (each
takes the last one's output and nothing else that a block made), a block is entered with the
cached hidden states; otherwise the network is run again up to that block.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penjing.calls import Call, record
from penjing.errors import InputError
from penjing.graph import is_weighted
from penjing.linalg import Cross, Gram, Sums
from penjing.model import Batch, Model
from penjing.patches import Patches, is_grouped

# Input vectors sampled from a batch, and in all, to choose a range by.
_SAMPLE, _SAMPLES = 256, 8192
# Most stages of a block that is calibrated layer by layer.
_STAGES = 8

__all__ = ["LayerStats", "Stream", "Unit", "units_of"]


@dataclass
class LayerStats:
    """Statistics of the input of one layer.

    Attributes:
        gram: [in, in] mean outer product, float64; None where it was not asked for.
        cross: [in, in] mean outer product of the reference's inputs (rows) and these (columns).
        norm: [in] root mean square of each input.
        grams: of a grouped convolution in place of `gram`: [groups, row, row], row = in / groups
            * h * w, mean outer product of the patches of each group.
        mean: [in] mean of each input, float64, with `gram`; with `grams` [groups, row].
        was: the same of the reference's inputs, with `cross`.
        low, high: range of all values seen.
        lows, highs: [channels], range of each input channel, with `range`.
        rows: [n, channels], a sample of input vectors spread over the data, with `range`; of a
            convolution the channels at a place, without its kernel's neighbourhood.
        count: input vectors seen; 0 where the layer was never run.
    """

    gram: Tensor | None = None
    grams: Tensor | None = None
    norm: Tensor | None = None
    cross: Tensor | None = None
    mean: Tensor | None = None
    was: Tensor | None = None
    low: float = 0.0
    high: float = 0.0
    count: int = 0
    lows: Tensor | None = None
    highs: Tensor | None = None
    rows: Tensor | None = None


@dataclass
class Unit:
    """A part of the network that is planned at once.

    Attributes:
        name: path of the block, or `front` / `back` for what stands before and after the blocks.
        layers: layers with a weight matrix, by path.
        stream: gives the block's inputs; None without data, and for the whole network.
        index: position among the blocks, None for `front`, `back` and the whole network.
        original: the network before any edit, for steps that plan the whole network.
        reference: inputs of the same block in the network as it was before this step.
        batches: calibration batches, likewise.
    """

    name: str
    model: Model
    layers: dict[str, nn.Module]
    stream: Stream | None
    index: int | None
    original: Model | None = None
    batches: Sequence[Batch] = ()
    reference: Stream | None = None


class _Stop(Exception):
    pass


class Stream:
    """Hidden states of a set of calibration batches on their way through the blocks.

    Args:
        model: the network; edits made to it are seen at once.
        batches: calibration batches.
    """

    def __init__(self, model: Model, batches: Sequence[Batch]) -> None:
        if not batches:
            raise InputError("no calibration data", next="give --data with at least one sample")
        self.model, self.batches = model, list(batches)
        self.front: list[str] = []
        self.chained = False
        self._calls: list[list[Call]] = []  # [batch][block]; hidden only of the entered block
        self._entered = 0
        self._mask: Tensor | None = None
        self._probe()

    def _probe(self) -> None:
        blocks = [self.model.module.get_submodule(b) for b in self.model.blocks]
        chained = bool(blocks)
        seen_front: dict[str, None] = {}
        inside = False
        for batch in self.batches:
            calls: list[Call] = []
            last: list[Tensor] = []
            made: list[Tensor] = []  # what blocks give besides the hidden state
            handles = []

            def enter(
                _: nn.Module,
                args: Any,
                kwargs: Any,
                calls: list[Call] = calls,
                last: list[Tensor] = last,
                made: list[Tensor] = made,
            ) -> None:
                nonlocal chained, inside
                inside = True
                call = record(args, kwargs)
                others = [*call.args, *call.kwargs.values()]
                if last and call.hidden is not last[0]:
                    chained = False
                if any(a is b for a in others for b in made):
                    chained = False
                if calls:  # only the first block's hidden states are kept
                    call.free()
                calls.append(call)

            def leave(
                _: nn.Module,
                args: Any,
                output: Any,
                calls: list[Call] = calls,
                last: list[Tensor] = last,
                made: list[Tensor] = made,
            ) -> None:
                parts = output if isinstance(output, tuple) else (output,)
                last[:] = parts[:1]
                made += [part for part in parts[1:] if isinstance(part, Tensor)]
                # What the first batch has shown is not run again: the logits of a decoder are
                # larger than all that is kept here.
                if self._calls and chained and len(calls) == len(blocks) == len(self._calls[0]):
                    raise _Stop

            for block in blocks:
                # Prepended, so that a patch's own hook does not hide the chain.
                handles.append(
                    block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
                )
                handles.append(block.register_forward_hook(leave))
            if not self._calls:
                for name, module in self.model.module.named_modules():
                    if is_weighted(module):

                        def note(_: nn.Module, args: Any, name: str = name) -> None:
                            if not inside:
                                seen_front[name] = None

                        handles.append(module.register_forward_pre_hook(note))
            try:
                with torch.no_grad(), contextlib.suppress(_Stop):
                    self.model.run(batch)
            finally:
                for handle in handles:
                    handle.remove()
            self._calls.append(calls)
        self.front = list(seen_front)
        self.chained = chained and all(len(c) == len(blocks) for c in self._calls)

    def twin(self, model: Model) -> Stream:
        """The same batches on their way through a copy of the network, as far as they are here.

        Spares the run of the whole network that a stream begins with.

        Args:
            model: a copy whose layers compute what this stream's did when it was made.
        """
        other = copy.copy(self)
        other.model = model
        other._calls = [[copy.copy(call) for call in calls] for calls in self._calls]
        return other

    def enter(self, index: int) -> None:
        """Move to the input of block `index`; blocks before it must be finished.

        Chained streams only go forward.
        """
        if not self.chained:
            self._entered = index
            self._calls = [[*self._capture(b, index)] for b in self.batches]
            return
        while self._entered < index:
            block = self.model.module.get_submodule(self.model.blocks[self._entered])
            for calls in self._calls:
                call = calls[self._entered]
                with torch.no_grad():
                    calls[self._entered + 1].hidden = call.run(block, call.hidden)
                call.free()
            self._entered += 1

    def _capture(self, batch: Batch, index: int) -> Iterator[Call]:
        found: list[Call] = []

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(record(args, kwargs))
            raise _Stop

        block = self.model.module.get_submodule(self.model.blocks[index])
        handle = block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        try:
            with torch.no_grad():
                self.model.run(batch)
        except _Stop:
            pass
        finally:
            handle.remove()
        yield from found

    def calls(self) -> Iterator[Call]:
        """The recorded calls of the entered block, one a batch."""
        for calls, batch in zip(self._calls, self.batches, strict=True):
            self._mask = batch.get("attention_mask")
            yield calls[self._entered if self.chained else 0]

    def walk(self) -> Iterator[tuple[int, nn.Module, list[Call], list[Tensor]]]:
        """Every block in order: index, module, its calls (with inputs) and its outputs."""
        for index, path in enumerate(self.model.blocks):
            self.enter(index)
            block = self.model.module.get_submodule(path)
            calls = list(self.calls())
            outputs = list(self.run(block))
            yield index, block, calls, outputs
            if self.chained and index + 1 < len(self.model.blocks):
                for own, output in zip(self._calls, outputs, strict=True):
                    own[index].free()
                    own[index + 1].hidden = output
                self._entered = index + 1

    def rows(self, number: int, hidden: Tensor) -> Tensor:
        """Hidden states [batch, length, width] of batch `number` as rows [tokens, width].

        Padding is left out.
        """
        return _unpadded(hidden, self.batches[number].get("attention_mask"))

    def run(self, block: nn.Module) -> Iterator[Tensor]:
        """Outputs of `block` on the entered inputs, one a batch."""
        with torch.no_grad():
            for call in self.calls():
                yield call.run(block, call.hidden)

    def sample(self) -> Call:
        """The first call of the entered block."""
        return next(self.calls())

    def stages(self, unit: Unit) -> list[dict[str, nn.Module]]:
        """A block's layers in the order they run, those that read the same input together.

        One stage where the order is not that of a chain: a layer runs more than once, or there
        are more than `_STAGES` of them (experts).
        """
        if unit.index is None or len(unit.layers) < 2:
            return [unit.layers]
        order: list[str] = []
        inputs: list[Tensor] = []
        handles = []
        for name, layer in unit.layers.items():

            def see(_: nn.Module, args: Any, name: str = name) -> None:
                order.append(name)
                inputs.append(args[0])

            handles.append(layer.register_forward_pre_hook(see, prepend=True))
        try:
            call = self.sample()
            call.run(self.model.module.get_submodule(unit.name), call.hidden)
        finally:
            for handle in handles:
                handle.remove()
        stages: list[dict[str, nn.Module]] = []
        for place, name in enumerate(order):
            if not place or inputs[place] is not inputs[place - 1]:
                stages.append({})
            stages[-1][name] = unit.layers[name]
        if len(order) != len(set(order)) or len(stages) > _STAGES:
            return [unit.layers]
        if unseen := {n: m for n, m in unit.layers.items() if n not in order}:
            stages.append(unseen)
        return stages

    def collect(
        self,
        unit: Unit,
        needs: frozenset[str],
        reference: Stream | None = None,
        *,
        stage: bool = False,
    ) -> dict[str, LayerStats]:
        """Statistics of the inputs of a unit's layers; embeddings have none.

        Args:
            unit: the entered block, or what stands outside the blocks.
            needs: any of `gram`, `range`, `cross`.
            reference: the same batches on their way through the network before the edits; a
                layer whose input has another width there has no `cross`.
            stage: the layers run once each, as in `stages`; what comes after them is not run.

        Raises:
            InputError: an activation is NaN or infinite.
        """
        names = [n for n, m in unit.layers.items() if not isinstance(m, nn.Embedding)]
        stats = {name: LayerStats() for name in names}
        grams: dict[str, Gram] = {}
        crosses: dict[str, Cross] = {}
        other = reference if "cross" in needs else None
        twins = {}
        if other is not None:
            modules = dict(other.model.module.named_modules())
            twins = {n: modules[n] for n in names if n in modules}
        seen: dict[str, list[Tensor]] = {}
        # Of grouped convolutions, of this network and of the reference.
        patches: dict[tuple[str, bool], Patches] = {}
        # Layers that read one tensor share its rows and their sums within a call.
        # The tensors are kept with them, so that no address is used twice.
        shared: dict[tuple[bool, int], tuple[Tensor, Tensor]] = {}
        sums: tuple[Sums, Sums] = {}, {}
        left = {False: set(names), True: set(twins)}

        def rows_of(module: nn.Module, x: Tensor, twin: bool) -> Tensor:
            if not isinstance(module, nn.Linear):
                return x
            key = twin, id(x)
            if key not in shared:
                shared[key] = x, _unpadded(x, self._mask)
            return shared[key][1]

        def passed(name: str, twin: bool) -> None:
            left[twin].discard(name)
            if stage and unit.index is not None and not left[twin]:
                raise _Stop

        def add_patches(module: nn.Module, x: Tensor, name: str, twin: bool) -> None:
            if "gram" in needs and is_grouped(module) and x.numel():
                patches.setdefault((name, twin), Patches()).add(module, x)

        def note(module: nn.Module, args: Any, name: str) -> None:
            add_patches(module, args[0], name, True)
            if (rows := _vectors(module, rows_of(module, args[0], True))) is not None:
                seen.setdefault(name, []).append(rows)
            passed(name, True)

        def see(module: nn.Module, args: Any, name: str) -> None:
            x = rows_of(module, args[0], False)
            own, both = sums if isinstance(module, nn.Linear) else (None, None)
            add_patches(module, args[0], name, False)
            rows = _update(name, module, x, stats[name], grams, needs, own)
            if rows is not None and (before := seen.get(name)):
                was = before.pop(0)
                if was.shape == rows.shape:
                    crosses.setdefault(name, Cross(rows.shape[1])).add(was, rows, both)
            passed(name, False)

        def fresh() -> None:
            for known in (seen, shared, *sums):
                known.clear()
            left[False], left[True] = set(names), set(twins)

        # Appended, so that the hook sees what the layer sees.
        handles = [
            unit.layers[n].register_forward_pre_hook(functools.partial(see, name=n)) for n in names
        ]
        handles += [
            m.register_forward_pre_hook(functools.partial(note, name=n)) for n, m in twins.items()
        ]
        try:
            with torch.no_grad():
                if unit.index is not None:
                    block = self.model.module.get_submodule(unit.name)
                    pairs: Iterator[tuple[Call, Call | None]] = (
                        zip(self.calls(), itertools.repeat(None))
                        if other is None
                        else zip(self.calls(), other.calls(), strict=True)
                    )
                    for call, was in pairs:
                        fresh()
                        if other is not None and was is not None:
                            twin = other.model.module.get_submodule(unit.name)
                            with contextlib.suppress(_Stop):
                                was.run(twin, was.hidden)
                        with contextlib.suppress(_Stop):
                            call.run(block, call.hidden)
                else:
                    for batch in self.batches:
                        fresh()
                        self._mask = batch.get("attention_mask")
                        if other is not None:
                            other.model.run(batch)
                        self.model.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        for name, gram in grams.items():
            own = stats[name]
            own.gram, own.norm, own.mean = gram.matrix, gram.norm, gram.mean
        for (name, before_edits), known in patches.items():
            if not before_edits:
                stats[name].grams, stats[name].mean = known.grams, known.mean
            elif (now := patches.get((name, False))) and now.mean.shape == known.mean.shape:
                stats[name].was = known.mean
        for name, cross in crosses.items():
            if cross.count == grams[name].count:  # every row had its pair
                stats[name].cross, stats[name].was = cross.matrix, cross.mean
        return stats


def _unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape:
        return x[mask.bool()]  # [tokens, width]
    return x.reshape(-1, x.shape[-1])


def _update(
    name: str,
    layer: nn.Module,
    x: Tensor,
    stats: LayerStats,
    grams: dict[str, Gram],
    needs: frozenset[str],
    sums: Sums | None,
) -> Tensor | None:
    if not x.numel():  # an expert that no token was sent to
        return None
    low, high = float(x.amin()), float(x.amax())
    if not (torch.isfinite(torch.tensor([low, high])).all()):
        raise InputError(
            f"the input of {name} is NaN or infinite on the calibration data",
            next="check the data and the model's precision",
        )
    stats.low = min(stats.low, low)
    stats.high = max(stats.high, high)
    if "range" in needs:
        _range(layer, x, stats)
    vectors = _vectors(layer, x) if "gram" in needs else None
    stats.count += len(x) if vectors is None else len(vectors)
    if vectors is not None:
        if name not in grams:
            grams[name] = Gram(vectors.shape[1])
        grams[name].add(vectors, sums)
    return vectors


def _range(layer: nn.Module, x: Tensor, stats: LayerStats) -> None:
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        x = x.movedim(1, -1)
    rows = x.detach().reshape(-1, x.shape[-1])  # [n, channels]
    lows, highs = rows.amin(0), rows.amax(0)
    # A prime step, so that a convolution's places do not all come from one column.
    step = max(1, len(rows) // _SAMPLE)
    sample = rows[:: next(p for p in itertools.count(step) if _is_prime(p))].clone()
    if stats.lows is not None and stats.highs is not None and stats.rows is not None:
        lows, highs = torch.minimum(lows, stats.lows), torch.maximum(highs, stats.highs)
        sample = torch.cat([stats.rows, sample])
        if len(sample) > _SAMPLES:
            sample = sample[::2].clone()
    stats.lows, stats.highs, stats.rows = lows, highs, sample


def _is_prime(number: int) -> bool:
    return number == 1 or all(number % k for k in range(2, int(number**0.5) + 1))


def _vectors(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Input as rows that the weight matrix [out, in] multiplies; None for grouped convolutions."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])  # [tokens, in]
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        patches = torch.nn.functional.unfold(
            x,
            layer.kernel_size,
            layer.dilation,
            0 if isinstance(layer.padding, str) else layer.padding,
            layer.stride,
        )  # [batch, in * h * w, places]
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
        return rows[:: max(1, len(rows) // 4096)]
    return None


def units_of(model: Model, stream: Stream | None) -> Iterator[Unit]:
    """Front, blocks, back: every weighted layer belongs to exactly one unit."""
    layers = {n: m for n, m in model.module.named_modules() if is_weighted(m)}
    inside = {
        n: next((b for b in model.blocks if n == b or n.startswith(f"{b}.")), None) for n in layers
    }
    outside = [n for n, block in inside.items() if block is None]
    if stream is None:
        early = [n for n in outside if isinstance(layers[n], nn.Embedding)]
    else:
        early = [n for n in outside if n in stream.front]
    yield Unit("front", model, {n: layers[n] for n in early}, stream, None)
    for index, block in enumerate(model.blocks):
        own = {n: m for n, m in layers.items() if inside[n] == block}
        yield Unit(block, model, own, stream, index)
    late = [n for n in outside if n not in early]
    yield Unit("back", model, {n: layers[n] for n in late}, stream, None)
