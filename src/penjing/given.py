"""What verbs are given, made ready: models, data, and batches to calibrate on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from penjing.data import Dataset, align, encode, prepare, read
from penjing.errors import InputError, UsageError
from penjing.gradients import LABELS
from penjing.load import load
from penjing.model import Batch, Model
from penjing.tasks import find
from penjing.tasks.classification import classes_of

__all__ = [
    "BATCH", "Later", "Place", "batches_of", "dataset_of", "edited", "model_of", "need",
    "network_of",
]  # fmt: skip

BATCH = 8
"""Samples of a calibration batch."""

Place = str | os.PathLike[str]


@dataclass(frozen=True)
class Later(os.PathLike[str]):
    """A model that is loaded once, when it is needed: options are refused before.

    Attributes:
        path: where it is.
        load: gives it.
    """

    path: str
    load: Callable[[], Model]

    def __fspath__(self) -> str:
        return self.path

    @cached_property
    def model(self) -> Model:
        """The loaded one."""
        return self.load()


def model_of(model: Model | Place) -> Model:
    """The model, loaded where it is a path.

    Raises:
        UsageError: a torch module, which could not be built again.
    """
    if isinstance(model, torch.nn.Module):
        raise UsageError(
            "a torch module alone", got=type(model).__name__,
            allowed="a path that penjing.load takes, or what it gave",
            next="write a function that returns the module, and give file.py:function",
        )  # fmt: skip
    if isinstance(model, Later):
        return model.model
    return model if isinstance(model, Model) else load(os.fspath(model))


def network_of(model: Model | Place, verb: str) -> Model:
    """The same; bare weights are refused."""
    loaded = model_of(model)
    if loaded.interface == "weights":
        raise UsageError(f"{verb} is for networks", got="bare weights",
                         next="give the network, or prune or quantize the file")  # fmt: skip
    return loaded


def dataset_of(data: Dataset | Place) -> Dataset:
    """The data, read where they are a path."""
    return data if isinstance(data, Dataset) else read(data)


def edited(model: Model) -> bool:
    """Whether it is other than its source."""
    return bool(model.structure or model.masks or model.planes)


def need(data: object, verb: str) -> None:
    """Refuse to go on without data."""
    if data is None:
        raise UsageError(f"{verb} needs data", next="give --data")


def batches_of(
    model: Model,
    data: Dataset | Place | None,
    samples: int,
    length: int,
    labels: bool = False,
    needed: bool = False,
) -> list[Batch]:
    """Calibration batches of at most `samples` samples, spread evenly over the data.

    Args:
        labels: they hold them, where there are any that are classes of the network.
        needed: data without them is refused; a language model needs none.

    Raises:
        InputError: data that do not fit the network, or labels that are not its classes.
    """
    if data is None:
        return []
    length, given = model.at_most(length), dataset_of(data)
    if needed and model.interface != "causal":
        find("classification", given, model).check(given, model)
    classes = (labels or needed) and _has_classes(model, given)
    dataset = prepare(given, model, length).spread(samples)
    known = align(dataset, model).labels if classes else None
    if dataset.kind != "text":
        return _labelled(encode(dataset, model, length=length, batch=BATCH), known)
    # Texts of one length go together, so that little of a batch is padding; the batches in
    # random order, because steps hold out the first or the last.
    sizes = [len(text) for text in dataset.samples]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    known = None if known is None else known[order]
    batches = _labelled(encode(dataset.subset(order), model, length=length, batch=BATCH), known)
    return [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]


def _has_classes(model: Model, dataset: Dataset) -> bool:
    """Whether the labels are classes of the network; there may be none, or no classes.

    Raises:
        InputError: labels of a classifier that are not its classes.
    """
    if dataset.labels is None or dataset.labels.dtype.kind != "i" or classes_of(model) is None:
        return False
    try:
        find("classification", dataset, model).check(dataset, model)
    except InputError as error:
        raise InputError(
            error.what, got=error.got, allowed=error.allowed,
            next="correct the labels, or leave them out: then the network's own are drawn",
        ) from error  # fmt: skip
    return True


def _labelled(batches: Iterable[Batch], labels: np.ndarray | None) -> list[Batch]:
    """The same with class numbers, in the order of the samples."""
    made, start = list(batches), 0
    if labels is None:
        return made
    for batch in made:
        count = len(next(iter(batch.values())))
        batch[LABELS] = torch.as_tensor(labels[start : start + count])
        start += count
    return made
