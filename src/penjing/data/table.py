"""Rows of named columns to a Dataset: a text, or two texts, and a label or a score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from penjing.data.dataset import Dataset, Kind
from penjing.data.labels import integer_labels, scores
from penjing.errors import InputError

__all__ = ["from_rows"]

PAIR = ("text_a", "text_b")
SCORE = "score"
LABEL = "label"


def from_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]], *, text: str, label: str, path: str
) -> Dataset:
    """A Dataset of `text` (or of `text_a` and `text_b`) and, where there is one, `label`.

    Args:
        rows: (place for errors such as `line 3`, columns of that row); the first row says
            which columns there are.
        text: column of the text.
        label: column of the label; pairs have `score` instead, or else a label.
        path: the file, for errors.

    Raises:
        InputError: no rows, a missing column, a text that is not one, a bad label.
    """
    places: list[str] = []
    samples: list[Any] = []
    values: list[Any] = []
    columns: tuple[str, ...] = ()
    target: str | None = None
    kind: Kind = "text"
    for place, row in rows:
        if not samples:
            kind, columns, target = _layout(row, text, label, f"{path} {place}")
        for column in columns if target is None else (*columns, target):
            if column not in row:
                raise _missing(column, row, f"{path} {place}", first=places[0] if places else None)
        if target is None and label in row:
            raise InputError(f"{path} {place}: a label here, none at {places[0]}")
        texts = tuple(row[column] for column in columns)
        for column, value in zip(columns, texts, strict=True):
            if not isinstance(value, str):
                raise InputError(
                    f"{path} {place}: {column} is not text",
                    got=type(value).__name__,
                    allowed="a string",
                )
        places.append(place)
        samples.append(texts if kind == "pairs" else texts[0])
        values.append(None if target is None else row[target])
    if not samples:
        raise InputError("no samples", got=path, next="the file is empty; add some")
    if target is None:
        return Dataset(kind, tuple(samples), path=path)
    if target == SCORE and kind == "pairs":
        return Dataset(kind, tuple(samples), scores(values, places, path), path=path)
    labels, classes = integer_labels(values, places, path)
    return Dataset(kind, tuple(samples), labels, classes, path)


def _layout(
    row: Mapping[str, Any], text: str, label: str, where: str
) -> tuple[Kind, tuple[str, ...], str | None]:
    if text in row:
        kind: Kind = "text"
        columns: tuple[str, ...] = (text,)
    elif all(column in row for column in PAIR):
        kind, columns = "pairs", PAIR
        if SCORE in row and label == LABEL:
            return kind, columns, SCORE
    else:
        raise _missing(text, row, where)
    if label in row:
        return kind, columns, label
    if label != LABEL:
        raise _missing(label, row, where)
    return kind, columns, None


def _missing(
    column: str, row: Mapping[str, Any], where: str, *, first: str | None = None
) -> InputError:
    """`first` is a row that has the column."""
    if first is not None:
        return InputError(
            f"{where}: no {column!r} here, {first} has one",
            got=", ".join(map(str, row)) or "no columns",
            allowed="the same columns in every row",
            next=f"add its {column!r}, or take the row out",
        )
    return InputError(
        f"{where}: no column {column!r}",
        got=", ".join(map(str, row)) or "no columns",
        next="name the columns of the text and of the label",
    )
