"""The search: proposals go to workers, and each trial is kept when it is finished."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from penjing.errors import PenjingError
from penjing.progress import track
from penjing.recipe import Recipe
from penjing.tune.propose import Proposal, Proposals
from penjing.tune.records import Outcome, Record, Store
from penjing.tune.space import Space
from penjing.workers import Crew

__all__ = ["Attempts", "Evaluate", "Piece", "search"]

Evaluate = Callable[[Recipe, float], Outcome]


@dataclass(frozen=True)
class Piece:
    """A trial, for a worker.

    Attributes:
        params: by name.
        bar: as `Proposals.bar` has it.
    """

    params: dict[str, float | str]
    bar: float


@dataclass(frozen=True)
class Attempts:
    """How a worker gets ready for trials.

    Attributes:
        space: where they are.
        begin: given a folder, what evaluates: the outcome of a recipe, given the bar. A
            PenjingError or too little memory is an outcome too.
    """

    space: Space
    begin: Callable[[Path], Evaluate]

    def __call__(self, folder: Path) -> Callable[[Piece], tuple[Outcome, float]]:
        """As `penjing.workers.Begin`: pieces to outcomes and seconds."""
        return partial(_attempt, self.space, self.begin(folder))


def search(
    space: Space,
    hands: Crew,
    store: Store,
    *,
    objectives: int = 1,
    trials: int = 40,
    concurrency: int = 1,
    seed: int = 0,
    within: float = math.inf,
    after: float = 0.0,
) -> list[Record]:
    """Make trials until there are `trials` in the store, the time is over or the space empty.

    Args:
        space: where to look. The recipe as it is comes first, where it is in the space.
        hands: workers whose work is `Attempts`.
        store: finished trials; those that are there count.
        objectives: numbers that an outcome has.
        trials: at the most; what was tried before is not made again and does not count.
        concurrency: trials that may be made at once, see `penjing.tune.propose`.
        seed: of the proposals.
        within: seconds from now. A trial that is not expected to end by then is not begun.
        after: what follows and must end by then too, in trials.

    Returns:
        All records of the store, by number.
    """
    proposals = Proposals(space, seed, objectives, concurrency)
    total = min(trials, space.count or trials)
    new = max(0, total - sum(r.same is None for r in store.records))
    rounds = _rounds(proposals, hands, store, total, time.monotonic() + within, after)
    for _ in track(rounds, "trials", total=new):
        pass
    return sorted(store.records, key=lambda record: record.number)


def _rounds(
    proposals: Proposals, hands: Crew, store: Store, total: int, until: float, after: float
) -> Iterator[None]:
    """Yield when a trial is finished."""
    records = {record.number: record for record in store.records}
    flying: dict[int, Proposal] = {}
    again: list[Proposal] = []  # of trials that are flying

    def keep(record: Record) -> None:
        store.append(record)
        records[record.number] = record

    def time_left() -> bool:
        slowest = max((r.seconds for r in records.values()), default=0.0)
        return time.monotonic() + (1 + after) * slowest <= until

    while True:
        for one in [p for p in again if p.same in records]:
            again.remove(one)
            keep(Record(one.number, one.params, records[one.same].outcome, 0.0, one.same))  # type: ignore[index]
        if (
            proposals.different < total
            and len(flying) < hands.room
            and proposals.may(records)
            and (proposals.number in records or time_left())
        ):
            bar = proposals.bar(records)
            one = proposals.next(records)
            if one.number in records:
                continue
            if one.same is not None:
                again.append(one)
                continue
            flying[one.number] = one
            hands.give(one.number, Piece(one.params, bar))
            continue
        if not flying:
            return
        number, (outcome, seconds) = hands.take()
        keep(Record(number, flying.pop(number).params, outcome, seconds))
        yield


def _attempt(space: Space, evaluate: Evaluate, piece: Piece) -> tuple[Outcome, float]:
    began = time.monotonic()
    outcome = _outcome(space, evaluate, piece)
    return outcome, time.monotonic() - began


def _outcome(space: Space, evaluate: Evaluate, piece: Piece) -> Outcome:
    try:
        found = evaluate(space.recipe_of(piece.params), piece.bar)
    except PenjingError as error:
        return Outcome("refused", limits={"refused": 1.0}, why=str(error))
    except MemoryError:
        return Outcome("refused", limits={"refused": 1.0}, why="out of memory")
    numbers = (*found.values, *found.limits.values())
    if not all(math.isfinite(v) for v in numbers):
        return Outcome("refused", limits={"refused": 1.0}, why="a figure is not finite")
    return found
