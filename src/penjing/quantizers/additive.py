"""Additive codebooks: eight weights are a sum of vectors of small integers, times a row's scale.

    w[o, 8j : 8j + 8] = scale[o, g] * sum over m of C_m[code_m[o, j]]

(AQLM, Egiazarian et al., arXiv 2401.06118, with int8 entries.) The codebooks are learned for the
layer, and counted as stored: residual k-means weighted by the root of H's diagonal; codes by a
beam search inside error feedback, later by coordinate descent; codebooks by least squares with
the whole H, by conjugate gradients.

8 * bits = sum of the widths K_m. A codebook of 2**K vectors takes 2**(K + 3) bytes, so K is the
largest for which all of them are at most `share` of the codes, and more codebooks take its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penjing import grids
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _feedback, _vector
from penjing.quantizers._kmeans import residual
from penjing.quantizers._vector import DIM, Vectors

__all__ = ["families", "fit", "needs", "widths"]

needs = frozenset({"gram"})
families = frozenset({"additive"})

# Vectors that k-means sees; entries learn little from more.
_SAMPLE = 32768
_ITERATIONS = 10
_BEAM = 6


def widths(bits: float, weights: int, share: float = 0.06) -> list[int]:
    """Bits of each codebook's codes for a layer of so many weights, the widest first."""
    total = round(bits * DIM)
    for most in (8, 7, 6, 5, 4, 3):
        count = -(-total // most)
        found = [total // count + (m < total % count) for m in range(count)]
        if sum(DIM * 2**k for k in found) <= share * weights * bits / 8:
            break
    return found


class _Additive:
    shared = True
    hasty = False

    def __init__(self, tables: Tensor, sizes: list[int]) -> None:
        self.tables, self.sizes = tables, sizes

    def choose(self, target: Tensor, scale: Tensor, metric: Tensor, now: Tensor | None) -> Tensor:
        x = target / scale[0].unsqueeze(1)
        if now is not None:
            return self._descend(x, metric, now)
        cost, left = torch.zeros(len(x), 1), x.unsqueeze(1)  # [out, beam], [out, beam, 8]
        codes = torch.zeros(len(x), 1, 0, dtype=torch.int64)
        for table, size in zip(self.tables, self.sizes, strict=True):
            own = table[: 2**size]
            image = own @ metric
            step = (image * own).sum(1) - 2 * left @ image.T + cost.unsqueeze(2)
            last = codes.shape[2] == len(self.sizes) - 1
            beam = 1 if last or self.hasty else _BEAM
            flat = step.flatten(1)  # [out, beam * entries]
            cost, best = flat.topk(min(beam, flat.shape[1]), 1, largest=False)
            parent, code = best // 2**size, best % 2**size
            left = left.gather(1, parent.unsqueeze(2).expand(-1, -1, DIM)) - own[code]
            before = codes.gather(1, parent.unsqueeze(2).expand(-1, -1, codes.shape[2]))
            codes = torch.cat([before, code.unsqueeze(2)], 2)
        return codes[:, 0].T

    def _descend(self, x: Tensor, metric: Tensor, now: Tensor) -> Tensor:
        codes = now.clone()
        parts = torch.stack([t[c] for t, c in zip(self.tables, codes, strict=True)])
        left = x - parts.sum(0)
        for m, size in enumerate(self.sizes):
            own = self.tables[m, : 2**size]
            left += parts[m]
            image = own @ metric
            codes[m] = torch.addmm((image * own).sum(1), left, image.T, alpha=-2).argmin(1)
            left -= own[codes[m]]
        return codes

    def learn(self, weight: Tensor, found: Vectors, gram: Tensor) -> None:
        """Conjugate gradients on the codebooks, started at what they are."""
        pad = (0, -weight.shape[1] % DIM)
        scale = found.scale[0].repeat_interleave(found.group, dim=-1)[:, : found.inputs]

        def back(y: Tensor) -> Tensor:  # adjoint of tables -> weight
            rows = torch.nn.functional.pad(y * scale, pad).reshape(-1, DIM)
            total = torch.zeros_like(self.tables)
            for part, codes in zip(total, found.codes, strict=True):
                part.index_add_(0, codes.flatten(), rows)
            return total

        ease = back(scale * gram.diagonal())
        ease += 1e-3 * ease.mean() + 1e-20
        rest = back((weight - found.dequantize(self.tables)) @ gram)
        ahead = direction = rest / ease
        slope = (rest * ahead).sum()
        for _ in range(_ITERATIONS):
            image = back(found.dequantize(direction) @ gram)
            curve = (direction * image).sum()
            if float(curve) <= 0:
                break
            self.tables = self.tables + slope / curve * direction
            rest = rest - slope / curve * image
            ahead = rest / ease
            turned = (rest * ahead).sum()
            direction, slope = ahead + turned / slope * direction, turned

    def freeze(self, found: Vectors) -> None:
        step = self.tables.abs().max() / 127
        if float(step) > 0:
            self.tables = (self.tables / step).round().clamp(-127, 127)
            found.scale = found.scale * step


def fit(weight: Tensor, scheme: Scheme, stats: Any = None, *, rounds: int = 3) -> IntegerPlanes:
    """Learn codebooks for this layer and fit it with them.

    Args:
        weight: [out, in].
        scheme: bits 1 to 4, group 0 or a multiple of 8, scale_bits; there is no shift.
        stats: its `gram` [in, in]; without one codes are the nearest sums.
        rounds: refits and passes of coordinate descent after the feedback.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width.
        UsageError: a group that is no multiple of 8.
    """
    weight = grids.check_weight(weight)
    sizes = widths(float(scheme.bits), weight.numel())
    gram = _feedback.check_gram(weight, stats)
    # The root: columns of great weight would pull entries away from all other columns.
    diagonal = (
        torch.ones(weight.shape[1]) if gram is None else _feedback.damped(gram).diagonal().sqrt()
    )
    pad = (0, -weight.shape[1] % DIM)
    size = weight.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    points = torch.nn.functional.pad(weight / size, pad).reshape(-1, DIM)
    weights = torch.nn.functional.pad(diagonal, pad).expand(len(weight), -1).reshape(-1, DIM)
    stride = max(1, len(points) // _SAMPLE)
    code = _Additive(residual(points[::stride], weights[::stride], sizes), sizes)
    found = _vector.fit(weight, code, torch.ones(len(sizes)), scheme, stats, rounds=rounds)
    return IntegerPlanes(
        found.codes.to(torch.uint8),
        tuple(sizes),
        found.scale,
        torch.zeros_like(found.scale[0]),
        found.group,
        tuple(weight.shape),
        tables=code.tables.to(torch.int8),
        scale_bits=scheme.scale_bits,
        offset="centre",
        centre=(0.0,) * len(sizes),
    )
