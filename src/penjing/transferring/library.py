"""What can become of each part of a teacher: a library of closed forms, the harm of each alone.

    a group of units   whole, or at three quarters, half or a quarter, what reads it refitted
    half a block       its attention, or its MLP, gone
    a block            gone, a linear patch in its place

The harm is the divergence of the network's outputs (`penjing.divergence`) on samples that nothing
was fitted to. Groups and halves of one block are taken as additive; units that several blocks share
are a part of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from penjing.calibrate import Stream
from penjing.gradients import slopes
from penjing.model import Batch, Model
from penjing.progress import track
from penjing.steps._halves import Half
from penjing.steps._importance import needs_of
from penjing.steps._mend import Patches
from penjing.steps._neurons import collect
from penjing.steps._ranking import Group, Probe, bundles, groups_for
from penjing.steps._trials import Piece, Trials
from penjing.steps.cut import Cut
from penjing.steps.shrink import Shrink
from penjing.transferring.forms import BLOCK, Forms, Option

__all__ = ["library"]

_SHARES = (0.75, 0.5, 0.25)
_STEP = Shrink(0.5)


def library(
    teacher: Model, forms: Forms, fit: Sequence[Batch], held: Sequence[Batch]
) -> dict[str, list[Option]]:
    """Options of each block, and of each group that no block has for itself.

    Args:
        forms: of the teacher; says what options cost.
        fit: what options are fitted to.
        held: what they are judged on.
    """
    groups = groups_for(teacher, _STEP)
    narrow = _narrower(teacher, groups, fit, held)
    silent, gone = _silent(teacher, forms, held), _gone(teacher, forms, fit, held)
    found: dict[str, list[Option]] = {}
    for block in track(teacher.blocks, "costs"):
        inside = [g for g in groups if _within(g, block)]
        factors = []
        for name, half in forms.halves[block].items():
            own = [g for g in inside if _of_half(g, block, half)]
            inside = [g for g in inside if g not in own]
            widths = [[forms.priced(block, o) for o in narrow.pop(g.units.name)] for g in own]
            left = forms.priced(block, Option((), (name,), silent[block, name]))
            factors.append([*_products(widths), left])
        factors += [[forms.priced(block, o) for o in narrow.pop(g.units.name)] for g in inside]
        found[block] = [*_products(factors)]
        if block in gone:
            found[block].append(forms.priced(block, Option((), (BLOCK,), gone[block])))
    return found | {
        name: [forms.priced(name, option) for option in own] for name, own in narrow.items()
    }


def _narrower(
    teacher: Model, groups: list[Group], fit: Sequence[Batch], held: Sequence[Batch]
) -> dict[str, list[Option]]:
    """Of each group the whole, and fewer units."""
    found = {group.units.name: [Option()] for group in groups}
    if not groups:
        return found
    needs = needs_of(_STEP.criterion) | {"gram"}
    about = {one.path for group in groups for one in group.readers}
    stream = Stream(teacher, fit, slopes(teacher, fit, needs, about))
    probe = Probe(teacher, _STEP, held)
    for some in bundles(teacher, groups):
        paths = {r.path: teacher.module.get_submodule(r.path) for g in some for r in g.readers}
        stats = collect(stream, paths, needs)
        for group in track(some, "variants"):
            if any(stats[one.path].gram is None for one in group.readers):  # never run
                continue
            name, count = group.units.name, group.units.count
            for keep in dict.fromkeys(max(1, round(count * share)) for share in _SHARES):
                if keep < count:
                    harm = probe.divergence(group, stats, keep)
                    found[name].append(Option(((name, keep),), (), harm))
    return found


def _silent(teacher: Model, forms: Forms, held: Sequence[Batch]) -> dict[tuple[str, str], float]:
    """The harm of a half that is gone, by block and half."""
    ends = {Piece(i, name): f"{block}.{half.writer.path}"
            for i, block in enumerate(teacher.blocks)
            for name, half in forms.halves[block].items()}  # fmt: skip
    if not ends:
        return {}
    trials = Trials(teacher, held, lambda *_: None, ends=ends)
    return {
        (teacher.blocks[piece.block], piece.part): trials(frozenset({piece}))
        for piece in track(list(ends), "without halves")
    }


def _gone(
    teacher: Model, forms: Forms, fit: Sequence[Batch], held: Sequence[Batch]
) -> dict[str, float]:
    """The harm of a block that is gone, where it can be."""
    if len(teacher.blocks) < 2:
        return {}
    trials = Trials(teacher, held, Patches(teacher, fit, Cut.strength))
    return {
        teacher.blocks[piece.block]: trials(frozenset({piece}))
        for piece in track(trials.able, "without blocks")
        if forms.works({teacher.blocks[piece.block]: Option((), (BLOCK,))})
    }


def _within(group: Group, path: str) -> bool:
    return all(member.name.startswith(f"{path}.") for member in group.units.members)


def _of_half(group: Group, block: str, half: Half) -> bool:
    """Whether the units go with a half: all their parameters are of its layers."""
    places = [f"{block}.{path}." for path, _ in half.parts]
    return all(m.name.startswith(tuple(places)) for m in group.units.members)


def _products(factors: Iterable[list[Option]]) -> list[Option]:
    """One of each, in all ways."""
    return [sum(parts, Option()) for parts in itertools.product(*factors)]
