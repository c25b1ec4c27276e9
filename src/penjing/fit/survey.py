"""Survey: what each option of each unit costs in fidelity, each by at least one evaluation.

The error of an option is 1 - cosine (embeddings) or KL in nats (logits) between the original's
outputs and the network's with that one edit, on calibration data that is never reported on.
Cutting is not additive, so depth has a ladder of its own: greedy sets, each measured whole.
The survey is kept on disk and serves every later budget.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from penjing import processor
from penjing.apply import apply
from penjing.calibrate import Stream, Unit, units_of
from penjing.divergence import divergence
from penjing.errors import InputError, PenjingError
from penjing.files import whole_file
from penjing.fit.samples import timed
from penjing.fit.space import FORMATS, TABLES
from penjing.fit.variant import Suffixes, variant
from penjing.model import Batch, Model
from penjing.progress import track
from penjing.recipe import Edit, Patch, Recipe
from penjing.steps.cut import Cut, fit_patch
from penjing.steps.fold import Fold, has_norms
from penjing.steps.quantize import Quantize
from penjing.steps.shrink import Shrink

__all__ = ["HEADS", "WIDTHS", "Depth", "Survey", "cache_folder", "survey"]

# Kept fractions of hidden units and of heads; half is measured, the others follow its curve.
WIDTHS = (1.0, 0.75, 0.5, 0.25)
HEADS = (1.0, 0.5)
_MEASURED = 0.5
_BEAM = 2
# Networks with more blocks than this are measured at their lowest bits only, with all heads.
_DEEP = 12


@dataclass
class Depth:
    """A set of cut blocks, measured whole."""

    cut: list[int]
    error: float
    drop: float


@dataclass
class Survey:
    """Errors of options.

    Attributes:
        cuts: error of cutting one block, with its patch, by block.
        widths: error of halving a block's hidden units, by block; absent where it cannot.
        heads: error of halving a block's heads, by block; absent where it cannot.
        formats: error of one block in a format, by format name and block.
        tables: error of the embedding tables, by table format.
        rest: error of the layers outside the blocks, by format.
        ladder: greedy sets of cut blocks, by depth.
        evaluations: networks run.
        seconds: time it took, in all runs together.
        complete: whether every unit was measured.
        fresh: networks run this time; 0 where an earlier survey served.
        batches: of search data that errors were measured on.
    """

    cuts: dict[str, float] = field(default_factory=dict)
    widths: dict[str, float] = field(default_factory=dict)
    heads: dict[str, float] = field(default_factory=dict)
    formats: dict[str, dict[str, float]] = field(default_factory=dict)
    tables: dict[str, float] = field(default_factory=dict)
    rest: dict[str, float] = field(default_factory=dict)
    ladder: list[Depth] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0
    complete: bool = False
    fresh: int = 0
    batches: int = 0


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
    """
    key = _key(model, calibration, search, formats, about)
    path = cache_folder() / f"survey-{key}.json"
    start = time.monotonic()
    found = _read(path)
    if found.batches < len(search) and deadline == math.inf:
        found = Survey()  # of an earlier fit that had less time
    search = search[: found.batches or len(search)]
    reference: list[Tensor] = []  # the original's outputs, run when they are first needed
    if not found.complete:
        with _fast(model):
            search = search[: _affordable(model, search, formats, deadline)]
        found = Survey(batches=len(search))
        with _fast(model):
            reference += (model.run(b) for b in search)
            found.complete = _singles(
                model, calibration, search, reference, formats, found, deadline
            )
    before, known = len(found.ladder), found.evaluations if not reference else 0
    with _fast(model):
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


@contextlib.contextmanager
def _fast(model: Model) -> Iterator[None]:
    # Without its cache: it would keep the weights of every variant until the survey ends.
    with torch.no_grad(), processor.autocast(model.device.type, cache=False):
        yield


def error_of(model: Model, search: Sequence[Batch], reference: Sequence[Tensor]) -> float:
    """Divergence of an edited network's outputs (`penjing.divergence`)."""
    return divergence(model.interface, search, reference, (model.run(b) for b in search))


def _singles(
    model: Model,
    calibration: Sequence[Batch],
    search: Sequence[Batch],
    reference: Sequence[Tensor],
    formats: Sequence[str],
    found: Survey,
    deadline: float,
) -> bool:
    """Measure every unit alone; whether there was time for all of them."""
    base = model
    if has_norms(model):  # numbers are tried on what will be quantized
        base = apply(model, Recipe((Fold(),))).model

    suffixes = Suffixes(base, search)
    late = False

    def error(edits: Sequence[Edit]) -> float:
        found.evaluations += 1
        outputs = suffixes.outputs(variant(base, edits), edits)
        return divergence(model.interface, search, reference, outputs)

    steps = {
        name: step for name in formats if (step := FORMATS[name].quantize("rtn", ())) is not None
    }
    lowest = min(steps, key=lambda name: FORMATS[name].bits)
    least = FORMATS[lowest].bits
    stream = Stream(base, calibration)
    needs = frozenset({"gram", "range"})
    for unit in track(list(units_of(base, stream)), "survey"):
        # A module that was run refers to itself: copies stay until a collection.
        gc.collect()
        if time.monotonic() <= deadline:
            suffixes.enter(unit)
        if unit.index is None:
            stats = stream.collect(unit, frozenset({"range"})) if unit.layers else {}
            for name, step in steps.items():
                edits = list(step.plan(unit, stats))
                edits = [e for e in edits if e.path in stats or e.kind != "activation"]
                if edits:
                    found.rest[name] = found.rest.get(name, 0.0) + error(edits)
            for name, table in TABLES.items():
                if table is not None and unit.name == "front":
                    bits, group = table
                    step = Quantize(0, embeddings=bits, embedding_group=group, method="rtn")
                    if edits := list(step.plan(unit, {})):
                        found.tables[name] = error(edits)
            continue
        key = str(unit.index)
        late = late or time.monotonic() > deadline
        if late:  # unmeasured, it counts as the worst; whole in width and uncut it stays
            for name in steps:
                own = found.formats.setdefault(name, {})
                own[key] = max(own.values(), default=math.inf)
            continue
        stream.enter(unit.index)
        stats = stream.collect(unit, needs)
        for name, step in steps.items():
            bits = FORMATS[name].bits
            if len(base.blocks) > _DEEP and bits > least:
                continue
            found.formats.setdefault(name, {})[key] = error(list(step.plan(unit, stats)))
        for name in steps:
            # Squared rounding error falls by four with every bit.
            known = found.formats[lowest][key] * 4.0 ** (least - FORMATS[name].bits)
            found.formats.setdefault(name, {}).setdefault(key, known)
        if edits := list(Shrink(1 - _MEASURED, heads=0.0).plan(unit, stats)):
            found.widths[key] = error(edits)
        if len(base.blocks) <= _DEEP and (
            edits := list(Shrink(0.0, heads=1 - _MEASURED).plan(unit, stats))
        ):
            found.heads[key] = error(edits)
        if len(base.blocks) > 1 and (cut := _cut_one(stream, unit)) is not None:
            found.cuts[key] = error(cut)
    return not late


def _cut_one(stream: Stream, unit: Unit) -> list[Edit] | None:
    """Patch and drop of one block; None where it changes the shape of the hidden state."""
    index, blocks = unit.index or 0, unit.model.blocks
    block = unit.model.module.get_submodule(unit.name)
    inputs = [call.hidden for call in stream.calls()]
    outputs = list(stream.run(block))
    if inputs[0].shape != outputs[0].shape:
        return None
    edits = []
    fit = fit_patch(stream, inputs, outputs, 0.01) if inputs[0].ndim == 3 else None
    if fit is not None:
        last = index + 1 == len(blocks)
        near = blocks[index - 1] if last else blocks[index + 1]
        patch = Patch(fit.weight, fit.bias, "after" if last else "before")
        edits.append(Edit("patch", near, patch, "survey"))
    return [*edits, Edit("drop", unit.name, None, "survey")]


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
