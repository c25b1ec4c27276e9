"""Shrink: whole neurons go away, physically: channels, hidden units, heads or key-value groups.

Which of them go together is found by following the network's channels through one run
(`penjing.channelmap`). What reads them is refitted by least squares on the calibration data, and
every edit is proved: the network with the weights that read the removed units at zero gives the
same output as the small one. Units of a block go with its turn; those that several blocks share
(the residual stream of a CNN) go before, on the whole network.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Stream, Unit
from penjing.calls import Call
from penjing.channelmap import ChannelMap, Free, channel_map, map_of
from penjing.coupling import Member, Units, silence
from penjing.errors import InputError, UsageError
from penjing.gradients import slopes
from penjing.model import Batch, Model
from penjing.proof import PROOF, prove
from penjing.recipe import Edit, Setting, Slice
from penjing.steps._importance import check, needs_of
from penjing.steps._neurons import (
    Consumer,
    Remaining,
    choose,
    collect,
    consumers_of,
    described,
    learned,
    mask_of,
    put,
    refit,
    silenced,
)
from penjing.steps._problem import Fit
from penjing.steps._ranking import OF, RANKINGS, ladder_of
from penjing.steps._select import LEARNED, matches, matrix_layers

__all__ = ["OF", "RANKINGS", "Shrink", "groups_of"]


@dataclass(frozen=True)
class Shrink:
    """Remove neurons.

    Attributes:
        ratio: fraction of the units of every group that go, 0 to 1.
        heads: fraction of the heads or key-value groups that go; None means `ratio`.
        criterion: `gram` (greedy optimal brain surgeon) or a name of `penjing.unitcriteria` or
            `penjing.criteria`; `learned` in place of the ratios: what the step `constrain` before
            it chose.
        repair: refit what reads them by ridge least squares.
        multiple: kept units are a multiple of this, which kernels want; of heads any number.
        targets: globs of the layers that read the units, e.g. `*.output.dense`.
        of: what `ratio` is of: `units` of every group, or `parameters` or `macs` of the network.
        ranking: `layer` for the same fraction of every group, or how groups are ranked against
            each other, `global` or `measured` (`penjing.steps._ranking`).
        kept: units that stay, by the name of their group; other groups stay whole. It takes the
            place of `ratio` and `heads`.
    """

    name: ClassVar[str] = "shrink"
    scope: ClassVar[str] = "block"
    staged: ClassVar[bool] = True

    ratio: float = 0.5
    heads: float | None = None
    criterion: str = "gram"
    repair: bool = True
    multiple: int = 8
    targets: tuple[str, ...] = ()
    of: str = "units"
    ranking: str = "layer"
    kept: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        for name, value in (("ratio", self.ratio), ("heads", self.heads)):
            if value is not None and not 0 <= value < 1:
                raise UsageError(name, got=value, allowed=f"0 <= {name} < 1")
        check(self.criterion)
        if self.multiple < 1:
            raise UsageError("multiple", got=self.multiple, allowed="1 or more")
        for what, given, allowed in (("of", self.of, OF), ("ranking", self.ranking, RANKINGS)):
            if given not in allowed:
                raise UsageError(
                    what, got=repr(given), allowed=", ".join(allowed),
                    next="penjing shrink --of latency" if given == "latency" else None,
                )  # fmt: skip
        if self.ranking != "layer" and self.of == "units":
            raise UsageError(
                f"ranking {self.ranking} of units", allowed="of parameters or macs",
                next="say what share of the network goes",
            )  # fmt: skip
        kept = {} if self.kept is None else self.kept
        if not isinstance(kept, Mapping) or any(
            type(count) is not int or count < 1 for count in kept.values()
        ):
            raise UsageError("kept units", got=kept, allowed="1 or more of each group, by its name")

    @property
    def before(self) -> tuple[_Shared, ...]:
        """What goes first."""
        return (_Shared(self),)

    @property
    def needs(self) -> frozenset[str]:
        """What the criterion wants, and what the repair does."""
        return needs_of(self.criterion) | {"gram", "cross"}

    def settled(self, model: Model, batches: Sequence[Batch]) -> Shrink:
        """The same with the units that stay of each group, where that is for the network to say.

        Raises:
            InputError: more than there is to take.
        """
        if self.kept is not None or (self.of, self.ranking) == ("units", "layer"):
            return self
        ladder = ladder_of(model, self, batches)
        kept = ladder.rungs(ladder.first(self.of, 1 - self.ratio))
        return replace(self, kept=kept, of="units", ranking="layer")

    def informed(self, model: Model) -> set[str]:
        """Paths of the layers whose outputs decide which units go."""
        return {
            one.path for free in channel_map(model).free
            for one in consumers_of(model.module, free.group)
        }  # fmt: skip

    def layers(self, unit: Unit) -> dict[str, nn.Module]:
        """The layers that may lose inputs, by path."""
        return matrix_layers(unit, self.targets) if unit.index is not None else {}

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """What reads a group refitted as soon as its inputs are known, then all slices.

        Until then what goes is silenced, so that the block runs on and later layers see it.
        """
        if unit.stream is None:
            raise UsageError("shrink needs data", next="give --data")
        chosen = replace(unit, layers=self.layers(unit))
        if unit.index is None or not chosen.layers:
            return
        waiting = [_Waiting(free, _placed(free.group, unit.name)) for free in groups_of(unit).free]
        waiting = [one for one in waiting if self._chosen(one, unit.model, chosen.layers)]
        if not waiting:
            return
        read = {reader.path for one in waiting for reader in one.readers}
        chosen.layers = {n: m for n, m in chosen.layers.items() if n in read}
        known: dict[str, LayerStats] = {}
        slices, left = [], Remaining(unit.model.module)
        for _, found in unit.stream.staged(chosen, self.needs, unit.reference):
            known |= found
            for one in [w for w in waiting if all(c.path in known for c in w.readers)]:
                waiting.remove(one)
                # A layer that was never run has no Gram matrix to choose by.
                readers = [c for c in one.readers if known[c.path].gram is not None]
                if not readers:
                    continue
                group, module = one.free.group, unit.model.module
                kept, fits, used = choose(
                    unit.model, one.group, readers, known, one.keep, self.criterion
                )
                settings = one.free.settings(len(kept))
                block = module.get_submodule(unit.name)
                error = _proof(block, unit, group, kept, settings)
                if error > PROOF:
                    continue
                yield from _fallen(self, one.group, used)
                settings = described(settings, unit.name)
                slices.append(_edit(used, one.group, readers[0], kept, left, settings, error))
                for reader in one.readers:
                    own = silenced(chosen.layers[reader.path], reader, kept)
                    fit = fits.get(reader.path, own) if self.repair else own
                    yield from _refitted(unit.model.module, reader.path, fit)
        if slices:  # what the block gave was of its silenced self: equal, but for rounding
            unit.stream.outputs = None
        yield from slices

    def _chosen(self, one: _Waiting, model: Model, layers: dict[str, nn.Module]) -> bool:
        """Whether units of a group go; what reads them, and what stays, is noted."""
        one.readers = consumers_of(model.module, one.group)
        one.keep = self.staying(model, one.group)
        every = all(reader.path in layers for reader in one.readers)
        return every and bool(one.readers) and _number(one.keep) < one.group.count

    def staying(self, model: Model, group: Units) -> int | list[int]:
        """How many units of a group stay, or which."""
        return learned(model, group) if self.criterion == LEARNED else self.keep(group)

    def keep(self, group: Units) -> int:
        """Units of a group that stay."""
        if self.kept is not None:
            return min(self.kept.get(group.name, group.count), group.count)
        ratio = self.ratio if self.heads is None or not group.is_heads else self.heads
        if not ratio:  # rounding to `multiple` must not take any
            return group.count
        keep = round(group.count * (1 - ratio))
        if not group.is_heads and group.count > self.multiple:
            keep = max(1, round(keep / self.multiple)) * self.multiple
        return min(max(1, keep), group.count)


@dataclass(eq=False)
class _Waiting:
    """A group of a block, its parameters with their whole names, and what reads it."""

    free: Free
    group: Units
    readers: list[Consumer] = field(default_factory=list)
    keep: int | list[int] = 0


@dataclass(frozen=True)
class _Shared:
    """Units that no block has for itself."""

    name: ClassVar[str] = "shrink"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()

    step: Shrink

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """Slices first, then everything that reads the units refitted, in the order it runs.

        All is tried on a copy in which what goes is silenced, so that the inputs of a layer are
        numbered as the original's are.
        """
        model, step = unit.model, self.step
        check(step.criterion, model.module)
        every = channel_map(model).free
        if unknown := sorted(set(step.kept or ()) - {free.group.name for free in every}):
            raise InputError(
                "kept units of no group of the network", got=unknown[0],
                next="see penjing inspect --groups",
            )  # fmt: skip
        groups = [f for f in every if self._wanted(model.blocks, f)]
        if not groups:
            return
        if not unit.batches:
            raise UsageError("shrink needs data", next="give --data")
        twin = model.copy(shared=True)
        layers = {n: m for n, m in twin.module.named_modules() if hasattr(m, "weight")}
        needs = needs_of(step.criterion) | {"gram"}
        about = step.informed(model)
        stream = Stream(twin, unit.batches, slopes(model, unit.batches, needs, about))
        left = Remaining(model.module)
        edits, touched = [], {}
        for free in groups:
            consumers, keep = consumers_of(twin.module, free.group), step.staying(model, free.group)
            if _number(keep) == free.group.count:
                continue
            found = collect(stream, {c.path: layers[c.path] for c in consumers}, needs)
            consumers = [c for c in consumers if found[c.path].gram is not None]
            if not consumers:
                continue
            kept, fits, used = choose(twin, free.group, consumers, found, keep, step.criterion)
            settings = free.settings(len(kept))
            error = _whole_proof(model, free.group, kept, settings)
            if error > PROOF:
                continue
            edits += _fallen(step, free.group, used)
            edits.append(_edit(used, free.group, consumers[0], kept, left, settings, error))
            silence(twin.module, [(free.group, kept)])
            for path, fit in fits.items() if step.repair else ():
                put(twin.module, layers[path], fit)
                touched[path] = layers[path]
        if not touched:
            yield from edits
            return
        original = Stream(model.copy(shared=True), unit.batches)
        for stage, found in stream.through(touched, frozenset({"gram", "cross"}), original):
            for path, layer in stage.items():
                was = model.module.get_submodule(path)
                weight: Tensor = was.weight.detach().float().flatten(1)  # type: ignore[operator]
                now: Tensor = layer.weight.detach().flatten(1)  # type: ignore[operator]
                stays = (now != 0).any(0).nonzero().flatten()
                fit = refit(was, weight, found[path], stays, mask_of(model, path))
                put(twin.module, layer, fit)
                yield from _refitted(model.module, path, fit)
        yield from edits

    def _wanted(self, blocks: tuple[str, ...], free: Free) -> bool:
        names = [member.name for member in free.group.members]
        if any(all(n.startswith(f"{block}.") for n in names) for block in blocks):
            return False
        readers = [m.name.rpartition(".")[0] for m in free.group.members if m.summed]
        return all(matches(path, self.step.targets) for path in readers)


def _number(keep: int | list[int]) -> int:
    return keep if isinstance(keep, int) else len(keep)


def groups_of(unit: Unit) -> ChannelMap:
    """Groups of a block, paths relative to it, found on one short sample of its input."""
    if unit.stream is None or unit.index is None:
        return ChannelMap((), ())
    block = unit.model.module.get_submodule(unit.name)
    signature = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
    known: dict[Any, ChannelMap] = vars(unit.model).setdefault("_groups", {})
    if signature not in known:
        call = unit.stream.sample()
        if call.hidden.ndim == 3:
            # [batch, length, width] in most networks; [batch, channels, length] cannot be cut so.
            with contextlib.suppress(RuntimeError):
                known[signature] = _followed(block, call.first(batch=1, length=4))
        if signature not in known:
            known[signature] = _followed(block, call.samples(slice(1)))
    return known[signature]


def _followed(block: nn.Module, call: Call) -> ChannelMap:
    def run(one: nn.Module, dtype: torch.dtype) -> Tensor:
        given = call.double() if dtype == torch.float64 else call
        return given.run(one, given.hidden)

    return map_of(block, run)


def _placed(group: Units, path: str) -> Units:
    """The same group with its parameters' whole names."""
    return Units(tuple(
        Member(f"{path}.{m.name}", m.dim, m.summed, m.places) for m in group.members
    ))  # fmt: skip


def _fallen(step: Shrink, group: Units, used: str) -> list[Edit]:
    """What there is to say where a group has nothing for the criterion."""
    if used == step.criterion:
        return []
    why = f"no {step.criterion} here, units chosen by {used}"
    return [Edit("left", group.name.removesuffix(".weight"), None, why)]


def _edit(
    criterion: str, group: Units, first: Consumer, kept: list[int], left: Remaining,
    settings: list[Setting], error: float,
) -> Edit:  # fmt: skip
    what = "heads" if group.is_heads else "hidden units"
    how = "learned in training" if criterion == LEARNED else f"least important by {criterion}"
    slices = left.slices(group, kept)
    # By the first of them the report counts.
    slices.sort(key=lambda s: (s.path, s.dim) != (f"{first.path}.weight", 1))
    value: tuple[Slice | Setting, ...] = (*slices, *settings)
    return Edit(
        "slice", first.path, value,
        f"{group.count - len(kept)} of {group.count} {what}, {how}; "
        f"masked equals small within {error:.0e}",
        {"kept": float(len(kept)), "of": float(group.count)},
    )  # fmt: skip


def _refitted(module: nn.Module, path: str, fit: Fit) -> Iterator[Edit]:
    own: Tensor = module.get_submodule(path).weight  # type: ignore[assignment]
    why = "refitted to the kept inputs"
    yield Edit("weight", f"{path}.weight", fit.weight.reshape(own.shape), why)
    if fit.bias is not None:
        yield Edit("weight", f"{path}.bias", fit.bias, why)


def _proof(
    block: nn.Module, unit: Unit, group: Units, kept: list[int], settings: list[Setting]
) -> float:
    """Relative difference between the silenced block and the small one, on real input."""
    assert unit.stream is not None
    call = unit.stream.sample().double()
    twin = copy.deepcopy(block).double()
    # Exact arithmetic, whatever precision the caller works in: this is a proof.
    with torch.autocast(unit.model.device.type, enabled=False):
        return prove(twin, lambda b: call.run(b, call.hidden), [(group, kept)], settings)[0]


def _whole_proof(model: Model, group: Units, kept: list[int], settings: list[Setting]) -> float:
    twin = replace(model, module=copy.deepcopy(model.module).double())
    given = {n: x.double() if x.is_floating_point() else x for n, x in model.example.items()}

    def run(module: nn.Module) -> Tensor:
        with torch.no_grad():
            return twin.run(given)

    with torch.autocast(model.device.type, enabled=False):
        return prove(twin.module, run, [(group, kept)], settings)[0]
