"""Samples to batches of tensors, with exactly the names of the model's example.

Text is cut at `length` tokens and padded on the right to the longest of its batch. For causal
models long texts are first cut into consecutive windows, so that each token is predicted once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from penjing.data.dataset import Dataset
from penjing.data.images import open_image
from penjing.errors import InputError, UsageError
from penjing.model import Batch, Model

__all__ = ["SHORTEST_TAIL", "align", "encode", "prepare", "windows"]

# The rest of a text after its last whole window is dropped when it has fewer tokens.
SHORTEST_TAIL = 16


def encode(
    dataset: Dataset, model: Model, *, length: int = 128, batch: int = 32
) -> Iterator[Batch]:
    """Batches in the order of `prepare(dataset, model, length)`.

    Pairs become two samples each for embedding models (even rows the first text, odd rows the
    second), and one joined input for the others.

    Args:
        dataset: samples of a kind that the model takes.
        model: its example, tokenizer and preprocessing say how.
        length: most tokens of a text.
        batch: samples in a batch (texts, where a pair is two).

    Raises:
        InputError: data of a kind, shape or vocabulary that the model does not take.
        UsageError: `length` or `batch` is below 1.
    """
    if length < 1 or batch < 1:
        raise UsageError("length and batch", got=f"{length} and {batch}", allowed="1 or more")
    dataset = prepare(dataset, model, length)
    samples: Sequence[Any] = dataset.samples
    if dataset.kind == "pairs" and model.interface == "embedding":
        samples = [text for pair in samples for text in pair]
    for start in range(0, len(samples), batch):
        chosen = samples[start : start + batch]
        if dataset.kind == "images":
            columns = _images(chosen, model)
        elif dataset.kind == "arrays":
            columns = _arrays(chosen, model)
        else:
            columns = _texts(chosen, model, length)
        yield _checked(columns, model, start)


def prepare(dataset: Dataset, model: Model, length: int = 128) -> Dataset:
    """The dataset as it is evaluated: windows of text for causal models, the model's own classes.

    Preparing twice changes nothing.
    """
    if model.interface == "causal" and dataset.kind == "text":
        return windows(dataset, model, length)
    return align(dataset, model, strict=False)


def align(dataset: Dataset, model: Model, *, strict: bool = True) -> Dataset:
    """Number named classes as the model does, when the model's configuration names them.

    Raises:
        InputError: `strict`, and the model names its classes but not all of the data's; when
            not strict such data is given back as it is (labels may group samples for a task
            that is not the model's own).
    """
    names = _class_names(model)
    if not names or not dataset.classes or dataset.labels is None:
        return dataset
    place = {name.casefold(): i for i, name in names.items()}
    used = np.unique(dataset.labels)
    unknown = [dataset.classes[i] for i in used if dataset.classes[i].casefold() not in place]
    if unknown and not strict:
        return dataset
    if unknown:
        raise InputError(
            "labels that the model does not know",
            got=", ".join(unknown),
            allowed=", ".join(names.values()),
            next="rename the labels, or write them as the model's class numbers",
        )
    number = np.array([place.get(name.casefold(), -1) for name in dataset.classes])
    classes = tuple(names.get(i, str(i)) for i in range(max(names) + 1))
    return dataclasses.replace(dataset, labels=number[dataset.labels], classes=classes)


def _class_names(model: Model) -> dict[int, str]:
    if model.interface not in ("classifier", "image"):
        return {}
    table = getattr(getattr(model.module, "config", None), "id2label", None)
    if not isinstance(table, Mapping) or not table:
        return {}
    names = {int(i): str(name) for i, name in table.items()}
    # LABEL_0, LABEL_1, ... is what a configuration without names says.
    if all(name == f"LABEL_{i}" for i, name in names.items()):
        return {}
    return names


def windows(dataset: Dataset, model: Model, length: int = 128) -> Dataset:
    """Texts cut into consecutive windows of `length` tokens, each window a sample.

    No token is lost but those of tails shorter than `SHORTEST_TAIL`; a text's first window is
    kept from 2 tokens on, since one token predicts nothing. Labels are dropped.

    Returns:
        Arrays `input_ids` and `attention_mask`, int64 [tokens], tokens <= length.

    Raises:
        InputError: no tokenizer, or no text of 2 tokens.
        UsageError: `length` is below 2.
    """
    if length < 2:
        raise UsageError("length of a window", got=length, allowed="2 tokens or more")
    samples = []
    for text in dataset.samples:
        ids = np.asarray(_tokenizer(model)(text, verbose=False)["input_ids"], dtype=np.int64)
        for start in range(0, len(ids), length):
            window = ids[start : start + length]
            if len(window) >= (2 if start == 0 else SHORTEST_TAIL):
                samples.append({"input_ids": window, "attention_mask": np.ones_like(window)})
    if not samples:
        raise InputError(
            "no text has two tokens", got=dataset.path, next="give longer texts to predict"
        )
    return Dataset("arrays", tuple(samples), path=dataset.path)


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise InputError(
            "text data for a model without a tokenizer",
            got=model.source.path,
            allowed=f"arrays named {', '.join(model.example)} in an .npz",
            next="put the tokenizer's files into the model's folder",
        )
    return model.tokenizer


def _pad_id(model: Model) -> int:
    tokenizer = model.tokenizer
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    # Padding is masked, so any id that exists will do.
    return 0


def _texts(texts: Sequence[Any], model: Model, length: int) -> dict[str, np.ndarray]:
    tokenizer = _tokenizer(model)
    if "input_ids" not in model.example:
        raise InputError("text data for a model that takes none", allowed=", ".join(model.example))
    pairs = isinstance(texts[0], tuple)
    sides = [list(side) for side in zip(*texts, strict=True)] if pairs else [list(texts)]
    # Some tokenizers leave token types out unless asked, though their model takes them.
    types = "token_type_ids" in model.example
    tokens = tokenizer(
        *sides, truncation=True, max_length=length, return_token_type_ids=types, verbose=False
    )
    width = max(1, max(len(ids) for ids in tokens["input_ids"]))
    columns = {}
    for name in model.example:
        if name not in tokens:
            raise InputError(
                f"the tokenizer does not give {name}, which the model takes",
                got=", ".join(tokens),
            )
        fill = _pad_id(model) if name == "input_ids" else 0
        columns[name] = np.full((len(texts), width), fill, dtype=np.int64)  # [batch, width]
        for row, values in zip(columns[name], tokens[name], strict=True):
            row[: len(values)] = values
    return columns


def _images(images: Sequence[Any], model: Model) -> dict[str, np.ndarray]:
    if model.preprocess is None or not model.is_image:
        raise InputError(
            "images for a model that has no preprocessing of images",
            got=model.source.path,
            allowed=f"arrays named {', '.join(model.example)} in an .npz",
        )
    arrays = [np.asarray(model.preprocess(open_image(image)), np.float32) for image in images]
    return {"pixel_values": np.stack(arrays)}  # [batch, channels, height, width]


def _arrays(samples: Sequence[Mapping[str, np.ndarray]], model: Model) -> dict[str, np.ndarray]:
    given, wanted = tuple(samples[0]), tuple(model.example)
    if set(wanted) <= set(given):
        source = {name: name for name in wanted}
    elif len(given) == len(wanted) and (len(given) == 1 or model.interface == "tensor"):
        source = dict(zip(wanted, given, strict=True))
    else:
        raise InputError("names of the arrays", got=", ".join(given), allowed=", ".join(wanted))
    return {
        name: _stack([sample[source[name]] for sample in samples], name, model) for name in wanted
    }


def _stack(arrays: Sequence[np.ndarray], name: str, model: Model) -> np.ndarray:
    if len({array.shape for array in arrays}) == 1 or any(a.ndim != 1 for a in arrays):
        return np.stack(arrays)
    fill = _pad_id(model) if name == "input_ids" else 0
    stacked = np.full((len(arrays), max(map(len, arrays))), fill, dtype=arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return stacked


def _checked(columns: Mapping[str, np.ndarray], model: Model, start: int) -> Batch:
    batch: Batch = {}
    for name, example in model.example.items():
        array, floating = columns[name], example.dtype.is_floating_point
        if array.dtype.kind not in ("fiub" if floating else "iub"):
            raise InputError(f"array {name}", got=array.dtype, allowed=str(example.dtype))
        # Sequences of tokens may have any length; images and features may not change shape.
        fixed = tuple(example.shape[1:]) if floating else ()
        if array.ndim != example.ndim or (floating and array.shape[1:] != fixed):
            raise InputError(
                f"shape of {name}",
                got=list(array.shape[1:]),
                allowed=f"{list(example.shape[1:])}, as in the model's example",
            )
        batch[name] = torch.from_numpy(np.ascontiguousarray(array)).to(example.dtype)
    if "input_ids" in batch:
        _check_tokens(batch["input_ids"], model, start)
    return batch


def _check_tokens(ids: torch.Tensor, model: Model, start: int) -> None:
    vocabulary = _vocabulary(model)
    if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        bad = (ids < 0) | (ids >= vocabulary)
        row = int(bad.any(1).nonzero()[0])
        raise InputError(
            "token ids outside the vocabulary",
            got=f"{int(ids[bad][0])} in encoded sample {start + row + 1}",
            allowed=f"0 to {vocabulary - 1}",
            next="use the tokenizer that belongs to the model",
        )
    positions = model.longest
    if positions is not None and ids.shape[1] > positions:
        raise InputError(
            "inputs longer than the model takes",
            got=f"{ids.shape[1]} tokens",
            allowed=f"{positions}",
            next="choose a smaller length",
        )


def _vocabulary(model: Model) -> int | None:
    getter = getattr(model.module, "get_input_embeddings", None)
    if getter is None:
        return None
    try:
        embedding = getter()
    except NotImplementedError:
        return None
    count = getattr(embedding, "num_embeddings", None)
    return int(count) if count is not None else None
