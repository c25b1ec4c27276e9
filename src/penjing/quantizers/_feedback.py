"""Error feedback for every family of codes: what one choice costs, the later columns repair.

Minimises tr((W - Q) H (W - Q)^T), d columns at a time (GPTQ, Frantar et al., arXiv 2210.17323;
with vectors: QuIP#, Tseng et al., arXiv 2402.04396). With U upper, U^T U = (H + lambda I)^-1
and g the columns of one place:

    run      q_g = assign(w_g);  e = (w_g - q_g) U[g, g]^-1;  w_k -= e U[g, k]  for k after g
    polish   q_g = assign(q_g + ((W - Q) H)_g H[g, g]^-1), all other columns held

What `assign` is to minimise is e M e^T for e = w_g - q_g: M = (U[g, g]^T U[g, g])^-1 in `run`,
the cost when all columns still to come are ideal, and M = H[g, g] in `polish`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penjing import linalg
from penjing.errors import InputError

__all__ = [
    "Assign", "Factor", "act_order", "check_gram", "damped", "factor", "loss", "polish", "run",
]  # fmt: skip

# assign(columns [out, d], place) -> quantized [out, d]; columns place * d and on.
Assign = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Factor:
    """U in working order and what follows from it.

    Attributes:
        upper: float32 [n, n], n the inputs padded to whole places.
        order: places in working order.
        width: columns of a place, d.
        inverse: float32 [places, d, d] by place, U[g, g]^-1.
    """

    upper: Tensor
    order: Tensor
    width: int
    inverse: Tensor

    def metric(self, place: int) -> Tensor:
        """M of `run` at a place, [d, d]."""
        inverse = self.inverse[place]
        return inverse @ inverse.T


def check_gram(weight: Tensor, stats: Any) -> Tensor | None:
    """The Gram matrix of `stats` for a weight [out, in], float64, or None.

    Raises:
        InputError: a Gram matrix of another width, or with NaN or infinite values.
    """
    gram: Tensor | None = getattr(stats, "gram", None)
    wanted = (weight.shape[1], weight.shape[1])
    if gram is not None and tuple(gram.shape) != wanted:
        raise InputError("Gram matrix", got=tuple(gram.shape), allowed=wanted)
    if gram is not None and not bool(torch.isfinite(gram).all()):
        raise InputError("a Gram matrix has NaN or infinite values", next="check the data")
    return gram


def loss(error: Tensor, gram: Tensor) -> Tensor:
    """e H e^T of each row of `error` [out, in], [out]."""
    return ((error @ gram) * error).sum(1)


def damped(gram: Tensor, width: int = 1, damping: float = 0.01) -> Tensor:
    """H + lambda I, float32, padded to a multiple of `width`; padding and dead inputs have 1."""
    pad = -gram.shape[0] % width
    gram = torch.nn.functional.pad(gram.double(), (0, pad, 0, pad))
    diagonal = gram.diagonal()
    mean = diagonal[diagonal > 0].mean() if bool((diagonal > 0).any()) else diagonal.new_ones(())
    # In units of the mean diagonal, so that float32 does for every size of activation.
    return (gram / mean + torch.diag((diagonal == 0).double() + damping)).float()


def act_order(gram: Tensor, width: int = 1) -> Tensor:
    """Places by descending sum of H's diagonal; those that weigh most choose first."""
    diagonal = torch.nn.functional.pad(gram.diagonal(), (0, -gram.shape[0] % width))
    return diagonal.reshape(-1, width).sum(1).argsort(descending=True, stable=True)


def factor(
    gram: Tensor, *, order: Tensor | None = None, width: int = 1, damping: float = 0.01
) -> Factor:
    """Factor H for `run`.

    Args:
        gram: [in, in].
        order: permutation of the ceil(in / width) places; act-order without one.
        width: columns of a place.
        damping: lambda as a fraction of the mean diagonal.

    Raises:
        InputError: as `linalg.inverse_cholesky_upper`.
    """
    order = act_order(gram, width) if order is None else order
    pad = -gram.shape[0] % width
    padded = torch.nn.functional.pad(gram, (0, pad, 0, pad))  # a dead input disturbs nothing
    columns = (order.unsqueeze(1) * width + torch.arange(width)).flatten()
    upper = linalg.inverse_cholesky_upper(padded[columns][:, columns], damping)
    places = torch.arange(len(order))
    blocks = upper.reshape(len(order), width, len(order), width)[places, :, places]
    eye = torch.eye(width, dtype=upper.dtype).expand_as(blocks)
    inverse = torch.empty_like(blocks)
    inverse[order] = torch.linalg.solve_triangular(blocks, eye, upper=True)
    return Factor(upper.float(), order, width, inverse.float())


def run(
    weight: Tensor,
    gram: Tensor | Factor,
    assign: Assign,
    *,
    order: Tensor | None = None,
    width: int = 1,
    damping: float = 0.01,
    block: int = 128,
) -> Tensor:
    """Quantize place by place with error feedback.

    Args:
        weight: float32 [out, in]; left as it is.
        gram: H [in, in], or what `factor` made of it; then order, width, damping are its own.
        assign: chooses the codes of one place and gives back what they stand for.
        order: permutation of the places; act-order without one.
        width: columns of a place. The last place is padded with zero columns of no importance.
        damping: lambda as a fraction of the mean diagonal.
        block: columns whose updates are made together on the columns after them.

    Returns:
        Q, float32 [out, in].

    Raises:
        InputError: as `factor`.
    """
    made = gram
    if isinstance(made, Tensor):
        made = factor(made, order=order, width=width, damping=damping)
    out, inputs = weight.shape
    d, upper = made.width, made.upper
    places = made.order.tolist()
    columns = (made.order.unsqueeze(1) * d + torch.arange(d)).flatten()
    padded = torch.nn.functional.pad(weight, (0, -inputs % d))
    # Transposed, so that a column of the weight is contiguous.
    rest = padded.T[columns]  # [n, out]
    quantized = torch.empty_like(rest)
    stride = max(block // d, 1) * d
    for start in range(0, len(rest), stride):
        stop = min(start + stride, len(rest))
        errors = torch.empty(stop - start, out)
        for j in range(start, stop, d):
            place = places[j // d]
            chosen = assign(rest[j : j + d].T, place).T  # [d, out]
            quantized[j : j + d] = chosen
            error = errors[j - start : j - start + d]
            _times(made.inverse[place].T, rest[j : j + d] - chosen, out=error)
            if j + d < stop:
                _take(rest[j + d : stop], upper[j : j + d, j + d : stop].T, error)
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    unordered = torch.empty_like(quantized)
    unordered[columns] = quantized
    return unordered.T[:, :inputs].contiguous()


def _times(matrix: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """matrix [d, d] @ rows [d, out]; a product of matrices is slow to call for a single number."""
    if len(matrix) == 1:
        return torch.mul(rows, matrix, out=out)
    return torch.mm(matrix, rows, out=out)


def _take(rest: Tensor, matrix: Tensor, rows: Tensor) -> None:
    """Subtract matrix [n, d] @ rows [d, out] from `rest` [n, out]; as `_times`."""
    if len(rows) == 1:
        rest.addcmul_(matrix, rows, value=-1)
    else:
        rest.addmm_(matrix, rows, alpha=-1)


def polish(
    weight: Tensor,
    quantized: Tensor,
    gram: Tensor,
    assign: Assign,
    *,
    width: int = 1,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """One pass of coordinate descent over all places of a code that is already there.

    Args:
        weight: float32 [out, in].
        quantized: Q [out, in].
        gram: what `damped` made of H, with the same width.
        assign: as in `run`; must give what is there, or better under M = H[g, g].
        width: columns of a place.
        block: columns whose updates are made together on the others.

    Returns:
        The new Q, float32 [out, in], and (w - q) H (w - q)^T of each row, [out]; none has grown.
    """
    inputs = weight.shape[1]
    d, n = width, len(gram)
    pad = (0, n - inputs)
    now = torch.nn.functional.pad(quantized, pad).T.contiguous()  # [n, out]
    wanted = torch.nn.functional.pad(weight, pad).T
    residual = gram @ (wanted - now)  # [n, out]
    places = torch.arange(n // d)
    blocks = gram.reshape(n // d, d, n // d, d)[places, :, places]
    inverse = torch.linalg.inv(blocks.double()).float()
    stride = max(block // d, 1) * d
    for start in range(0, n, stride):
        stop = min(start + stride, n)
        changes = torch.empty(stop - start, now.shape[1])
        for j in range(start, stop, d):
            own = slice(j, j + d)
            change = changes[j - start : j - start + d]
            target = _times(inverse[j // d], residual[own]).add_(now[own])
            chosen = assign(target.T, j // d).T
            torch.sub(chosen, now[own], out=change)
            now[own] = chosen
            _take(residual[start:stop], gram[start:stop, own], change)
        for side in (slice(0, start), slice(stop, n)):
            residual[side].addmm_(gram[side, start:stop], changes, alpha=-1)
    return now.T[:, :inputs].contiguous(), ((wanted - now) * residual).sum(0)
