"""Structure: a student's architecture derived from its teacher's, under a budget.

    minimise    sum over blocks of the harm of what becomes of each
    subject to  sum over blocks of what each costs <= limit

solved as an integer program (Puzzle, Bercovich et al., arXiv 2411.19146, section 2), over the
library of `penjing.transferring.library`. Costs are counted, or measured in the runtime once for
every shape of a block. Harms of cut blocks do not add up, so the program is solved for every number
of them; what comes out is counted or timed as a whole, the limit moved until it meets the budget,
made, and judged as a whole on samples that nothing was fitted to. The least harm wins.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from penjing.apply import apply
from penjing.divergence import divergence
from penjing.errors import InputError, UsageError
from penjing.export import export
from penjing.fit.solve import Constraint, solve
from penjing.measure import Candidate, measure_files, median_ratio
from penjing.model import Batch, Model
from penjing.steps._ladder import COSTS
from penjing.steps._trials import judges
from penjing.training import held_out
from penjing.transferring.forms import BLOCK, Forms, Option, Picked
from penjing.transferring.library import library

__all__ = ["OF", "Derived", "derive"]

OF = ("latency", "macs", "parameters")

# Networks of a number of blocks that are counted or timed until one meets the budget, and how much
# less one may cost than what was added up and not be tried again.
_MOST, _NEAR = 4, 0.02
# Networks that are made and judged.
_FINALISTS = 3
_RUNTIME, _FILE = "onnxruntime", "model.onnx"
# That two files are timed.
_SECONDS = 4.0

Measure = Callable[[Model], float]


@dataclass(frozen=True)
class Derived:
    """A student.

    Attributes:
        share: of the teacher's cost, counted or measured again; latencies vary by a percent or two.
        harm: divergence of its outputs from the teacher's, on samples it was not fitted to.
        why: what became of the blocks.
    """

    model: Model
    share: float
    harm: float
    why: str


def derive(
    teacher: Model, batches: Sequence[Batch], share: float, of: str = "latency", *,
    length: int = 128, threads: int | None = None, seed: int = 0,
) -> Derived:  # fmt: skip
    """The student with the least harm that costs no more than a share of its teacher.

    Args:
        batches: calibration data; an eighth of them is not fitted to but judged on.
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
    fit, held = held_out(batches)
    held = held or fit
    if teacher.interface == "causal":  # every token is judged: few samples are enough
        held = judges(teacher, held)
    with _measure(teacher, of, length, threads or torch.get_num_threads()) as measure:
        forms = Forms(teacher, fit[0], measure)
        options = library(teacher, forms, fit, held)
        found = sorted(_choices(options, forms, share), key=lambda one: one[2])
        if not found:
            raise InputError(
                f"no student of {share:.0%} can be derived",
                got=f"at least {1 + sum(min(o.cost for o in own) for own in options.values()):.0%}",
                next="ask for more, or quantize what comes out",
            )  # fmt: skip
        made = []
        for picked, _, _ in found[:_FINALISTS]:
            recipe = forms.recipe(picked, seed)
            model = apply(teacher, recipe, fit).model
            model.recipe = recipe
            made.append((_harm(model, teacher, held), model, picked))
        harm, model, picked = min(made, key=lambda one: one[0])
        cost = measure(model)
        return Derived(model, cost, harm, f"{_said(picked)}, {cost:.1%} of the teacher's {of}")


def _choices(
    options: Mapping[str, list[Option]], forms: Forms, share: float
) -> Iterator[tuple[Picked, float, float]]:
    """For every number of blocks that go the best choice, its cost and its harm."""
    harms, costs = ([[getattr(o, what) for o in own] for own in options.values()]
                    for what in ("harm", "cost"))  # fmt: skip
    gone = [[float(BLOCK in o.gone) for o in own] for own in options.values()]
    scale = 1.0  # what networks cost as a whole, over what was added up
    for count in range(1 + sum(max(own) > 0 for own in gone)):
        best: tuple[Picked, float, float] | None = None
        for _ in range(_MOST):
            rules = {
                "cost": Constraint(costs, share / scale - 1), "most": Constraint(gone, count),
                "least": Constraint([[-x for x in own] for own in gone], -count),
            }  # fmt: skip
            chosen = solve(harms, rules | _one_stays(list(options), gone))
            if chosen is None:
                break
            picked = {name: options[name][n] for name, n in zip(options, chosen, strict=True)}
            cost = forms.measure(forms.form(picked))
            found = cost / (1 + sum(option.cost for option in picked.values()))
            harm = sum(option.harm for option in picked.values())
            fits = cost <= share
            if fits and (best is None or harm < best[2]):
                best = picked, cost, harm
            if fits and found > scale - _NEAR:  # a looser limit would let nothing more in
                break
            scale = found if fits else max(found, 1.01 * scale)
        if best is not None:
            yield best


def _one_stays(names: Sequence[str], gone: Sequence[Sequence[float]]) -> dict[str, Constraint]:
    """Of the blocks of every list."""
    lists: dict[str, list[bool]] = {}
    for name, own in zip(names, gone, strict=True):
        if max(own) > 0:
            place = name.rpartition(".")[0]
            lists[place] = [other.rpartition(".")[0] == place for other in names]
    return {
        f"in {place}": Constraint([[x * inside for x in own] for own, inside in
                                   zip(gone, these, strict=True)], sum(these) - 1)
        for place, these in lists.items()
    }  # fmt: skip


def _harm(model: Model, teacher: Model, held: Sequence[Batch]) -> float:
    with torch.no_grad():
        wanted, outputs = ([one.run(batch) for batch in held] for one in (teacher, model))
    return divergence(teacher.interface, held, wanted, outputs)


@contextmanager
def _measure(teacher: Model, of: str, length: int, threads: int) -> Iterator[Measure]:
    """What a network costs, over its teacher."""
    if of != "latency":
        whole = COSTS[of](teacher)
        yield lambda model: COSTS[of](model) / whole
        return
    with tempfile.TemporaryDirectory(prefix="penjing.") as folder:
        first = _exported(teacher, Path(folder) / "teacher")
        yield partial(_latency, first, teacher, Path(folder), length, threads)


def _latency(
    first: Candidate, teacher: Model, folder: Path, length: int, threads: int, model: Model
) -> float:
    """Over the teacher's, both timed in turn."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        files = [first, _exported(model, Path(own))]
        was, now = measure_files(files, teacher, length=length, threads=threads, runs=300,
                                 seconds=_SECONDS)  # fmt: skip
    return 1 / median_ratio(was, now)


def _exported(model: Model, folder: Path) -> Candidate:
    folder.mkdir(exist_ok=True)
    export(model, folder, ("onnx",))
    return Candidate(folder / _FILE, _RUNTIME, model.parameter_count)


def _said(picked: Picked) -> str:
    gone = [option.gone for option in picked.values()]
    narrow = sum(bool(option.kept) for option in picked.values())
    halves = "".join(f", {n} without {part}" for part in ("attention", "mlp")
                     if (n := sum(part in own for own in gone)))  # fmt: skip
    cut = sum(BLOCK in own for own in gone)
    return f"structure: {cut} blocks cut{halves}, {narrow} narrowed"
