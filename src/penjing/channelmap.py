"""All channels of a network that can leave it, each group proved, and why the others stay.

The network is run once on a short sample with random numbers in its parameters (see
`penjing.coupling.drawn`): which channels go together does not depend on the trained ones, and with
random ones every channel is heard in the proofs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from penjing.axisrules import follow
from penjing.coupling import Frozen, Member, Plan, Units, coupled, drawn
from penjing.model import Model
from penjing.proof import PROOF, Run, inside, prove, tensors_of
from penjing.recipe import Setting
from penjing.shapes import fresh, settings
from penjing.strips import Strips

__all__ = ["ChannelMap", "Free", "channel_map", "map_of"]

# Tokens of the sample: enough that no axis of it is as long as a small network's heads by chance.
_LENGTH = 7
# A parameter of more numbers (34 MB in float64) that is most of its network makes float32 do.
_WIDE = 1 << 22


@dataclass(frozen=True, eq=False)
class Free:
    """A group, and the attributes that count its units, with their values for half of them."""

    group: Units
    known: tuple[Setting, ...]

    def settings(self, kept: int) -> list[Setting]:
        """The attributes for another number of units."""
        half = len(_half(self.group))
        return [Setting(s.path, s.name, s.value * kept // half) for s in self.known]


@dataclass(frozen=True)
class ChannelMap:
    """What `channel_map` found.

    Attributes:
        free: groups whose units can leave, in the order of the parameters.
        frozen: every other axis of a parameter or buffer.
    """

    free: tuple[Free, ...]
    frozen: tuple[Frozen, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        groups = [
            {
                "name": one.group.name, "units": one.group.count, "heads": one.group.is_heads,
                "members": [
                    {"name": m.name, "axis": m.dim, "reads": m.summed, "places": m.places.tolist()}
                    for m in one.group.members
                ],
                "counts": [{"path": s.path, "name": s.name} for s in one.known],
            }
            for one in self.free
        ]  # fmt: skip
        frozen = [{"name": f.name, "axis": f.dim, "reason": f.reason} for f in self.frozen]
        return {"groups": groups, "frozen": frozen}


def channel_map(model: Model) -> ChannelMap:
    """Groups of a whole network; found once for the same shapes."""
    key = tuple((n, tuple(p.shape)) for n, p in model.module.named_parameters())
    known: dict[Any, ChannelMap] = vars(model).setdefault("_channels", {})
    if key not in known:
        example = {
            name: value[:, :_LENGTH] if model.tokenizer is not None and value.ndim > 1 else value
            for name, value in model.example.items()
        }

        def run(module: nn.Module, dtype: torch.dtype) -> Tensor:
            twin = _with(model, module)
            given = {n: x.to(dtype) if x.is_floating_point() else x for n, x in example.items()}
            return twin.run(given)

        known[key] = map_of(model.module, run)
    return known[key]


def _with(model: Model, module: nn.Module) -> Model:
    twin = Model(module, model.interface, model.example, model.source)
    twin.tokenizer = model.tokenizer
    return twin


def map_of(module: nn.Module, run: Callable[[nn.Module, torch.dtype], Any]) -> ChannelMap:
    """Groups of any module.

    Args:
        module: in evaluation mode; stays as it is.
        run: gives its outputs, with floating inputs of a dtype; all of them must stay.
    """
    with Strips():  # type: ignore[no-untyped-call]
        return _mapped(module, run)


def _mapped(module: nn.Module, run: Callable[[nn.Module, torch.dtype], Any]) -> ChannelMap:
    sizes = [p.numel() for p in module.parameters()]
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float64 and max(sizes, default=0) > max(_WIDE, sum(sizes) / 2):
            continue  # the copy would be larger than the network
        probe = _probe(module, dtype)

        def once(one: nn.Module, dtype: torch.dtype = dtype) -> Any:
            torch.manual_seed(0)
            with torch.no_grad():
                return run(fresh(one), dtype)

        try:
            axes, output = follow(probe, partial(once, probe))
        except (RuntimeError, NotImplementedError):
            if dtype == torch.float32:
                raise
            continue  # some kernels have no float64
        plain = tensors_of(output)
        if all(bool(torch.isfinite(x).all()) for x in plain):
            break  # some masks are no numbers in float64
    groups, frozen = coupled(axes)
    del axes
    most = PROOF if dtype == torch.float64 else 1e-3
    return _proved(probe, once, groups, frozen, most, plain)


def _probe(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    probe = drawn(module, dtype)
    for part in probe.modules():
        # One by one: the product of all experts at once is one operation that says nothing.
        config: Any = getattr(part, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    return probe


def _half(group: Units) -> list[int]:
    generator = torch.Generator().manual_seed(group.count)
    order = torch.randperm(group.count, generator=generator)
    return order[: max(1, group.count // 2)].sort().values.tolist()


def _proved(
    probe: nn.Module, run: Run, groups: Sequence[Units], frozen: list[Frozen], most: float,
    plain: list[Tensor],
) -> ChannelMap:  # fmt: skip
    """All at once first, with the usual attributes: where that holds, each of them does.

    Else group by group, each in the smallest module that has all of it.
    """
    free = [Free(g, tuple(_usual(probe, g))) for g in groups]
    if free and _together(probe, run, free, most, plain) > most:
        tried = _tried(probe, run, groups, most, plain)
        free = [one for one, _ in tried if one is not None]
        if free and _together(probe, run, free, most, plain) > most:
            # The rest of the network holds some of them in a way that was not seen there.
            tried = [_alone(probe, run, g, most, plain) for g in groups]
        free = [one for one, _ in tried if one is not None]
        refused = [(g, off) for g, (one, off) in zip(groups, tried, strict=True) if one is None]
        for joined in _alike([group for group, _ in refused]):
            one, _ = _alone(probe, run, joined, most, plain)
            if one is not None:
                free.append(one)
                refused = [(g, off) for g, off in refused if g.members[0] not in joined.members]
        for group, off in refused:
            frozen += _refused(group, off)
        while free and _together(probe, run, free, most, plain) > most:
            # Each alone, but not together: they hold each other in a way that was not seen.
            frozen += _refused(free.pop().group, float("inf"))
    return ChannelMap(tuple(free), tuple(frozen))


def _alike(groups: Sequence[Units]) -> list[Units]:
    """Of groups of as many units at the same modules one each, whose units leave all at once.

    The layers of a recurrent network have one width for all of them.
    """
    found: list[list[Units]] = []
    for group in groups:
        near = [some for some in found if any(_meet(group, other) for other in some)]
        joined = [other for some in near for other in some]
        found = [some for some in found if some not in near] + [[*joined, group]]
    return [Units(tuple(m for group in some for m in group.members))
            for some in found if len(some) > 1]  # fmt: skip


def _meet(one: Units, other: Units) -> bool:
    holders = [{m.name.rpartition(".")[0] for m in group.members} for group in (one, other)]
    return one.count == other.count and bool(holders[0] & holders[1])


def _usual(module: nn.Module, group: Units) -> list[Setting]:
    return next(settings(module, [m.name for m in group.members], group.count, len(_half(group))))


def _together(
    probe: nn.Module, run: Run, free: Sequence[Free], most: float, plain: list[Tensor] | None
) -> float:
    # Of every other group half of the half: groups that must lose alike are not two.
    kept = [half if number % 2 == 0 else half[: max(1, len(half) // 2)]
            for number, half in enumerate(_half(one.group) for one in free)]  # fmt: skip
    plans: list[Plan] = [(one.group, own) for one, own in zip(free, kept, strict=True)]
    known = [s for one, own in zip(free, kept, strict=True) for s in one.settings(len(own))]
    return prove(probe, run, plans, known, most, plain)[0]


_Tried = tuple[Free | None, float]


def _alone(
    probe: nn.Module, run: Run, group: Units, most: float, plain: list[Tensor] | None
) -> _Tried:
    off, known = prove(probe, run, [(group, _half(group))], None, most, plain)
    return (Free(group, tuple(known)) if off <= most else None), off


def _tried(
    probe: nn.Module, run: Run, groups: Sequence[Units], most: float, plain: list[Tensor]
) -> list[_Tried]:
    """Each group in the smallest module that has all of it and is called."""
    above = [_above(group) for group in groups]
    runs = inside(probe, run, list(dict.fromkeys(path for paths in above for path in paths)))
    places: dict[str, list[int]] = {}
    for number, paths in enumerate(above):
        places.setdefault(next((p for p in paths if p in runs), ""), []).append(number)
    runs = {path: own for path, own in runs.items() if path in places}
    made: dict[int, _Tried] = {}
    for path, numbers in places.items():
        own = probe.get_submodule(path)
        within, known = (runs.pop(path), None) if path else (run, plain)
        inner = [_relative(groups[n], path) for n in numbers]
        free = [Free(group, tuple(_usual(own, group))) for group in inner]
        found: list[_Tried] = [(one, 0.0) for one in free]
        if len(free) < 2 or _together(own, within, free, most, known) > most:
            found = [_alone(own, within, group, most, known) for group in inner]
        for n, (one, off) in zip(numbers, found, strict=True):
            if one is not None and path:
                known_there = tuple(
                    Setting(f"{path}.{s.path}".rstrip("."), s.name, s.value) for s in one.known
                )
                one = Free(groups[n], known_there)
            elif one is None and off < float("inf") and path:  # what it gives has them too
                one, off = _alone(probe, run, groups[n], most, plain)
            made[n] = one, off
    return [made[n] for n in range(len(groups))]


def _above(group: Units) -> list[str]:
    """Paths of the modules that have all of it, but for the whole, the smallest first."""
    names = [member.name.split(".")[:-1] for member in group.members]
    count = next((n for n, own in enumerate(zip(*names, strict=False)) if len(set(own)) > 1),
                 min(map(len, names)))  # fmt: skip
    return [".".join(names[0][:n]) for n in range(count, 0, -1)]


def _relative(group: Units, path: str) -> Units:
    return Units(tuple(
        Member(m.name.removeprefix(f"{path}."), m.dim, m.summed, m.places) for m in group.members
    ))  # fmt: skip


def _refused(group: Units, off: float) -> list[Frozen]:
    why = "the network does not run without some of them: its code holds their number"
    if off < float("inf"):
        why = f"without them it gives something else than with their weights at zero ({off:.0e})"
    return [Frozen(member.name, member.dim, why) for member in group.members]
