"""Rotate: rotations that go into the weights, so that nothing is left to do at run time, exactly.

    residual stream   gains of the norms into what reads them, then all that writes and reads the
                      stream by one orthogonal Q (`penjing.residual`)
    heads             what makes the values of each head by Q, what reads them by its inverse
                      (`penjing.graph`); in every attention, also with shared keys and values

(SpinQuant, Liu et al., arXiv 2405.16406, R1 and R2; QuaRot, arXiv 2404.00456.) Outliers of single
channels are spread over all, which low bits and 8-bit inputs gain from. Both are proved by
running: what does not give the same is left as it was. What is left gives an edit `left` with the
reason; where nothing can be rotated the step refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Stream, Unit
from penjing.calls import Call
from penjing.edits import perform
from penjing.errors import InputError, UsageError
from penjing.model import Model
from penjing.norms import Gain, gain_of
from penjing.recipe import Edit
from penjing.residual import Residual, residual_streams
from penjing.rotation import Rotation, possible
from penjing.steps._neurons import Group
from penjing.steps._select import matches
from penjing.steps.shrink import groups_of

__all__ = ["Rotate"]

# Largest change of an output, relative to the largest output, that is rounding.
_ROUNDING = 1e-3
_PROOF = 1e-6


@dataclass(frozen=True)
class Rotate:
    """Fold rotations into weights.

    Attributes:
        stream: rotate the residual stream.
        heads: rotate the values of each attention head.
        untie: where the embedding table is the output layer's matrix too, give that its own copy,
            which stores the table twice: only one of them holds the gain of the last norm. Without
            it such a stream is left.
        seed: of the rotations.
        targets: globs of the paths of layers that may be changed; without any, all. A stream with
            a layer that may not be is left.
    """

    name: ClassVar[str] = "rotate"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()

    stream: bool = True
    heads: bool = True
    untie: bool = False
    seed: int = 0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.stream and not self.heads:
            raise UsageError("rotate", got="neither", allowed="stream, heads or both")
        if type(self.seed) is not int or self.seed < 0:
            raise UsageError("seed", got=self.seed, allowed="a whole number from 0")

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """New values of every weight that a rotation goes into, and what is left."""
        changes = _Changes(unit.model.copy())
        if self.stream:
            self._streams(changes)
        if self.heads:
            self._values(changes)
        if not changes.why:
            reasons = "; ".join(f"{e.path}: {e.why}" for e in changes.left[:4])
            raise InputError(
                "nothing in this network can be rotated", got=reasons or "no attention, no norm",
                next="quantize with rotate, which rotates at run time",
            )  # fmt: skip
        yield from changes.edits()

    def _streams(self, changes: _Changes) -> None:
        found = residual_streams(changes.model)
        if not found:
            changes.leave("", "no norm reads a residual stream")
        for stream in found:
            path = stream.norms[0].path if stream.norms else ""
            try:
                trial = self._turned(changes, stream)
                if not _same(changes.model, trial.model):
                    raise _LeftError("the rotated network gives other outputs")
            except _LeftError as error:
                changes.leave(path, f"its residual stream stays: {error}")
            else:
                changes.take(trial)

    def _turned(self, changes: _Changes, stream: Residual) -> _Changes:
        """The changes with a stream turned."""
        if stream.reason:
            raise _LeftError(stream.reason)
        if not possible(stream.width):
            raise _LeftError(f"no rotation of {stream.width} channels")
        gains = {norm.path: gain_of(changes.module(norm.path)) for norm in stream.norms}
        read = {path: gains[norm.path] for norm in stream.norms for path in norm.readers}
        read |= dict.fromkeys(stream.readers)
        trial = changes.copy()
        for path in dict.fromkeys([*stream.writers, *read]):
            self._check(trial, path)
        self._untie(trial, stream.writers, tuple(read))
        centred = any(gain is not None and gain.centred for gain in gains.values())
        turn = _Turn(Rotation(stream.width, self.seed), centred)
        for path, gain in gains.items():
            assert gain is not None  # it was found as a norm
            norm = trial.module(path)
            [weight, *biases] = [n for n, _ in norm.named_parameters()]
            trial.set(f"{path}.{weight}", gain.neutral, "its gain is in what reads it")
            for bias in biases:
                trial.set(f"{path}.{bias}", torch.zeros_like(gain.neutral), "moved likewise")
        for path, gain in read.items():
            _read(trial, path, gain, turn)
        for path in stream.writers:
            _write(trial, path, turn)
        return trial

    def _check(self, changes: _Changes, path: str) -> None:
        model, module = changes.model, changes.module(path)
        if not matches(path, self.targets):
            raise _LeftError(f"{path} is not among the targets")
        name = f"{path}.weight"
        for table, said in ((model.planes, "quantized"), (model.masks, "pruned")):
            parameters = [model.module.get_parameter(n) for n in table]
            if any(p is model.module.get_parameter(name) for p in parameters):
                raise _LeftError(f"{path} is {said} already: rotate first")
        if path in model.activations:
            raise _LeftError(f"{path} has 8-bit inputs already: rotate first")
        if getattr(module, "max_norm", None) is not None:
            raise _LeftError(f"{path} cuts its rows to a norm")

    def _untie(self, changes: _Changes, writers: tuple[str, ...], readers: tuple[str, ...]) -> None:
        used = {f"{path}.weight" for path in (*writers, *readers)}
        for group in changes.model.tied():
            if not used & set(group):
                continue
            heads = [n for n in group if n.removesuffix(".weight") in readers]
            if len(group) != 2 or len(heads) != 1 or not used >= set(group):
                raise _LeftError(f"{' and '.join(group)} are one tensor")
            count = changes.model.module.get_parameter(heads[0]).numel()
            if not self.untie:
                raise _LeftError(
                    f"{' and '.join(group)} are one tensor; untie = true stores it twice, "
                    f"{count:,} numbers more"
                )
            changes.untie(heads[0], f"its own copy, {count:,} numbers more")

    def _values(self, changes: _Changes) -> None:
        model = changes.model
        if not model.blocks:
            changes.leave("", "no repeated blocks, so no heads")
            return
        stream = Stream(model, [model.example])
        for index, block in enumerate(model.blocks):
            stream.enter(index)
            found = groups_of(Unit(block, model, {}, stream, index)).free
            known = [Group.of(free.group) for free in found if free.group.is_heads]
            groups = [group for group in known if group is not None]
            if not groups:
                changes.leave(block, "no heads with values of their own were found")
            for group in groups:
                try:
                    self._head(changes, block, group, stream.sample().double())
                except _LeftError as error:
                    changes.leave(f"{block}.{group.consumer}", f"its heads stay: {error}")

    def _head(self, changes: _Changes, block: str, group: Group, call: Call) -> None:
        """Turn the values of one attention: what a rotation passes through is proved."""
        consumer = f"{block}.{group.consumer}"
        self._check(changes, consumer)
        plain = copy.deepcopy(changes.module(block)).double()
        wanted = call.run(plain, call.hidden)
        for producer, units in group.producers.items():
            size = len(units[0])
            if len(group.units[0]) % size:
                continue
            if not possible(size):
                raise _LeftError(f"no rotation of {size} channels")
            turned = _turned_heads(plain, producer, group, units, Rotation(size, self.seed))
            twin = copy.deepcopy(plain)
            with torch.no_grad():
                for name, value in turned.items():
                    twin.get_parameter(name).copy_(value)
            off = (call.run(twin, call.hidden) - wanted).abs().max()
            if not off <= _PROOF * wanted.abs().max():
                continue
            self._check(changes, f"{block}.{producer}")
            shared = {f"{block}.{name}" for name in turned}
            if any(shared & set(names) for names in changes.model.tied()):
                raise _LeftError("it shares a weight")
            for name, value in turned.items():
                changes.set(f"{block}.{name}", value, "values of each head rotated")
            return
        raise _LeftError("a rotation passes through none of the layers that make them")


class _LeftError(Exception):
    """Why something stays as it is."""


@dataclass(frozen=True)
class _Turn:
    """Rows x [..., n] to x Q^T; with `centred` Q 1 = 1, by a reflection after the rotation."""

    basis: Rotation
    centred: bool

    def __call__(self, x: Tensor) -> Tensor:
        y = self.basis.apply(x.double())
        if self.centred:
            even = torch.full((self.basis.size,), self.basis.size**-0.5, dtype=torch.float64)
            off = self.basis.apply(even) - even
            if float(off.norm()) > 1e-12:
                off = off / off.norm()
                y = y - 2 * (y @ off).unsqueeze(-1) * off
        return y


@dataclass
class _Changes:
    """A network with new weights, and why each has changed."""

    model: Model
    why: dict[str, list[str]] = field(default_factory=dict)
    left: list[Edit] = field(default_factory=list)
    untied: list[Edit] = field(default_factory=list)

    def copy(self) -> _Changes:
        why = {name: list(said) for name, said in self.why.items()}
        return replace(self, model=self.model.copy(), why=why, untied=list(self.untied))

    def take(self, other: _Changes) -> None:
        self.model, self.why, self.untied = other.model, other.why, other.untied

    def module(self, path: str) -> nn.Module:
        return self.model.module.get_submodule(path)

    def leave(self, path: str, why: str) -> None:
        self.left.append(Edit("left", path, None, why))

    def untie(self, name: str, why: str) -> None:
        self.untied.append(Edit("untie", name, None, why))
        perform(self.model, self.untied[-1])

    def set(self, name: str, value: Tensor, why: str) -> None:
        parameter = self.model.module.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(value)
        self.why.setdefault(name, []).append(why)

    def edits(self) -> Iterator[Edit]:
        yield from self.untied
        for name, said in self.why.items():
            value = self.model.module.get_parameter(name).detach()
            yield Edit("weight", name, value, f"{' and '.join(said)}, exactly")
        yield from self.left


def _read(changes: _Changes, path: str, gain: Gain | None, turn: _Turn) -> None:
    layer = changes.module(path)
    weight: Tensor = layer.weight.detach().double()  # type: ignore[operator]
    if gain is not None and gain.bias is not None and bool(gain.bias.any()):
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        if bias is None:
            raise _LeftError(f"{path} has no bias that could hold that of the norm before it")
        moved = bias.detach().double() + weight @ gain.bias.double()
        changes.set(f"{path}.bias", moved, "holds the bias of the norm before it")
    if gain is not None:
        weight = weight * gain.gain.double()
    changes.set(f"{path}.weight", turn(weight), "inputs rotated")


def _write(changes: _Changes, path: str, turn: _Turn) -> None:
    layer = changes.module(path)
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    if isinstance(layer, nn.Embedding):
        changes.set(f"{path}.weight", turn(weight), "rows rotated")
        return
    changes.set(f"{path}.weight", turn(weight.T).T, "outputs rotated")
    if (bias := layer.bias) is not None:
        changes.set(f"{path}.bias", turn(bias.detach()), "outputs rotated")  # type: ignore[operator]


def _turned_heads(
    block: nn.Module,
    producer: str,
    group: Group,
    units: tuple[tuple[int, ...], ...],
    basis: Rotation,
) -> dict[str, Tensor]:
    """New parameters of a block by name, in the types that they have."""
    made = {n: p.detach().clone() for n, p in block.get_submodule(producer).named_parameters()}
    columns = block.get_parameter(f"{group.consumer}.weight").detach().clone()
    for channels, inputs in zip(units, group.units, strict=True):
        own = list(channels)
        for value in made.values():  # weight [out, in] and bias [out]
            value[own] = basis.apply(value[own].transpose(0, -1)).transpose(0, -1)
        # Several query heads may read one head of values.
        for start in range(0, len(inputs), len(own)):
            part = list(inputs[start : start + len(own)])
            columns[:, part] = basis.apply(columns[:, part])
    turned = {f"{producer}.{name}": value for name, value in made.items()}
    return turned | {f"{group.consumer}.weight": columns}


def _same(before: Model, after: Model) -> bool:
    """Whether two networks give the same on the example: what was found by running is proved so."""
    with torch.no_grad():
        was, now = before.run(before.example), after.run(before.example)
    return bool((now - was).abs().max() <= _ROUNDING * was.abs().max())
