"""How many connections each layer loses, where layers are ranked against each other.

All connections whose score is under one threshold would go, and the threshold is where the wanted
fraction of all does. A pruner's score is what the loss of the whole network rises by when one
connection goes and the others of its row are refitted, in nats,

    F_ii w_ij^2 / (2 [H^-1]_jj)

(optimal brain surgeon, Hassibi and Stork 1993, with the Fisher information F of the outputs, see
`penjing.gradients`). It is true of a few connections and not of most of a layer, so that no layer
goes far from the others (as OWL bounds it, Yin et al., arXiv 2310.05175, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Stream, units_of
from penjing.errors import UsageError
from penjing.linalg import damped_cholesky
from penjing.model import Batch, Model
from penjing.registry import choices, constant, lookup
from penjing.steps._candidates import statistics
from penjing.steps._problem import Problem

if TYPE_CHECKING:
    from penjing.steps.prune import Prune

__all__ = ["REACH", "check_comparable", "fractions"]

REACH = 0.1
"""How far the fraction of a layer may be from the wanted one; of what stays, never below a half."""

# A layer's scores are remembered as so many of them, in their order.
_QUANTILES = 2049


def check_comparable(criterion: str) -> None:
    """Refuse a criterion whose scores of different layers cannot be compared.

    Raises:
        UsageError: as said.
    """
    absolute = (n for n in choices("criteria") if constant("criteria", n, "absolute", False))
    known = (*choices("pruners"), *absolute)
    if criterion not in known:
        raise UsageError(
            f"ranking global by {criterion}", allowed=", ".join(known),
            next="its scores are compared within a layer: leave the ranking out",
        )  # fmt: skip


def fractions(model: Model, step: Prune, batches: Sequence[Batch]) -> dict[str, float]:
    """Fraction of each layer's connections that goes, by path.

    Raises:
        UsageError: no data.
    """
    if not batches:
        raise UsageError("ranking global needs data", next="give --data")
    layers: dict[str, nn.Module] = {}
    for unit in units_of(model, Stream(model, batches[:1])):
        layers |= step.layers(unit)
    curves, sizes = {}, {}
    needs = (step.needs | {"fisher-diagonal"} if "gram" in step.needs else step.needs) - {"cross"}
    for found in statistics(model, batches, layers, needs):
        for path, stats in found.items():
            layer = layers[path]
            score = _scores(step, layer, stats)
            if score is not None:
                curves[path], sizes[path] = _curve(score), score.numel()
    # Layers that have no scores stay as they are, and the step says why.
    return dict.fromkeys(layers, 0.0) | _shared(curves, sizes, step.sparsity)


def _scores(step: Prune, layer: nn.Module, stats: LayerStats) -> Tensor | None:
    """[out, in]; None where the step leaves the layer."""
    weight: Tensor = layer.weight.detach().float().flatten(1)  # type: ignore[operator]
    if step.criterion not in choices("pruners"):
        if stats.gradient is None:
            return None
        made: Tensor = lookup("criteria", step.criterion, "score")(weight, stats)
        return made
    if stats.gram is None:
        return None
    gram = Problem.of(layer, weight, stats, means=step.bias).gram
    inverse = torch.cholesky_inverse(damped_cholesky(gram, 0.01)).diagonal()  # [in]
    if stats.fisher is None:  # the loss does not depend on it
        return torch.zeros_like(weight)
    lost = stats.fisher.unsqueeze(1) * weight.double().square() / inverse / 2
    return lost.float()


def _curve(score: Tensor) -> np.ndarray:
    """Logarithms of scores at equal distances in their order, ascending."""
    ordered = score.flatten().abs().clamp_min(1e-30).log().sort().values
    places = torch.linspace(0, len(ordered) - 1, min(_QUANTILES, len(ordered))).round().long()
    return ordered[places].double().numpy()


def _shared(
    curves: dict[str, np.ndarray], sizes: dict[str, int], wanted: float
) -> dict[str, float]:
    """Of each layer what is under the threshold, by halving, in reach of the wanted."""
    if not curves:
        return {}
    low = min(float(c[0]) for c in curves.values()) - 1
    high = max(float(c[-1]) for c in curves.values()) + 1
    weights = np.array([sizes[path] for path in curves], dtype=float)
    least, most = max(0.0, wanted - REACH), min(wanted + REACH, (1 + wanted) / 2)

    def under(threshold: float) -> np.ndarray:
        found = [np.interp(threshold, c, np.linspace(0, 1, len(c))) for c in curves.values()]
        return np.clip(found, least, most)

    for _ in range(60):
        middle = (low + high) / 2
        enough = float((under(middle) * weights).sum()) >= wanted * weights.sum()
        low, high = (low, middle) if enough else (middle, high)
    return {path: round(float(part), 5) for path, part in zip(curves, under(high), strict=True)}
