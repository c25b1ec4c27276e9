"""Apply: the only place that changes a model. Block by block, journalled, replayable.

After each unit its edits are on disk; a killed run reads them back and goes on. The same
recipe, data and seed give the same bytes, killed or not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from penjing import together
from penjing.batching import rebatched
from penjing.calibrate import Stream, Unit, units_of
from penjing.edits import perform
from penjing.errors import InputError
from penjing.files import kept_in, sync, write_tensors
from penjing.gradients import slopes
from penjing.graph import is_weighted
from penjing.model import Batch, Model
from penjing.progress import track
from penjing.recipe import Edit, Recipe
from penjing.storededits import pack, unpack

# Batches that no step does without.
_FEW = 8

__all__ = ["Applied", "Done", "Journal", "apply"]


@dataclass(frozen=True)
class Done:
    """One edit that was made, for the report."""

    step: str
    kind: str
    path: str
    why: str
    note: dict[str, float]


@dataclass
class Applied:
    """An edited model and the list of what was done to it."""

    model: Model
    done: list[Done] = field(default_factory=list)


def apply(
    model: Model,
    recipe: Recipe,
    batches: Sequence[Batch] = (),
    *,
    original: Model | None = None,
    journal: Path | None = None,
    deadline: float | None = None,
) -> Applied:
    """Make a recipe's edits on a copy of `model`.

    Args:
        model: stays as it is.
        recipe: steps in order.
        batches: calibration batches; may be empty for steps that need none. Sums over them are
            of batches of our own making, see `penjing.batching`; a step on the whole network
            gets them as they are.
        original: what `recover` distils from; `model` when None.
        journal: folder for finished units, and for how far an unfinished training has come, to go
            on from after a kill.
        deadline: when training must have ended, of `time.monotonic`.

    Raises:
        InputError: unusable data, or a journal of another run.
    """
    result = Applied(model.copy(shared=True))
    # The same samples in any batches: the same journal, and the same bytes.
    own = rebatched(model, batches) if batches else []
    steps = [one for step in recipe.steps for one in _parts(step)]
    given = batches if any(step.scope == "model" for step in steps) else own
    for step in itertools.takewhile(lambda step: step.name != "cut", recipe.steps):
        _check_targets(step, result.model)  # before the journal
    with _journal(journal, model, original or model, recipe, given) as log:
        for number, step in enumerate(_settled(recipe, result.model, own)):
            if step.scope == "model":
                edits = log.read(number, "whole")
                if edits is None:
                    _seed(recipe, number, "whole")
                    whole = Unit("whole", result.model, {}, None, None, original or model, batches,
                                 checkpoint=log.checkpoint(number), deadline=deadline)  # fmt: skip
                    edits = list(step.plan(whole, {}))
                    log.write(number, "whole", edits)
                    log.forget(number)
                _make(result, step.name, edits)
                continue
            seen = own[:: _stride(own, getattr(step, "portion", 1.0))]
            about = step.informed(result.model) if hasattr(step, "informed") else None
            found = slopes(result.model, seen, step.needs, about) if own else None
            stream = Stream(result.model, seen, found) if own and step.needs else None
            reference = None
            if stream is not None and "cross" in step.needs:
                reference = stream.twin(result.model.copy(shared=True))
            units = list(units_of(result.model, stream))
            for unit in track(units, step.name):
                edits = log.read(number, unit.name)
                if edits is not None:
                    _make(result, step.name, edits)
                else:
                    _seed(recipe, number, unit.name)
                    chosen = step.layers(unit)
                    unit.reference = reference
                    for one in (stream, reference):
                        if one is not None and unit.index is not None and chosen:
                            one.enter(unit.index)
                    edits = []
                    if getattr(step, "staged", False):
                        # Its later layers are calibrated on its earlier edits.
                        for edit in step.plan(unit, {}):
                            _make(result, step.name, [edit])
                            edits.append(edit)
                    else:
                        stats = {}
                        if stream is not None and chosen:
                            stats = stream.collect(replace(unit, layers=chosen), step.needs)
                        edits += step.plan(unit, stats)
                        _make(result, step.name, edits)
                    log.write(number, unit.name, edits)
                if edits and unit.name == "front" and stream is not None:
                    # What enters the first block has changed.
                    stream = Stream(result.model, seen, found)
                    for later in units:
                        later.stream = stream
    given_numbers = {p.data_ptr() for p in model.module.parameters()}
    for parameter in result.model.module.parameters():
        if parameter.data_ptr() in given_numbers:  # no edit replaced them
            parameter.data = parameter.data.clone()
    return result


def _stride(batches: Sequence[Batch], portion: float) -> int:
    """Of many batches a portion; of few not less than there are."""
    return max(1, min(round(1 / portion), len(batches) // _FEW))


def _parts(step: Any) -> tuple[Any, ...]:
    """A step may begin with others, on the whole network."""
    return (*getattr(step, "before", ()), step)


def _settled(recipe: Recipe, model: Model, batches: Sequence[Batch]) -> Iterator[Any]:
    """The steps one after the other; some first look at what those before have made."""
    was_cut = False
    for step in recipe.steps:
        if was_cut:  # paths are others now
            _check_targets(step, model)
        was_cut = was_cut or step.name == "cut"
        yield from _parts(step.settled(model, batches) if hasattr(step, "settled") else step)


def _check_targets(step: Any, model: Model) -> None:
    """Of a step on the whole network they are its own to read."""
    targets = () if step.scope == "model" else getattr(step, "targets", ())
    paths = [n for n, _ in model.module.named_modules()]
    if targets and not any(fnmatchcase(n, t) for n in paths for t in targets):
        weighted = [(n, m) for n, m in model.module.named_modules() if is_weighted(m)]
        # A table stands first in most networks, and is rarely what is meant.
        layers = [n for n, m in sorted(weighted, key=lambda p: isinstance(p[1], nn.Embedding))]
        raise InputError(
            f"the targets of {step.name} match no layer", got=", ".join(targets),
            allowed=f"globs of paths such as {layers[0]}" if layers else "a network with layers",
            next="see the paths with penjing inspect",
        )  # fmt: skip


def _seed(recipe: Recipe, number: int, unit: str) -> None:
    """Each unit has its own random numbers, so that a resumed one draws the same."""
    digest = hashlib.sha256(f"{recipe.seed} {number} {unit}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def _make(result: Applied, step: str, edits: list[Edit]) -> None:
    for edit in edits:
        perform(result.model, edit)
        if edit.kind == "curve":  # it changes nothing
            continue
        result.done.append(Done(step, edit.kind, edit.path, edit.why, dict(edit.note)))


class Journal:
    """Finished units of one run, each a safetensors file named in `journal.jsonl`."""

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder, self._units = folder, {}
        if folder is None:
            return
        self._lines = folder / "journal.jsonl"
        text = self._lines.read_text("utf-8", "replace") if self._lines.exists() else ""
        entries: list[dict[str, Any]] = []
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break
            wanted = ("step", "unit", "file", "sha256") if entries else ("key",)
            if not isinstance(entry, dict) or not set(wanted) <= set(entry):
                break
            entries.append(entry)
        if entries and entries[0]["key"] != key:
            raise InputError(
                "the journal is of another run (recipe, model, data or versions differ)",
                got=folder,
                next="remove it, or give the same options",
            )
        whole = "".join(json.dumps(e) + "\n" for e in entries or [{"key": key}])
        # The line that a kill tore goes; its unit is done again.
        if whole != text and not together.rank():
            beside = self._lines.with_suffix(".part")
            beside.write_text(whole, "utf-8")
            sync(beside)
            beside.replace(self._lines)
        self._units = {(e["step"], e["unit"]): e for e in entries[1:]}

    def read(self, step: int, unit: str) -> list[Edit] | None:
        """The edits of a finished unit, None where it is not finished or its file is torn."""
        entry = self._units.get((step, unit))
        if entry is None or self.folder is None:
            return None
        path = self.folder / Path(entry["file"]).name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            return None
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return unpack(tensors, file.metadata()["edits"])

    def checkpoint(self, step: int) -> Path | None:
        """Where a step that takes long keeps how far it has come."""
        return None if self.folder is None else self.folder / f"{step:02d}-training.safetensors"

    def forget(self, step: int) -> None:
        """Its checkpoints go: the step is finished."""
        if self.folder is not None:
            together.meet()  # the others may still be reading
            for path in self.folder.glob(f"{step:02d}-training*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def write(self, step: int, unit: str, edits: list[Edit]) -> None:
        """Put a finished unit on disk: its file first, then its line."""
        if self.folder is None or together.rank():
            return
        tensors, text = pack(edits)
        path = self.folder / f"{step:02d}-{unit.replace('/', '_')}.safetensors"
        write_tensors(path, tensors, {"edits": text}, "the journal's file")
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entry = {"step": step, "unit": unit, "file": path.name, "sha256": digest}
            with open(self._lines, "a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write the journal {self.folder}",
                got=error,
                next=f"free disk space and run again; {kept_in(self.folder)}",
            ) from error


@contextlib.contextmanager
def _journal(
    folder: Path | None,
    model: Model,
    original: Model,
    recipe: Recipe,
    batches: Sequence[Batch],
) -> Iterator[Journal]:
    if folder is None:
        yield Journal(None, "")
        return
    if together.rank():  # the first process writes; the others read what it found
        together.meet()
        log = Journal(folder, _key(model, original, recipe, batches))
        together.meet()
        yield log
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise InputError("cannot use the journal folder", got=error, next="name another") from error
    with lock:  # the kernel frees it when its process dies
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError("another run is writing this journal", got=folder) from error
        try:
            log = Journal(folder, _key(model, original, recipe, batches))
        except OSError as error:
            raise InputError(f"cannot use the journal {folder}", got=error) from error
        together.meet()
        together.meet()
        yield log


def _key(model: Model, original: Model, recipe: Recipe, batches: Sequence[Batch]) -> str:
    """SHA-256 over all that decides the result."""
    head = [recipe.to_toml(), model.source.fingerprint, original.source.fingerprint]
    head += [str(model.structure), str(sorted(model.planes)), str(sorted(model.masks))]
    for ranges in (model.activations, model.outputs):
        head += [str(sorted((n, r.scale, r.zero_point) for n, r in ranges.items()))]
    head += [str(sorted((n, g.bits) for n, g in model.cache.items()))]
    head += [version("penjing"), torch.__version__]
    digest = hashlib.sha256(json.dumps(head).encode())
    # Two artifacts of one source differ in their weights only.
    tensors = [model.module.state_dict(), *batches]
    for group, name in ((g, n) for g in tensors for n in sorted(g)):
        tensor = group[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
