"""Planes as a sum of affine integers, which is what the kernels of runtimes compute.

    w = sum over t of scale_t * (code_t - zero_t) + rest

Exact: integers stay integers and a scale is at most halved. Planes whose sum is one uniform grid,
scale_k = m_k * scale_min with whole m_k in every group, become one term of code sum m_k code_k.
A zero point that lies between two integers is moved onto one by twice the codes at half the scale
where the same width holds those (1 bit in 2, 3 in 4, 5 to 7 in 8); what is left of it is `rest`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from penjing.planes import IntegerPlanes

__all__ = ["Term", "expressible", "terms_of", "width_of"]

_LEVELS = 256
_NEAR = 1e-4  # of a step; planes hold shifts in float32


@dataclass(frozen=True, eq=False)
class Term:
    """One affine plane.

    Attributes:
        codes: uint8 [rows, in].
        zero: uint8 [rows, groups].
        scale: float32 [rows, groups].
        top: the largest code there can be.
        group: inputs of a group, at most those there are.
    """

    codes: np.ndarray
    zero: np.ndarray
    scale: np.ndarray
    top: int
    group: int

    @property
    def width(self) -> int:
        """Bits that kernels store it in: 2, 4 or 8."""
        return width_of(max(self.top, int(self.zero.max(initial=0))))


def width_of(top: int) -> int:
    """Stored width of codes up to `top`: 2, 4 or 8."""
    return next(width for width in (2, 4, 8) if top < 2**width)


def expressible(planes: IntegerPlanes) -> str:
    """Why this is no sum of affine integers; empty when it is."""
    if planes.dim > 1 or planes.window > 1:
        return f"{planes.kind}, codes of {planes.dim * planes.window} weights at once"
    if max(planes.bits) > 8:
        return f"{planes.kind}, more than 8 a plane"
    if planes.tables is not None and int(planes.tables.max()) - int(planes.tables.min()) >= _LEVELS:
        return f"{planes.kind} of more than {_LEVELS} levels"
    return ""


def terms_of(planes: IntegerPlanes) -> tuple[list[Term], np.ndarray | None]:
    """The terms, and `rest`, float32 [rows, groups] or None where it is 0.

    Only of planes that are `expressible`.
    """
    shift = planes.shift.numpy().astype(np.float64)  # [rows, groups]
    group = min(planes.group, max(planes.inputs, 1))
    terms = []
    for k in range(len(planes.bits)):
        codes = planes.integers(k).numpy().astype(np.int16)
        scale = planes.scale[k].numpy()
        low, top = 0, _top(planes.bits[k])
        if planes.tables is not None:
            entries = planes.tables[k].numpy()
            low, top = int(entries.min()), int(entries.max())
        # Codes start at 0; the zero point makes up for it.
        zero = np.full(scale.shape, -low, np.uint8)
        term = Term((codes - low).astype(np.uint8), zero, scale, top - low, group)
        terms.append(term)
    if merged := _merged(terms):
        terms = [merged]
    # As many zero points as there are: each takes what it can of the shift.
    for index, term in enumerate(terms):
        own = shift
        if len(terms) > 1:
            middle = planes.centre[index] if planes.centre else 0.5 * term.top - term.zero
            own = -term.scale.astype(np.float64) * middle
        terms[index], took = _zeroed(term, own)
        shift = shift - took
    size = np.abs(np.stack([t.scale for t in terms])).max(0)
    if (np.abs(shift) <= _NEAR * size).all():
        return terms, None
    return terms, shift.astype(np.float32)


def _top(bits: float) -> int:
    return 2 if bits == 1.6 else 2 ** int(bits) - 1


def _merged(terms: list[Term]) -> Term | None:
    """One term for all, where their sum is a uniform grid."""
    if len(terms) == 1:
        return None
    scales = np.stack([t.scale for t in terms]).astype(np.float64)  # [terms, rows, groups]
    if not (scales > 0).all():
        return None
    least = scales.min(0)
    times = np.rint(scales / least)
    if (np.abs(scales - times * least) > 1e-6 * scales).any():
        return None
    tops = np.array([t.top for t in terms])
    top = int(np.einsum("t,tog->og", tops, times).max(initial=0))
    # A wider sum than its parts gains nothing.
    if top >= _LEVELS or width_of(top) > sum(width_of(t.top) for t in terms):
        return None
    group, inputs = terms[0].group, terms[0].codes.shape[1]
    codes = np.zeros(terms[0].codes.shape, np.int16)
    zero = np.zeros(least.shape, np.int16)
    for term, own in zip(terms, times.astype(np.int16), strict=True):
        codes += np.repeat(own, group, axis=1)[:, :inputs] * term.codes
        zero += own * term.zero
    parts = codes.astype(np.uint8), zero.astype(np.uint8), least.astype(np.float32)
    return Term(*parts, top, group)


def _zeroed(term: Term, shift: np.ndarray) -> tuple[Term, np.ndarray]:
    """The term with a zero point that takes what it can of `shift`, and what it took."""
    scale = term.scale.astype(np.float64)
    safe = np.where(scale == 0, 1, scale)
    wanted = np.where(scale == 0, 0, -shift / safe) + term.zero
    twice = np.rint(2 * wanted)
    half = np.abs(2 * wanted - twice).max(initial=0) < _NEAR and (twice % 2 == 1).any()
    if half and 0 <= twice.min() <= twice.max() and max(2 * term.top, twice.max()) < _LEVELS:
        doubled = replace(
            term,
            codes=term.codes * 2,
            zero=term.zero * 2,
            scale=term.scale / 2,
            top=2 * term.top,
        )
        if width_of(max(int(twice.max()), doubled.top)) == width_of(term.top):
            whole = replace(doubled, zero=twice.astype(np.uint8))
            return whole, _took(doubled, whole)
    limit = 2 ** width_of(term.top) - 1
    whole = replace(term, zero=np.clip(np.rint(wanted), 0, limit).astype(np.uint8))
    return whole, _took(term, whole)


def _took(before: Term, after: Term) -> np.ndarray:
    moved = after.zero.astype(np.float64) - before.zero
    return np.asarray(-after.scale.astype(np.float64) * moved)
