"""Explain: what each part of the network costs, and what kept a result from being smaller.

Sensitivities are the survey's, one measured run of the network each. What limited a result is read
off its budget, off the shares of its predicted size and latency, and off the next cheaper choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from penjing.fit.budget import Budget
from penjing.fit.outcome import Made
from penjing.fit.predict import Predictor
from penjing.fit.survey import Survey
from penjing.units import format_size, format_time

__all__ = ["bounds", "sensitivity"]

# A limit is said to bind when so much of it is used.
_USED = 0.8
# A part of the network is named when it has so much of the size or of the latency.
_LARGE = 0.4


def sensitivity(blocks: Sequence[str], found: Survey) -> dict[str, dict[str, float]]:
    """Error of the outputs by part of the network and by what was done to it alone.

    Args:
        blocks: paths.
        found: where an option was not measured it is not there.
    """
    table: dict[str, dict[str, float]] = {}

    def put(part: str, option: str, error: float | None) -> None:
        if error is not None and math.isfinite(error):
            table.setdefault(part, {})[option] = error

    for name, error in found.tables.items():
        put("embeddings", f"{name[1:]} bits", error)
    for index, block in enumerate(blocks):
        key = str(index)
        put(block, "cut", found.cuts.get(key))
        put(block, "half of the hidden units", found.widths.get(key))
        put(block, "half of the heads", found.heads.get(key))
        for name, own in found.formats.items():
            put(block, name, own.get(key))
    for name, error in found.rest.items():
        put("outside the blocks", name, error)
    return table


def bounds(
    best: Made, budget: Budget, predictor: Predictor, others: Sequence[Made] = (), metric: str = ""
) -> Iterator[str]:
    """Sentences: what binds, what takes most of size and latency, and what was tried beyond.

    Args:
        best: the artifact that was kept.
        others: measured candidates that were not kept.
        metric: name of what dropped.
    """
    now, drop = best.trial.measured, best.trial.drop
    used = {
        "size": (now.size_bytes, budget.max_size),
        "latency": (now.latency_ms.median / 1e3, budget.max_latency),
        "memory": (now.peak_memory_bytes, budget.max_memory),
        "the drop": (max(0.0, drop.value) if drop else 0.0, budget.max_drop),
    }
    for name, (value, limit) in used.items():
        if limit and value >= _USED * limit:
            yield f"{name} binds: {value / limit:.0%} of what was asked is used"
    choice = best.choice
    kept = [i for i in range(len(choice.widths)) if i not in choice.cut]
    parts = [(i, choice.widths[i], choice.formats[i], choice.size(i)[1]) for i in kept]
    sizes = {
        "the embedding tables": predictor.table_size(choice.table, choice.rest),
        "the blocks": sum(predictor.block_size(*p) for p in parts),
        "what is outside the blocks": predictor.rest_size(choice.rest),
    }
    seconds = {
        "the blocks": sum(predictor.block_latency(*p) for p in parts),
        "what is outside the blocks": predictor.rest_latency(choice.rest),
    }
    for what, table, show, advice in (
        ("size", sizes, format_size, {
            "the embedding tables": "fewer bits of the blocks will hardly help",
            "what is outside the blocks": "cutting and narrowing blocks will hardly help",
        }),
        ("latency", seconds, format_time, {
            "what is outside the blocks": "cutting and narrowing blocks will hardly help",
        }),
    ):  # fmt: skip
        total = sum(table.values())
        name, most = max(table.items(), key=lambda item: item[1])
        if total and most >= _LARGE * total:
            said = f"{what}: {most / total:.0%} is of {name}, about {show(most)}"
            yield said + (f"; {advice[name]}" if name in advice else "")
    for other in others:
        if over := budget.excess(other.trial.measured, other.trial.drop, metric):
            reasons = ", ".join(text for _, text in over.values())
            yield f"{other.choice.describe()} was measured too: {reasons}"
