"""Calibration: hidden states block by block, and statistics of every layer's input.

A later block is calibrated on the already edited earlier ones. Where blocks form a chain (each
takes the last one's output and nothing else that a block made), a block is entered with the
cached hidden states; otherwise the network is run again up to that block.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penjing.calls import Call, record
from penjing.errors import InputError
from penjing.gradients import SLOPES, Slopes
from penjing.graph import given, is_weighted
from penjing.layerstats import Collector, LayerStats, unpadded
from penjing.linalg import state
from penjing.model import Batch, Model
from penjing.pausing import paused

# Most stages of a block that is calibrated layer by layer.
_STAGES = 8
# Bytes that runs of the whole network may hold while they are stopped.
_HELD = 1 << 30

__all__ = ["LayerStats", "Stream", "Unit", "units_of"]


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
        checkpoint: of a step that takes long, where it keeps how far it has come.
        deadline: when it must have ended, of `time.monotonic`; None for whenever it is done.
    """

    name: str
    model: Model
    layers: dict[str, nn.Module]
    stream: Stream | None
    index: int | None
    original: Model | None = None
    batches: Sequence[Batch] = ()
    reference: Stream | None = None
    checkpoint: Path | None = None
    deadline: float | None = None

    def staged(
        self, needs: frozenset[str], stats: dict[str, LayerStats]
    ) -> Iterator[tuple[Unit, dict[str, LayerStats]]]:
        """The unit's layers stage by stage with their statistics; all at once where they are given.

        A later stage is calibrated on what the caller has made of the earlier ones.
        """
        if stats or self.stream is None or not needs:
            yield self, stats
            return
        for layers, found in self.stream.staged(self, needs, self.reference):
            yield replace(self, layers=layers), found


class _Stop(Exception):
    pass


class Stream:
    """Hidden states of a set of calibration batches on their way through the blocks.

    Args:
        model: the network; edits made to it are seen at once.
        batches: calibration batches.
        slopes: of layers, by path; they become part of the statistics of those.

    Attributes:
        outputs: what the entered block gives, one a batch, where it is known; who changes the
            block after that sets it to None.
    """

    def __init__(
        self, model: Model, batches: Sequence[Batch],
        slopes: Slopes | None = None,
    ) -> None:  # fmt: skip
        if not batches:
            raise InputError("no calibration data", next="give --data with at least one sample")
        self.model, self.batches, self.slopes = model, list(batches), slopes or Slopes()
        self.front: list[str] = []
        self.chained = False
        self._calls: list[list[Call]] = []  # [batch][block]; hidden only of the entered block
        self._entered = 0
        self.outputs: list[Tensor] | None = None
        self._makes: dict[Any, bool] = {}
        self._probe()

    def _probe(self) -> None:
        blocks = [self.model.module.get_submodule(b) for b in self.model.blocks]
        chained = bool(blocks)
        seen_front: dict[str, None] = {}
        inside = False
        # How the blocks hang together is seen in one sample and not run again on all.
        for batch in [self._longest(), *self.batches]:
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
                if self._calls and chained and _alike(self._calls[0], len(blocks)):
                    calls += [call.empty() for _ in blocks[1:]]
                    raise _Stop

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
                # The logits of a decoder are larger than all that is kept here.
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
        del self._calls[0]
        self.front = list(seen_front)
        self.chained = chained and all(len(c) == len(blocks) for c in self._calls)

    def _longest(self) -> Batch:
        """One sample of the longest, with padding: no mask is left out that a batch may need."""
        longest = max(self.batches, key=lambda batch: next(iter(batch.values())).shape[1:])
        sample = {name: value[:1].clone() for name, value in longest.items()}
        if "attention_mask" in sample and sample["attention_mask"].shape[-1] > 1:
            sample["attention_mask"][:, -1] = 0
        return sample

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
            self._entered, self.outputs = index, None
            self._calls = [[*self._capture(b, index)] for b in self.batches]
            return
        while self._entered < index:
            block = self.model.module.get_submodule(self.model.blocks[self._entered])
            self._move(self.outputs or self.run(block))

    def _move(self, outputs: Iterable[Tensor]) -> None:
        """On to the next block, with what the entered one gave."""
        for calls, output in zip(self._calls, outputs, strict=True):
            calls[self._entered].free()
            calls[self._entered + 1].hidden = output
        self._entered += 1
        self.outputs = None

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
        for calls in self._calls:
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
                self._move(outputs)

    def rows(self, number: int, hidden: Tensor) -> Tensor:
        """Hidden states [batch, length, width] of batch `number` as rows [tokens, width].

        Padding is left out.
        """
        return unpadded(hidden, self.batches[number].get("attention_mask"))

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

        One stage where the order is not that of a chain: a layer runs more than once, or not at
        all, or there are more than `_STAGES` of them (experts).
        """
        if unit.index is None or len(unit.layers) < 2:
            return [unit.layers]
        sample, block = (
            self.sample().samples(slice(0, 1)),
            self.model.module.get_submodule(unit.name),
        )
        order, _ = self._order(unit, partial(sample.run, block, sample.hidden))
        ran = [name for stage in order for name in stage]
        if sorted(ran) != sorted(unit.layers) or len(order) > _STAGES:
            return [unit.layers]
        return [{name: unit.layers[name] for name in stage} for stage in order]

    def _order(self, unit: Unit, run: Callable[[], Tensor]) -> tuple[list[list[str]], Tensor]:
        """Layers as a run has them, those with the same input together; what the run gives."""
        order: list[list[str]] = []
        last: list[Any] = []

        def see(_: nn.Module, args: Any, kwargs: Any, name: str) -> None:
            x = given(args, kwargs)
            if not last or x is not last[0] or state(x) != last[1]:
                order.append([])
            order[-1].append(name)
            last[:] = x, state(x)

        handles = [
            layer.register_forward_pre_hook(partial(see, name=name), with_kwargs=True, prepend=True)
            for name, layer in unit.layers.items()
        ]
        try:
            with torch.no_grad():
                output = run()
        finally:
            for handle in handles:
                handle.remove()
        return order, output

    def _runs(self, unit: Unit) -> list[Callable[[], Tensor]]:
        """Of the entered block, or of the whole network, one a batch."""
        if unit.index is None:
            return [partial(self.model.run, batch) for batch in self.batches]
        block = self.model.module.get_submodule(unit.name)
        return [partial(call.forward, block, call.hidden) for call in self.calls()]

    def _stoppable(self, unit: Unit, stages: list[dict[str, nn.Module]]) -> bool:
        """Whether calls of a block may stop before its stages, side by side.

        Seen by running blocks of each make once: every batch runs the layers in the order of the
        stages, and two calls under way together give what each gives alone.
        """
        block = self.model.module.get_submodule(unit.name)
        order = [list(layers) for layers in stages]
        make = (
            tuple((name, type(part)) for name, part in block.named_modules()),
            tuple(tuple(n.removeprefix(unit.name) for n in names) for names in order),
        )
        if make not in self._makes:
            self._makes[make] = self._try_stops(unit, order)
        return self._makes[make]

    def _try_stops(self, unit: Unit, order: list[list[str]]) -> bool:
        every = self._runs(unit)
        alone: list[Tensor] = []
        for run in every:
            names, output = self._order(unit, run)
            if names != order:
                return False
            if len(alone) < 2:
                alone.append(output)
        leaders = [unit.layers[names[0]] for names in order]
        try:
            with paused(leaders, every[:2]) as runs:
                for place in range(len(leaders)):
                    for one in runs:
                        one.until(place)
                together = [one.finish() for one in runs]
        except Exception:
            # Whatever it is: run in one go such a block works, or fails by itself.
            return False
        return all(map(torch.equal, together, alone))

    def collect(
        self, unit: Unit, needs: frozenset[str], reference: Stream | None = None
    ) -> dict[str, LayerStats]:
        """Statistics of the inputs of a unit's layers; embeddings have none.

        Args:
            unit: the entered block, or what stands outside the blocks.
            needs: any of `gram`, `range`, `cross`, `size`; slopes are there already.
            reference: the same batches on their way through the network before the edits; a
                layer whose input has another width there has no `cross`.

        Raises:
            InputError: an activation is NaN or infinite.
        """
        if not needs - SLOPES:
            return self._finished(Collector(unit.layers, needs, {}))
        other = reference if "cross" in needs else None
        runs = [stream._runs(unit) for stream in (other, self) if stream is not None]
        found = Collector(unit.layers, needs, _modules(other))

        def note(_: nn.Module, args: Any, kwargs: Any, name: str) -> None:
            found.before(name, given(args, kwargs))

        def see(_: nn.Module, args: Any, kwargs: Any, name: str) -> None:
            found.now(name, given(args, kwargs))

        # Appended, so that the hook sees what the layer sees.
        handles = [
            layer.register_forward_pre_hook(partial(hook, name=name), with_kwargs=True)
            for layers, hook in ((found.layers, see), (found.twins, note))
            for name, layer in layers.items()
        ]
        try:
            with torch.no_grad():
                for number, batch in enumerate(self.batches):
                    found.begin(batch.get("attention_mask"))
                    for run in runs:
                        run[number]()
        finally:
            for handle in handles:
                handle.remove()
        return self._finished(found)

    def _finished(self, found: Collector) -> dict[str, LayerStats]:
        stats = found.stats()
        for path, own in stats.items():
            own.gradient = self.slopes.weights.get(path)
            own.fisher = self.slopes.outputs.get(path)
        return stats

    def staged(
        self, unit: Unit, needs: frozenset[str], reference: Stream | None = None
    ) -> Iterator[tuple[dict[str, nn.Module], dict[str, LayerStats]]]:
        """A unit's layers stage by stage, with the statistics of their inputs.

        The output projection of an attention sees what the caller has made of the queries, keys
        and values. A block is run once in all, and what it gives is kept for the next one; one that
        cannot be stopped in between (see `_stoppable`) is run once a stage.

        Args:
            unit, needs, reference: as in `collect`.

        Raises:
            InputError: as in `collect`.
        """
        stages = self.stages(unit)
        if unit.index is None or len(stages) == 1 or not self._stoppable(unit, stages):
            for layers in stages:
                yield layers, self.collect(replace(unit, layers=layers), needs, reference)
            return
        yield from self._stopped(unit, stages, needs, reference)

    def through(
        self, layers: dict[str, nn.Module], needs: frozenset[str], reference: Stream | None = None
    ) -> Iterator[tuple[dict[str, nn.Module], dict[str, LayerStats]]]:
        """Layers anywhere, in the order the network runs them, with the statistics of their inputs.

        As in `staged` each sees what the caller has made of those before. The network is run once,
        or once a layer where it cannot be stopped or would hold too much meanwhile.

        Args:
            layers, needs, reference: as in `collect`; a layer that no sample reaches is left out.

        Raises:
            InputError: as in `collect`.
        """
        unit = Unit("", self.model, layers, self, None)
        most = 0

        def see(_: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal most
            most = max(most, given(args, kwargs).nbytes)

        handles = [m.register_forward_pre_hook(see, with_kwargs=True) for m in layers.values()]
        order, _ = self._order(unit, partial(self.model.run, self._longest()))
        for handle in handles:
            handle.remove()
        ran = [name for stage in order for name in stage]
        stages = [{name: layers[name] for name in stage} for stage in order]
        held = most * sum(len(next(iter(batch.values()))) for batch in self.batches) * 2
        if held < _HELD and len(ran) == len(set(ran)) and self._stoppable(unit, stages):
            yield from self._stopped(unit, stages, needs, reference)
            return
        for name in dict.fromkeys(ran):
            one = {name: layers[name]}
            yield one, self.collect(replace(unit, layers=one), needs, reference)

    def _stopped(
        self, unit: Unit, stages: list[dict[str, nn.Module]], needs: frozenset[str],
        reference: Stream | None,
    ) -> Iterator[tuple[dict[str, nn.Module], dict[str, LayerStats]]]:  # fmt: skip
        streams = [self] if reference is None or "cross" not in needs else [reference, self]
        modules = [_modules(stream) for stream in streams]
        with contextlib.ExitStack() as stack:
            runs = []
            for stream, own in zip(streams, modules, strict=True):
                leaders = [own[next(iter(layers))] for layers in stages]
                runs.append(stack.enter_context(paused(leaders, stream._runs(unit))))
            for place, layers in enumerate(stages):
                found = Collector(layers, needs, modules[0] if len(streams) > 1 else {})
                adds = (found.before, found.now)[-len(streams) :]
                for number, batch in enumerate(self.batches):
                    found.begin(batch.get("attention_mask"))
                    for calls, add in zip(runs, adds, strict=True):
                        if (x := calls[number].until(place)) is not None:
                            for name in found.layers:
                                add(name, x)
                yield layers, self._finished(found)
            if self.chained and unit.index is not None and unit.index + 1 < len(self.model.blocks):
                for stream, calls in zip(streams, runs, strict=True):
                    stream.outputs = [call.finish() for call in calls]


def _alike(calls: list[Call], blocks: int) -> bool:
    """Whether all blocks were given the very same besides their hidden state."""
    first = calls[0]
    return len(calls) == blocks and all(
        call.named == first.named
        and call.kwargs.keys() == first.kwargs.keys()
        and all(a is b for a, b in zip(call.args, first.args, strict=True))
        and all(value is first.kwargs[name] for name, value in call.kwargs.items())
        for call in calls
    )


def _modules(stream: Stream | None) -> dict[str, nn.Module]:
    return {} if stream is None else dict(stream.model.module.named_modules())


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
