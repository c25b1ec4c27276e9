"""All channels of a network that can leave it, each group proved, and why the others stay.

The network is run once on a short sample with random numbers in its parameters (see
`penjing.coupling.drawn`): which channels go together does not depend on the trained ones, and with
random ones every channel is heard in the proofs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from penjing.axisrules import follow
from penjing.coupling import PROOF, Frozen, Plan, Units, coupled, drawn, prove
from penjing.model import Model
from penjing.recipe import Setting
from penjing.shapes import fresh, settings

__all__ = ["ChannelMap", "Free", "channel_map", "map_of"]

# Tokens of the sample: enough that no axis of it is as long as a small network's heads by chance.
_LENGTH = 7


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
    dtype = torch.float64
    probe = _probe(module, dtype)
    try:
        with torch.no_grad():
            sound = all(bool(torch.isfinite(x).all()) for x in tree_leaves(run(probe, dtype))
                        if isinstance(x, Tensor))  # fmt: skip
    except (RuntimeError, NotImplementedError):
        sound = False
    if not sound:  # some kernels have no float64, and some masks are no numbers there
        dtype = torch.float32
        probe = _probe(module, dtype)

    def once(one: nn.Module) -> Any:
        torch.manual_seed(0)
        with torch.no_grad():
            return run(fresh(one), dtype)

    most = PROOF if dtype == torch.float64 else 1e-3
    axes = follow(probe, lambda: once(probe))
    groups, frozen = coupled(axes)
    return _proved(probe, once, groups, frozen, most)


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
    probe: nn.Module, run: Callable[[nn.Module], Any], groups: Sequence[Units],
    frozen: list[Frozen], most: float,
) -> ChannelMap:  # fmt: skip
    """All at once first, with the usual attributes: where that holds, each of them does."""
    plans: list[Plan] = [(group, _half(group)) for group in groups]
    usual = [next(settings(probe, [m.name for m in g.members], g.count, len(set(kept))))
             for g, kept in plans]  # fmt: skip
    if plans and prove(probe, run, plans, [s for own in usual for s in own], most)[0] <= most:
        return ChannelMap(
            tuple(Free(g, tuple(own)) for g, own in zip(groups, usual, strict=True)), tuple(frozen)
        )
    free: list[Free] = []
    for plan in plans:
        off, known = prove(probe, run, [plan], None, most)
        if off <= most:
            free.append(Free(plan[0], tuple(known)))
        else:
            frozen += _refused(plan[0], off)
    while free:
        together = [(one.group, _half(one.group)) for one in free]
        if prove(probe, run, together, [s for one in free for s in one.known], most)[0] <= most:
            break
        # Each alone, but not together: they hold each other in a way that was not seen.
        frozen += _refused(free.pop().group, float("inf"))
    return ChannelMap(tuple(free), tuple(frozen))


def _refused(group: Units, off: float) -> list[Frozen]:
    why = "the network does not run without some of them: its code holds their number"
    if off < float("inf"):
        why = f"without them it gives something else than with their weights at zero ({off:.0e})"
    return [Frozen(member.name, member.dim, why) for member in group.members]
