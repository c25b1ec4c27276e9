"""Top-1 accuracy: the share of samples whose largest logit is the label's.

accuracy = mean over samples of [argmax(logits) == label]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from penjing.data import Dataset, align
from penjing.errors import InputError
from penjing.model import Batch, Model

__all__ = ["Classification", "classes_of", "task"]


def classes_of(model: Model) -> int | None:
    """Logits of a sample, None where the output is not [batch, classes]."""
    if model.interface in ("weights", "embedding", "causal"):
        return None
    shape = _shape(model)
    return shape[1] if len(shape) == 2 else None


def _shape(model: Model) -> torch.Size:
    with torch.no_grad():
        return model.run({k: v.to(model.device) for k, v in model.example.items()}).shape


@dataclass(frozen=True)
class Classification:
    """Top-1 accuracy of logits [n, classes]."""

    metric: str = "top-1 accuracy"
    higher_is_better: bool = True
    relative: bool = False
    needs_reference: bool = False

    def check(self, dataset: Dataset, model: Model) -> None:
        """Refuse data without labels or with labels outside the model's classes.

        Raises:
            InputError: as said, with the label and how many samples have it.
        """
        if dataset.labels is None or dataset.labels.dtype.kind != "i":
            raise InputError(
                "classification needs a class for every sample",
                got=f"{dataset.path} without class labels",
                next="add a label column, or use the task fidelity",
            )
        if model.interface in ("weights", "embedding", "causal"):
            raise InputError(
                "classification needs a model that gives one logit a class",
                got=f"a model of kind {model.interface}",
                next="use the task retrieval, perplexity or fidelity",
            )
        shape = _shape(model)
        if len(shape) != 2:
            raise InputError("output of a classifier", got=list(shape), allowed="[batch, classes]")
        aligned = align(dataset, model)
        labels = np.asarray(aligned.labels)
        bad = labels[(labels < 0) | (labels >= shape[1])]
        if len(bad):
            label = int(bad[0])
            name = aligned.classes[label] if 0 <= label < len(aligned.classes) else str(label)
            count = int((labels == label).sum())
            raise InputError(
                "labels outside the model's classes",
                got=f"label {name} on {count} samples, {len(bad)} samples in all",
                allowed=f"0 to {shape[1] - 1}",
                next="correct the labels, or use the task fidelity",
            )

    def record(self, output: np.ndarray, batch: Batch, reference: np.ndarray | None) -> np.ndarray:
        """Predicted classes, int64 [n, 1], of logits [n, classes]."""
        predicted: np.ndarray = np.argmax(output, axis=1)
        return predicted[:, None]

    def rows(self, records: np.ndarray, dataset: Dataset) -> np.ndarray:
        """1 where the prediction is the label, else 0: float64 [n, 1]."""
        correct: np.ndarray = records[:, 0] == dataset.labels
        return correct[:, None].astype(np.float64)

    def reduce(self, rows: np.ndarray) -> float:
        """Share of correct samples."""
        return float(rows[:, 0].mean())


task = Classification()
