"""Perplexity of next tokens.

    exp(sum over tokens of -log p(token | those before it in its window) / tokens)

Texts are cut into windows (`penjing.data.windows`), and samples are windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from penjing.data import Dataset
from penjing.errors import InputError
from penjing.model import Batch, Model

__all__ = ["Perplexity", "task"]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of logits [n, length, vocabulary]; lower is better, drops are relative."""

    metric: str = "perplexity"
    higher_is_better: bool = False
    relative: bool = True
    needs_reference: bool = False

    def check(self, dataset: Dataset, model: Model) -> None:
        """Refuse models that predict no tokens and data that has none.

        Raises:
            InputError: as said.
        """
        if model.interface != "causal":
            raise InputError(
                "perplexity needs a causal language model",
                got=f"a model of kind {model.interface}",
                next="use the task retrieval, classification or fidelity",
            )
        tokens = dataset.kind == "arrays" and "input_ids" in dataset.samples[0]
        if dataset.kind != "text" and not tokens:
            raise InputError(
                "perplexity needs text", got=f"{dataset.kind} in {dataset.path}", allowed="text"
            )

    def record(self, output: np.ndarray, batch: Batch, reference: np.ndarray | None) -> np.ndarray:
        """[sum of negative log-likelihoods in nats, tokens predicted], float64 [n, 2]."""
        ids = batch["input_ids"].cpu()  # [n, length]
        mask = batch.get("attention_mask", torch.ones_like(ids)).cpu().bool()
        counted = mask[:, 1:] & mask[:, :-1]
        records = np.zeros((len(ids), 2))
        # One window at a time: a batch of logits is large and its log-softmax a second copy.
        for i, logits in enumerate(output):
            kept = counted[i]
            predicted = torch.from_numpy(logits[:-1][kept.numpy()]).float()  # [tokens, vocabulary]
            loss = functional.cross_entropy(predicted, ids[i, 1:][kept], reduction="none")
            records[i] = loss.double().sum().item(), kept.sum().item()
        return records

    def rows(self, records: np.ndarray, dataset: Dataset) -> np.ndarray:
        """The records themselves, float64 [n, 2]."""
        return records

    def reduce(self, rows: np.ndarray) -> float:
        """Perplexity over all tokens of `rows`; infinite where it is too large for a float."""
        loss, tokens = rows.sum(axis=0)
        mean = loss / tokens if tokens else math.inf
        return math.exp(mean) if mean < 700 else math.inf


task = Perplexity()
