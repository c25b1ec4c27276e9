"""Sentence similarity: do the cosines of pairs rank as people rank them.

Spearman correlation of cosine(embedding a, embedding b) and the score, ties by average rank
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penjing.data import Dataset
from penjing.errors import InputError
from penjing.model import Batch, Model

__all__ = ["Similarity", "task"]


@dataclass(frozen=True)
class Similarity:
    """Spearman correlation over pairs; outputs are embeddings [2 n, width], a and b in turn."""

    metric: str = "Spearman correlation"
    higher_is_better: bool = True
    relative: bool = False
    needs_reference: bool = False

    def check(self, dataset: Dataset, model: Model) -> None:
        """Refuse data that is not scored pairs and models that do not embed.

        Raises:
            InputError: as said.
        """
        if dataset.kind != "pairs" or dataset.labels is None:
            raise InputError(
                "similarity needs pairs of texts with scores",
                got=f"{dataset.kind} in {dataset.path}",
                allowed="columns text_a, text_b and score",
            )
        if model.interface != "embedding":
            raise InputError(
                "similarity needs a model that embeds texts",
                got=f"a model of kind {model.interface}",
            )
        if len(np.unique(dataset.labels)) < 2:
            raise InputError(
                "similarity needs scores that differ", got=f"{len(dataset)} equal scores"
            )

    def record(self, output: np.ndarray, batch: Batch, reference: np.ndarray | None) -> np.ndarray:
        """The embeddings in float32, [texts, width]."""
        return output.astype(np.float32)

    def rows(self, records: np.ndarray, dataset: Dataset) -> np.ndarray:
        """Dense ranks, from 0, of [cosine, score] of each pair among all: float64 [n, 2]."""
        first, second = records[0::2].astype(np.float64), records[1::2].astype(np.float64)
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        cosines = (first * second).sum(axis=1) / np.where(norms == 0, 1.0, norms)
        scores = np.asarray(dataset.labels, np.float64)
        ranks = [np.unique(side, return_inverse=True)[1] for side in (cosines, scores)]
        return np.stack(ranks, axis=1).astype(np.float64)

    def reduce(self, rows: np.ndarray) -> float:
        """Spearman correlation of any choice of `rows`, 0 where one side is constant.

        Dense ranks make this linear in n, without a sort, which the bootstrap needs.
        """
        first, second = (_average_ranks(side) for side in rows.astype(np.int64).T)
        spread = np.sqrt((first @ first) * (second @ second))
        return float(first @ second / spread) if spread else 0.0


def _average_ranks(dense: np.ndarray) -> np.ndarray:
    counts = np.bincount(dense)
    # k equal values that end at rank r share the rank r - (k - 1) / 2.
    average: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[dense]
    average -= average.mean()
    return average


task = Similarity()
