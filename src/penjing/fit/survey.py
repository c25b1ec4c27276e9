"""Survey: what each option of each unit costs in fidelity, each by at least one evaluation.

The error of an option is 1 - cosine (embeddings) or KL in nats (logits) between the original's
outputs and the network's with that one edit, on calibration data that is never reported on.
Cutting is not additive, so depth has a ladder of its own: greedy sets, each measured whole.
The survey is kept on disk and serves every later budget.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from penjing.apply import apply
from penjing.divergence import divergence
from penjing.errors import InputError, PenjingError
from penjing.files import whole_file
from penjing.fit.optionerrors import Depth, Survey
from penjing.fit.samples import timed
from penjing.fit.space import FORMATS, TABLES
from penjing.fit.units import HEADS, WIDTHS, Shipped, Units, fast, quantized
from penjing.model import Batch, Model
from penjing.progress import track
from penjing.recipe import Recipe
from penjing.steps.cut import Cut
from penjing.workers import Where, Work, crew, in_order
from penjing.writers.artifact import save

__all__ = ["HEADS", "WIDTHS", "Depth", "Survey", "cache_folder", "survey"]

_BEAM = 2


def cache_folder() -> Path:
    """Where surveys are kept: `$PENJING_CACHE`, or `~/.cache/penjing`.

    Raises:
        InputError: it is not there and cannot be made.
    """
    folder = Path(os.environ.get("PENJING_CACHE") or Path.home() / ".cache" / "penjing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "the cache folder cannot be made", got=f"{folder} ({error.strerror})",
            next="set PENJING_CACHE to a folder that can be written",
        ) from error  # fmt: skip
    return folder


def survey(
    model: Model,
    calibration: Sequence[Batch],
    search: Sequence[Batch],
    drop_of: Callable[[Model], float],
    formats: Sequence[str],
    *,
    limit: float,
    seconds: float,
    about: str = "",
    deadline: float = math.inf,
    where: Where | None = None,
    folder: Path = Path(),
) -> Survey:
    """Measure every unit's options, or read an earlier survey of the same model and data.

    Args:
        model: the original.
        calibration: batches that edits are fitted to.
        search: batches that errors are measured on.
        drop_of: drop of the user's metric of an edited network, on calibration data.
        formats: names of `FORMATS` to try.
        limit: the ladder stops where the drop is above this.
        seconds: the ladder stops growing after this; it begins when the units are done.
        deadline: on the monotonic clock, for the units. Where a look at the machine says that
            all of `search` would take longer, fewer of its batches are used; units that are left
            all the same count as the worst that was measured, and the survey is not kept.
        about: all that `drop_of` depends on, for telling surveys apart.
        where: units are measured; in this process by default.
        folder: for files of workers; removed by the caller.
    """
    key = _key(model, calibration, search, formats, about)
    path = cache_folder() / f"survey-{key}.json"
    start = time.monotonic()
    found = _read(path)
    if found.batches < len(search) and deadline == math.inf:
        found = Survey()  # of an earlier fit that had less time
    search = search[: found.batches or len(search)]
    reference: list[Tensor] = []  # the original's outputs, run when they are first needed
    new = 0
    if not found.complete:
        with fast(model):
            search = search[: _affordable(model, search, formats, deadline)]
        found = Survey(batches=len(search))
        with fast(model):
            found.complete = _units(
                model,
                calibration,
                search,
                reference,
                formats,
                found,
                deadline,
                where or Where(),
                folder,
            )
        new = found.evaluations
    before, known = len(found.ladder), found.evaluations - new
    with fast(model):
        until = time.monotonic() + seconds
        some = calibration[: len(search)]
        _climb(model, some, search, reference, drop_of, found, limit, until)
    found.fresh = found.evaluations - known
    if found.complete and (len(found.ladder) > before or not path.exists()):
        found.seconds += time.monotonic() - start
        whole_file(path, lambda p: _write(p, found), overwrite=True)
    return found


def _affordable(
    model: Model, search: Sequence[Batch], formats: Sequence[str], deadline: float
) -> int:
    """Batches of `search` on which every unit can be measured before the deadline, at least 1."""
    if deadline == math.inf:
        return len(search)
    once = timed(lambda: model.run(search[0]))
    # A format, a width, heads and a cut of every block, run from that block on; twice that goes
    # to fitting the edits.
    networks = (len(formats) + 3) * max(len(model.blocks), 1) / 2
    left = deadline - time.monotonic()
    return max(1, min(len(search), int(left / (3 * networks * once))))


def error_of(model: Model, search: Sequence[Batch], reference: Sequence[Tensor]) -> float:
    """Divergence of an edited network's outputs (`penjing.divergence`)."""
    return divergence(model.interface, search, reference, (model.run(b) for b in search))


def _units(
    model: Model,
    calibration: Sequence[Batch],
    search: Sequence[Batch],
    reference: list[Tensor],
    formats: Sequence[str],
    found: Survey,
    deadline: float,
    where: Where,
    folder: Path,
) -> bool:
    """Measure every unit alone, wherever; whether there was time for all of them."""

    def begin(_: Path) -> Work:
        reference[:] = (model.run(b) for b in search)
        return Units(model, calibration, search, formats, reference).measure

    count = len(model.blocks) + 2
    pieces = ((unit, deadline - time.monotonic()) for unit in range(count))
    late = False
    with crew(where, folder) as hands:
        if where.kind == "serial":
            hands.start(begin)
        else:
            save(model, folder / "surveyed")
            parcel = hands.ship(folder / "surveyed")
            hands.start(Shipped(parcel, tuple(calibration), tuple(search), tuple(formats)))
        parts = track(in_order(hands, pieces), "survey", total=count)
        for index, part in enumerate(parts, -1):
            if part is not None:
                found.add(part)
                continue
            late = True  # unmeasured, it counts as the worst; whole in width and uncut it stays
            for name in quantized(formats):
                own = found.formats.setdefault(name, {})
                own[str(index)] = max(own.values(), default=math.inf)
    return not late


def _climb(
    model: Model,
    calibration: Sequence[Batch],
    search: Sequence[Batch],
    reference: Sequence[Tensor],
    drop_of: Callable[[Model], float],
    found: Survey,
    limit: float,
    deadline: float,
) -> None:
    """Grow the ladder of cut sets: the best of a few extensions at each depth."""
    order = sorted(
        (k for k, v in found.cuts.items() if math.isfinite(v)), key=found.cuts.__getitem__
    )
    most = len(model.blocks) - 1
    taken = 0.0  # by the last depth
    while len(found.ladder) < min(most, len(order)) and time.monotonic() + taken < deadline:
        began = time.monotonic()
        if found.ladder and found.ladder[-1].drop > limit:
            return
        reference = reference or [model.run(b) for b in search]
        last = found.ladder[-1].cut if found.ladder else []
        tried = []
        beam = [int(k) for k in order if int(k) not in last][: _BEAM if last else 1]
        for extra in beam:
            cut = sorted([*last, extra])
            paths = tuple(model.blocks[i] for i in cut)
            variant = apply(model, Recipe((Cut(blocks=paths),)), calibration).model
            found.evaluations += 1
            tried.append((error_of(variant, search, reference), cut, variant))
        error, cut, variant = min(tried, key=lambda t: t[0])
        if not math.isfinite(error):
            return
        try:
            found.ladder.append(Depth(cut, error, drop_of(variant)))
        except PenjingError:  # outputs that no metric can be taken of: deeper is no better
            return
        taken = time.monotonic() - began


def _key(
    model: Model,
    calibration: Sequence[Batch],
    search: Sequence[Batch],
    formats: Sequence[str],
    about: str,
) -> str:
    """Of everything a survey depends on; the weights themselves, for they may be edited."""
    facts = [4, model.structure, model.blocks, model.interface, torch.__version__, formats, about]
    facts += [sorted(model.activations), {n: str(FORMATS[n]) for n in formats}, str(TABLES)]
    digest = hashlib.sha256(repr(facts).encode())
    for name, parameter in model.module.state_dict().items():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.cpu().contiguous().numpy().tobytes())
    for part in (calibration, search):
        digest.update(f"{len(part)} batches".encode())
        for batch in part:
            for name in sorted(batch):
                digest.update(f"{name} {tuple(batch[name].shape)}".encode())
                digest.update(batch[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def _read(path: Path) -> Survey:
    try:
        table = json.loads(path.read_text())
        table["ladder"] = [Depth(**d) for d in table["ladder"]]
        return Survey(**(table | {"fresh": 0}))
    except (OSError, ValueError, TypeError, KeyError):  # none, or of another version
        return Survey()


def _write(path: Path, found: Survey) -> None:
    # Infinite errors are written as `Infinity`, which `json` reads back.
    path.write_text(json.dumps(asdict(found)))
