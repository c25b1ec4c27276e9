"""Structure: a student's architecture derived from its teacher's, under a budget.

    minimise    sum over blocks of the harm of what becomes of each
    subject to  sum over blocks of what each costs <= limit

solved as an integer program (Puzzle, Bercovich et al., arXiv 2411.19146, section 2). What can
become of a block is a library of closed forms: every group of units in it whole, at three quarters,
half or a quarter (`shrink`, with its refit), or the whole block gone (`cut`, with its linear
patch). The harm of each alone is measured, as the divergence of the network's outputs; groups of
one block, and blocks, are taken as additive. Units that several blocks share are a block of their
own.

What comes out is counted or timed as a whole, and the limit moved until it meets the budget.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from penjing.apply import apply
from penjing.channelmap import Free, channel_map
from penjing.divergence import divergence
from penjing.errors import InputError, UsageError
from penjing.export import export
from penjing.fit.solve import Constraint, solve
from penjing.measure import Candidate, measure_files, median_ratio
from penjing.model import Batch, Model
from penjing.progress import track
from penjing.recipe import Edit, Recipe
from penjing.steps._ladder import COSTS, Forms
from penjing.steps.cut import Cut
from penjing.steps.shrink import Shrink

__all__ = ["OF", "Derived", "derive"]

OF = ("latency", "macs", "parameters")

_SHARES = (0.75, 0.5, 0.25)
_MOST = 5  # networks that are counted or timed
_RUNTIME, _FILE = "onnxruntime", "model.onnx"


@dataclass(frozen=True)
class Option:
    """What can become of a block.

    Attributes:
        kept: units that stay, by group; others stay whole.
        gone: the block leaves.
        harm: divergence of the outputs.
        cost: multiply-adds, or parameters, over the whole network's: of what leaves, negative.
    """

    kept: tuple[tuple[str, int], ...] = ()
    gone: bool = False
    harm: float = 0.0
    cost: float = 0.0


@dataclass(frozen=True)
class Derived:
    """A student.

    Attributes:
        share: of the teacher's cost, as counted or measured.
        why: what became of the blocks.
    """

    model: Model
    share: float
    why: str


def derive(
    teacher: Model, batches: Sequence[Batch], share: float, of: str = "latency", *,
    length: int = 128, threads: int | None = None, seed: int = 0,
) -> Derived:  # fmt: skip
    """The student with the least harm that costs no more than a share of its teacher.

    Args:
        batches: calibration data; the library is made and judged on them.
        share: 0 to 1.
        of: `latency` in onnxruntime (batch 1), `macs` or `parameters`.
        length: tokens of a text whose latency is measured.

    Raises:
        UsageError: a share or measure that there is not.
        InputError: no choice costs so little.
    """
    if of not in OF:
        raise UsageError("of", got=of, allowed=", ".join(OF))
    if not 0 < share < 1:
        raise UsageError("share", got=share, allowed="0 < share < 1")
    if not batches:
        raise UsageError("structure needs data", next="give --data")
    library = _library(teacher, batches, "parameters" if of == "parameters" else "macs")
    if of == "latency":
        cores = threads or torch.get_num_threads()

        def cost(student: Model) -> float:
            return _latency(student, teacher, length, cores)
    else:

        def cost(student: Model) -> float:
            return COSTS[of](student) / COSTS[of](teacher)

    return _search(teacher, batches, library, share, cost, seed)


def _search(
    teacher: Model, batches: Sequence[Batch], library: Mapping[str, list[Option]], share: float,
    cost: Callable[[Model], float], seed: int,
) -> Derived:  # fmt: skip
    """The limit of the program moves by what the last network cost over what was asked for."""
    limit, best = share, None
    for _ in range(_MOST):
        chosen = solve(
            [[o.harm for o in options] for options in library.values()],
            {"cost": Constraint([[o.cost for o in own] for own in library.values()], limit - 1)},
        )
        if chosen is None:
            break
        picked = {name: library[name][n] for name, n in zip(library, chosen, strict=True)}
        student = _made(teacher, batches, picked, seed)
        found = cost(student)
        if found <= share and (best is None or found > best.share):
            best = Derived(student, found, _said(picked, found))
        if share - 0.03 <= found <= share:
            break
        limit = min(limit * share / found * (0.99 if found > share else 1.0), 1.0)
    if best is None:
        raise InputError(
            f"no student of {share:.0%} can be derived",
            got=f"at least {1 + sum(min(o.cost for o in own) for own in library.values()):.0%}",
            next="ask for more, or quantize what comes out",
        )  # fmt: skip
    return best


def _library(teacher: Model, batches: Sequence[Batch], counted: str) -> dict[str, list[Option]]:
    """Options of each block, and of each group that no block has for itself."""
    free = channel_map(teacher).free
    forms, judge = Forms(teacher, free), _Judge(teacher, batches)
    inside = {b: [f for f in free if _within(f, b)] for b in teacher.blocks}
    owned = {f.group.name for groups in inside.values() for f in groups}
    units = inside | {f.group.name: [f] for f in free if f.group.name not in owned}
    whole = COSTS[counted](teacher)
    library = {}
    for name, groups in track(list(units.items()), "variants"):
        each = [[Option(), *_narrower(f, forms, judge, counted)] for f in groups]
        options = [_joined(parts) for parts in itertools.product(*each)]
        if name in inside and _can_go(teacher, name):
            left = _cut(teacher, name)
            saved = COSTS[counted](left) / whole - 1
            step = Cut(blocks=(name,))
            options.append(Option((), True, judge(Recipe((step,))), saved))
        library[name] = options
    return library


def _within(free: Free, block: str) -> bool:
    return all(member.name.startswith(f"{block}.") for member in free.group.members)


def _narrower(free: Free, forms: Forms, judge: _Judge, counted: str) -> list[Option]:
    made = []
    group = free.group
    for count in dict.fromkeys(max(1, round(group.count * share)) for share in _SHARES):
        if count < group.count:
            kept = {group.name: count}
            harm = judge(Recipe((Shrink(kept=kept),)))
            saved = forms.share(kept, counted) - 1
            made.append(Option(((group.name, count),), False, harm, saved))
    return made


def _joined(parts: Sequence[Option]) -> Option:
    kept = tuple(pair for part in parts for pair in part.kept)
    return Option(kept, False, sum(p.harm for p in parts), sum(p.cost for p in parts))


def _can_go(model: Model, block: str) -> bool:
    """Whether it can be cut and the network runs on, of the same shape."""
    try:
        with torch.no_grad():
            _cut(model, block).run(model.example)
    except (InputError, RuntimeError):
        return False
    return True


def _cut(model: Model, block: str) -> Model:
    from penjing.edits import perform

    twin = model.copy(shared=True)
    perform(twin, Edit("drop", block, None, ""))
    return twin


class _Judge:
    """Divergence of what a recipe makes of the teacher."""

    def __init__(self, teacher: Model, batches: Sequence[Batch]) -> None:
        self.teacher, self.batches = teacher, batches
        self._wanted = self._outputs(teacher)

    def _outputs(self, model: Model) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model.run(batch) for batch in self.batches]

    def __call__(self, recipe: Recipe) -> float:
        made = apply(self.teacher, recipe, self.batches).model
        return divergence(self.teacher.interface, self.batches, self._wanted, self._outputs(made))


def _made(
    teacher: Model, batches: Sequence[Batch], picked: Mapping[str, Option], seed: int
) -> Model:
    """Units first, while blocks have the teacher's numbers."""
    kept = dict(pair for option in picked.values() for pair in option.kept)
    gone = tuple(name for name, option in picked.items() if option.gone)
    steps = (*((Shrink(kept=kept),) if kept else ()), *((Cut(blocks=gone),) if gone else ()))
    recipe = Recipe(steps, seed)
    made = apply(teacher, recipe, batches).model
    made.recipe = recipe
    return made


def _latency(student: Model, teacher: Model, length: int, threads: int) -> float:
    """Over the teacher's, both exported and timed in turn."""
    with tempfile.TemporaryDirectory(prefix="penjing.") as place:
        files = []
        for name, model in (("teacher", teacher), ("student", student)):
            folder = Path(place) / name
            folder.mkdir()
            export(model, folder, ("onnx",))
            files.append(Candidate(folder / _FILE, _RUNTIME, model.parameter_count))
        was, now = measure_files(files, teacher, length=length, threads=threads, runs=300,
                                 seconds=6.0)  # fmt: skip
    return 1 / median_ratio(was, now)


def _said(picked: Mapping[str, Option], share: float) -> str:
    gone = sum(option.gone for option in picked.values())
    narrow = sum(bool(option.kept) for option in picked.values())
    return f"structure: {gone} blocks cut, {narrow} narrowed, {share:.1%} of the teacher's cost"
