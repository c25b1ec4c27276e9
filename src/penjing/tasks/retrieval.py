"""Label retrieval: does the nearest other sample have the same label.

    mean over i of [label_i == label_j],  j = argmax over j != i of cosine(embedding_i, embedding_j)

Leave-one-out, exact, in blocks of rows; the lowest index wins among equally near ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penjing.data import Dataset
from penjing.errors import InputError
from penjing.model import Batch, Model

__all__ = ["Retrieval", "task"]

BLOCK = 1024


@dataclass(frozen=True)
class Retrieval:
    """Leave-one-out nearest-neighbour accuracy of embeddings [n, width]."""

    metric: str = "1-nearest-neighbour accuracy"
    higher_is_better: bool = True
    relative: bool = False
    needs_reference: bool = False

    def check(self, dataset: Dataset, model: Model) -> None:
        """Refuse data without labels, or in which no two samples share one.

        Raises:
            InputError: as said.
        """
        if dataset.labels is None or dataset.labels.dtype.kind != "i" or dataset.kind == "pairs":
            raise InputError(
                "retrieval needs a label for every sample",
                got=f"{dataset.path} without class labels",
                next="add a label column, or use the task fidelity",
            )
        if model.interface in ("weights", "causal"):
            raise InputError(
                "retrieval needs a model that gives one vector a sample",
                got=f"a model of kind {model.interface}",
                next="use the task perplexity or fidelity",
            )
        if len(np.unique(dataset.labels)) == len(dataset):
            raise InputError(
                "retrieval needs labels that at least two samples share",
                got=f"{len(dataset)} samples, every label once",
            )

    def record(self, output: np.ndarray, batch: Batch, reference: np.ndarray | None) -> np.ndarray:
        """Embeddings of length 1 in float32 [n, width]; a zero vector stays zero."""
        flat = output.reshape(len(output), -1).astype(np.float32)
        norms = np.linalg.norm(flat, axis=1, keepdims=True)
        return flat / np.where(norms == 0, np.float32(1), norms)

    def rows(self, records: np.ndarray, dataset: Dataset) -> np.ndarray:
        """1 where the nearest other sample has the label, else 0: float64 [n, 1]."""
        labels = np.asarray(dataset.labels)
        correct = np.empty((len(records), 1))
        for start in range(0, len(records), BLOCK):
            near = records[start : start + BLOCK] @ records.T  # [block, n]
            own = np.arange(len(near))
            near[own, start + own] = -np.inf
            correct[start : start + BLOCK, 0] = labels[near.argmax(axis=1)] == labels[start + own]
        return correct

    def reduce(self, rows: np.ndarray) -> float:
        """Share of samples whose nearest neighbour has their label."""
        return float(rows[:, 0].mean())


task = Retrieval()
