"""Transfer: what a teacher knows, in a student of another shape.

    structure    the student is derived from the teacher (`penjing.structure`)
    parameters   the student begins with the teacher's weights (`penjing.transferring.parameters`)
    features     hidden states are matched (`penjing.features`)
    outputs      outputs are matched (`penjing.losses`)

each alone or together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penjing.data import Dataset, align, encode, prepare
from penjing.data import read as read_data
from penjing.errors import InputError, UsageError
from penjing.gradients import LABELS
from penjing.load import load
from penjing.model import Batch, Model
from penjing.structure import derive
from penjing.tasks import find
from penjing.training import UNJUDGED, check_optimizer
from penjing.transferring.aim import Aim
from penjing.transferring.depth import by_cka
from penjing.transferring.distil import distil, keep_masks
from penjing.transferring.matching import match
from penjing.transferring.parameters import inherit
from penjing.transferring.spans import OTHER, Bridge, differ
from penjing.transferring.store import Kept

__all__ = ["transfer"]

# Samples that units and forms of blocks are chosen by.
_CALIBRATION = 128

Place = str | os.PathLike[str]
# Names, or their weights by name.
Chosen = str | Iterable[str] | Mapping[str, float]


def transfer(
    teacher: Model | Place,
    student: Model | Place | None = None,
    data: Dataset | Place | None = None,
    *,
    share: float | None = None,
    of: str = "latency",
    parameters: bool = True,
    features: Chosen = (),
    outputs: Chosen | None = None,
    temperature: float | None = None,
    criterion: str = "gram",
    merge: bool = False,
    layers: str = "place",
    steps: int = 0,
    within: float = 60.0,
    lr: float = 5e-4,
    optimizer: str = "adamw",
    samples: int = 2048,
    batch: int = 16,
    length: int = 128,
    seed: int = 0,
    cache: Place | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Model:
    """A copy of the student with what it was given of the teacher.

    Args:
        teacher, student: a Model or anything `penjing.load` takes; of one interface. Without a
            student one is derived that costs `share` of the teacher's `of`: `latency` in
            onnxruntime, `macs` or `parameters`.
        data: samples; labels are used where `outputs` has `labels`.
        parameters: begin with the teacher's weights.
        features: names of `penjing.features`, with weights where given; default none.
        outputs: names of `penjing.losses` or `labels`; by default `cosine` for embeddings, else
            `kl`; an empty one for none.
        temperature: of the losses that have one; None for their own.
        criterion: how units are chosen, as `penjing.shrink` takes it.
        merge: blocks that a shallower student has not are merged into their neighbours.
        layers: how blocks are matched for features, by `place` in depth or by `cka`.
        steps, within: the end of training, whichever is first; 0 for none. Within is seconds.
        lr: peak learning rate; `optimizer` as `penjing.training.descend` takes it.
        samples, batch, length: of training: how many at the most, in a batch, tokens of each.
        cache: folder for the teacher's outputs; a later run does not compute them again.
        tell: gets a line about what was done.

    Raises:
        UsageError: an unknown name, or options that do not go together.
        InputError: unusable models or data.
    """
    wanted, matched = _weights(outputs), _weights(features)
    if layers not in ("place", "cka"):
        raise UsageError("layers", got=layers, allowed="place, cka")
    check_optimizer(optimizer)
    if not (parameters or matched or wanted or outputs is None):
        raise UsageError("nothing to transfer", allowed="parameters, features or outputs")
    if (student is None) == (share is None):
        raise UsageError("transfer", allowed="either a student or the share it may cost")
    if data is None:
        raise UsageError("transfer needs data", next="give --data")
    old = teacher if isinstance(teacher, Model) else load(os.fspath(teacher))
    new = old if student is None else student
    new = new if isinstance(new, Model) else load(os.fspath(new))
    _check(old, new)
    if (bridged := differ(new, old)) and (parameters or matched):
        raise InputError(
            "tokenizers of student and teacher differ",
            got="parameters" if parameters else "features", allowed="outputs alone",
            next="--no-parameters" if parameters else "leave out --features",
        )  # fmt: skip
    if outputs is None:
        wanted = {old.suited_loss: 1.0}
    given = data if isinstance(data, Dataset) else read_data(data)
    batches = _batches(new, given, samples, batch, length, labels=LABELS in wanted,
                       teacher=old if bridged else None)  # fmt: skip
    few = batches[: max(1, _CALIBRATION // batch)]
    blocks: tuple[int, ...]
    if share is not None:
        count = _CALIBRATION if old.interface == "causal" else 3 * _CALIBRATION
        some = batches[: max(1, count // batch)]
        derived = derive(old, some, share, of, length=length, seed=seed)
        tell(derived.why)
        made = derived.model if parameters else _fresh(derived.model, seed)
        blocks = match(made, old).blocks if matched else ()
    elif parameters:
        found = inherit(new, old, few, criterion=criterion, merge=merge, seed=seed)
        made, blocks = found.model, found.blocks
        tell(f"parameters: {found.why}")
        if found.alone:
            tell(f"layers without a counterpart: {', '.join(found.alone[:4])}")
    else:
        made = new.copy()
        blocks = match(made, old).blocks if matched else ()
    keep_masks(made)
    if matched and layers == "cka":
        blocks = by_cka(made, old, batches)
        tell(f"blocks of the teacher by CKA: {', '.join(map(str, blocks))}")
    if wanted or matched:
        kept = Kept(old, None if cache is None else Path(cache), seed)
        aim = Aim(made, old, wanted, matched, blocks, temperature=temperature, kept=kept)
        done = distil(made, aim, batches, steps=steps, seconds=within, lr=lr, seed=seed,
                      optimizer=optimizer)  # fmt: skip
        judged = math.isfinite(done.before)
        losses = f"held-out loss {done.before:.4g} to {done.after:.4g}" if judged else UNJUDGED
        tell(f"{done.steps} steps, {losses}")
    return made


def _fresh(model: Model, seed: int) -> Model:
    """A copy with random numbers: as layers draw them, small ones where a layer does not."""
    made = model.copy()
    torch.manual_seed(seed)
    for part in made.module.modules():
        if callable(draw := getattr(part, "reset_parameters", None)):
            draw()
        else:
            for own in part.parameters(recurse=False):
                if own.ndim > 1:  # tokens and positions of their own, not gains and shifts
                    torch.nn.init.normal_(own, std=0.02)
    return made


def _weights(chosen: Chosen | None) -> dict[str, float]:
    """By name; a name may have its weight behind it, `kl=0.5`."""
    if isinstance(chosen, Mapping):
        return {name: float(weight) for name, weight in chosen.items()}
    names = [chosen] if isinstance(chosen, str) else list(chosen or ())
    found = {}
    for name in names:
        own, equals, weight = name.partition("=")
        try:
            found[own] = float(weight) if equals else 1.0
        except ValueError:
            raise UsageError("a weight", got=name, allowed="NAME or NAME=NUMBER") from None
        if not 0 < found[own] < float("inf"):
            raise UsageError("a weight", got=name, allowed="more than 0")
    return found


def _check(teacher: Model, student: Model) -> None:
    for what, model in (("teacher", teacher), ("student", student)):
        if model.interface == "weights":
            raise InputError(f"a {what} of bare weights cannot run", next="give the network")
        if what == "student" and model.planes:
            raise InputError("a quantized student cannot learn", next="quantize it afterwards")
    if teacher.interface != student.interface:
        raise InputError(
            "student and teacher", got=f"{student.interface} and {teacher.interface}",
            allowed="networks of one kind",
        )  # fmt: skip


def _batches(
    model: Model, given: Dataset, samples: int, size: int, length: int, *, labels: bool,
    teacher: Model | None,
) -> list[Batch]:  # fmt: skip
    """Batches in random order, of texts those of one length together; with labels if wanted.

    With a teacher they have its own inputs too.
    """
    for what, value in (("samples", samples), ("batch", size), ("length", length)):
        if value < 1:
            raise UsageError(what, got=value, allowed="1 or more")
    length = model.at_most(length)
    labelled = labels and model.interface != "causal"
    if labelled:
        find("classification", given, model).check(given, model)
    if teacher is not None and model.interface == "causal":
        made = _bridged(model, teacher, given, samples, size, length)
    else:
        dataset = prepare(given, model, length).spread(samples)
        if dataset.kind == "text":
            order = sorted(range(len(dataset.samples)), key=lambda n: len(dataset.samples[n]))
        else:
            order = np.random.default_rng(0).permutation(len(dataset.samples)).tolist()
        dataset = dataset.subset(order)
        made = list(encode(dataset, model, length=length, batch=size))
        if teacher is not None:
            others = encode(dataset, teacher, length=teacher.at_most(length), batch=size)
            made = [batch | {f"{OTHER}{name}": x for name, x in other.items()}
                    for batch, other in zip(made, others, strict=True)]  # fmt: skip
        if labelled:
            made = list(_labelled(made, align(dataset, model).labels))
    return [made[i] for i in np.random.default_rng(0).permutation(len(made))]


def _bridged(
    model: Model, teacher: Model, given: Dataset, samples: int, size: int, length: int
) -> list[Batch]:
    if given.kind != "text":
        raise InputError("data for two tokenizers", got=given.kind, allowed="texts")
    found = list(Bridge(model, teacher).encode(given.spread(samples).samples, length, size))
    if not found:
        raise InputError(
            "no text in which tokens of both end at one place", next="give longer texts"
        )
    return found


def _labelled(batches: Iterable[Batch], labels: Any) -> Iterator[Batch]:
    start = 0
    for batch in batches:
        count = len(next(iter(batch.values())))
        yield batch | {LABELS: torch.as_tensor(labels[start : start + count])}
        start += count
