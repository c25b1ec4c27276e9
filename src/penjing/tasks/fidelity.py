"""Fidelity to the original's outputs; no labels are needed.

    cosine:  mean over samples of cosine(original, output), 1 when nothing changed
    kl:      mean over samples of KL(softmax(original) || softmax(output)) in nats, 0 when nothing
             changed; of a text, the mean over its tokens
    error:   mean over samples of (output - original)^2 over the original's variance, 0 when nothing
             changed

Embeddings and free tensors are compared by cosine, logits by KL; one number a sample, of which
either is blind to nearly all, by its error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import log_softmax

from penjing.data import Dataset
from penjing.errors import InputError, UsageError
from penjing.model import Batch, Model

__all__ = ["Fidelity", "task"]


@dataclass(frozen=True)
class Fidelity:
    """Cosine, KL or error to the reference outputs of the original model."""

    metric: Literal["cosine", "kl", "error"] = "cosine"
    relative: bool = False
    needs_reference: bool = True

    @property
    def higher_is_better(self) -> bool:
        """A cosine should be high, a divergence or an error low."""
        return self.metric == "cosine"

    def bind(self, model: Model) -> Fidelity:
        """The fidelity that suits the model's output."""
        if model.gives_numbers:
            return Fidelity("error")
        logits = model.interface in ("classifier", "causal", "image")
        return Fidelity("kl" if logits else "cosine")

    def check(self, dataset: Dataset, model: Model) -> None:
        """Refuse a bare weight file, which has no output.

        Raises:
            InputError: as said.
        """
        if model.interface == "weights":
            raise InputError("a bare weight file cannot be run", got=model.source.path)

    def record(self, output: np.ndarray, batch: Batch, reference: np.ndarray | None) -> np.ndarray:
        """Cosine or KL of each sample, float64 [n, 1]; or squared error and reference [n, 2].

        Raises:
            UsageError: no reference, or one of another shape.
        """
        if reference is None or reference.shape != output.shape:
            raise UsageError(
                "fidelity needs the original's output for the same batch",
                got="none" if reference is None else f"shape {reference.shape}",
                allowed=f"shape {output.shape}",
            )
        if self.metric == "error":
            sides = (side.reshape(-1, 1).astype(np.float64) for side in (output, reference))
            ours, theirs = sides
            return np.concatenate([(ours - theirs) ** 2, theirs], axis=1)
        if self.metric == "cosine":
            return _cosine(output, reference)
        values = np.empty((len(output), 1))
        mask = batch["attention_mask"].cpu().numpy() if "attention_mask" in batch else None
        # One sample at a time: a batch of token logits in float64 would be several copies.
        for i, (ours, theirs) in enumerate(zip(output, reference, strict=True)):
            if ours.ndim == 2 and mask is not None:
                kept = mask[i].astype(bool)
                ours, theirs = ours[kept], theirs[kept]  # [tokens, vocabulary]
            values[i, 0] = _kl(ours, theirs)
        return values

    def rows(self, records: np.ndarray, dataset: Dataset) -> np.ndarray:
        """The records themselves."""
        return records

    def reduce(self, rows: np.ndarray) -> float:
        """Mean over samples; of errors over the variance of the reference."""
        mean = float(rows[:, 0].mean())
        if self.metric == "error":
            mean /= float(rows[:, 1].var()) or 1.0
        return mean


def _cosine(output: np.ndarray, reference: np.ndarray) -> np.ndarray:
    units, zero = [], []
    for side in (output, reference):
        flat = side.reshape(len(side), -1).astype(np.float64)
        norms = np.linalg.norm(flat, axis=1, keepdims=True)
        units.append(flat / np.where(norms == 0, 1.0, norms))
        zero.append(norms == 0)
    # cos = 1 - |u - v|^2 / 2 for unit vectors: exactly 1 for equal ones, and precise near them.
    distance = ((units[0] - units[1]) ** 2).sum(axis=1, keepdims=True)
    return np.where(zero[0] ^ zero[1], 0.0, 1.0 - distance / 2)  # [n, 1]


def _kl(output: np.ndarray, reference: np.ndarray) -> float:
    q = log_softmax(output.astype(np.float64), axis=-1)
    p = log_softmax(reference.astype(np.float64), axis=-1)
    probability = np.exp(p)
    # A class that the original gives no probability adds nothing, also where log p is -inf.
    with np.errstate(invalid="ignore"):
        terms = np.where(probability > 0, probability * (p - q), 0.0)
    return float(terms.sum(axis=-1).mean()) if terms.size else 0.0


task = Fidelity()
