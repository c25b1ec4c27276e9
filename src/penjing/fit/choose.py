"""Choose candidates: for each depth of the ladder and each share of error, the cheapest choice.

Every choice comes out of the integer program with the predicted figures of `Predictor`. The
list is ordered from the one that promises most to the safest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

from penjing.fit.budget import Budget
from penjing.fit.predict import Prediction, Predictor
from penjing.fit.solve import Constraint, solve
from penjing.fit.space import TABLES, Choice
from penjing.fit.units import HEADS, WIDTHS

__all__ = ["candidates", "uniform"]

# Allowed error outside the cuts, as shares of all that could be spent.
_SHARES = (1.0, 0.5, 0.2, 0.05)
# What distillation can be hoped to win back.
_HOPE = 1.25


def uniform(predictor: Predictor, name: str, table: str) -> Choice:
    """Every block kept, one format everywhere."""
    count = len(predictor.model.blocks)
    return Choice((), (1.0,) * count, (name,) * count, table, name)


def candidates(
    predictor: Predictor, budget: Budget, formats: Sequence[str]
) -> list[tuple[Choice, Prediction]]:
    """Choices that may meet the budget, most promising first; the nearest ones where none may."""
    found: dict[Choice, Prediction] = {}
    ladder: list[tuple[int, ...]] = [(), *(tuple(d.cut) for d in predictor.survey.ladder)]
    for cut in ladder:
        for choice in _at_depth(predictor, budget, formats, cut):
            found[choice] = predictor(choice)
    size = max(p.size for p in found.values())
    latency = max(p.latency for p in found.values())

    def excess(said: Prediction) -> float:
        over = [0.0]
        if budget.max_size is not None:
            over.append(said.size / budget.max_size - 1)
        if budget.max_latency is not None:
            over.append(said.latency / budget.max_latency - 1)
        if budget.max_drop is not None:
            over.append(said.drop / max(_HOPE * budget.max_drop, 1e-9) - 1)
        return max(over)

    def promise(item: tuple[Choice, Prediction]) -> tuple[float, float]:
        said = item[1]
        gain = said.size / size + said.latency / latency
        # Without a bar for quality it comes first, among what fits.
        return (max(0.0, excess(said)), gain if budget.max_drop is not None else said.error)

    ordered = sorted(found.items(), key=promise)
    fitting = [item for item in ordered if excess(item[1]) <= 0]
    return fitting or ordered[:4]


def _at_depth(
    predictor: Predictor, budget: Budget, formats: Sequence[str], cut: tuple[int, ...]
) -> list[Choice]:
    blocks = range(len(predictor.model.blocks))
    kept = [i for i in blocks if i not in cut]
    # What broke the network in the survey has an infinite error; float32 never does.
    every = list(itertools.product(WIDTHS, formats, HEADS))
    options = [
        [o for o in every if math.isfinite(predictor.block_error(i, *o))] or [(1.0, "fp32", 1.0)]
        for i in kept
    ]
    found_tables = predictor.survey.tables
    tables = [t for t in TABLES if t == "fp32" or math.isfinite(found_tables.get(t, math.inf))]
    if predictor.tied and len(tables) > 1 and "fp32" not in formats:
        tables.remove("fp32")  # the head would set the table's format
    rests = [f for f in formats if math.isfinite(predictor.survey.rest.get(f, 0.0))] or ["fp32"]
    whole = predictor(uniform(predictor, formats[0], "fp32"))
    scale = predictor.corrections

    def by_block(figure: Callable[..., float]) -> list[list[float]]:
        return [[figure(i, *o) for o in own] for i, own in zip(kept, options, strict=True)]

    sizes = by_block(predictor.block_size)
    sizes += [[predictor.table_size(t) for t in tables], [predictor.rest_size(f) for f in rests]]
    times = by_block(predictor.block_latency)
    times += [[0.0] * len(tables), [predictor.rest_latency(f) for f in rests]]
    errors = by_block(partial(predictor.block_error, remains=predictor.remains))
    errors += [[predictor.survey.tables.get(t, 0.0) for t in tables]]
    errors += [[predictor.rest_error(f, tables[-1]) for f in rests]]
    costs = [
        [
            s * scale["size"] / whole.size + t * scale["latency"] / whole.latency
            for s, t in zip(a, b, strict=True)
        ]
        for a, b in zip(sizes, times, strict=True)
    ]
    limits = {}
    if budget.max_size is not None:
        limits["size"] = Constraint(sizes, budget.max_size / scale["size"])
    if budget.max_latency is not None:
        limits["latency"] = Constraint(times, budget.max_latency / scale["latency"])
    spend = sum(max(e) for e in errors)
    if budget.max_drop is not None and predictor.slope:
        left = _HOPE * budget.max_drop - predictor.drop_of(cut)
        spend = min(spend, max(0.0, left) / predictor.slope)
    found = []
    # Without a bar for quality the least error within the limits is one of the answers.
    for share in (*_SHARES, *([0.0] if budget.max_drop is None else [])):
        rules = limits | {"error": Constraint(errors, share * spend)}
        chosen = solve(costs, rules) or solve(errors, limits) or solve(costs, {})
        assert chosen is not None  # one option a unit always exists
        widths, names, heads = [1.0] * len(blocks), [formats[0]] * len(blocks), [1.0] * len(blocks)
        for i, own, option in zip(kept, options, chosen, strict=False):
            widths[i], names[i], heads[i] = own[option]
        table, rest = tables[chosen[-2]], rests[chosen[-1]]
        found.append(Choice(cut, tuple(widths), tuple(names), table, rest, tuple(heads)))
    return list(dict.fromkeys(found))
