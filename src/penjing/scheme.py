"""Scheme: what kind of integers a weight is to be written in, and how many bits of them."""

from __future__ import annotations

from dataclasses import dataclass

from penjing.errors import UsageError

__all__ = ["FAMILIES", "WIDTHS", "Scheme"]

# Bits of a stored scale; the module imports nothing large, for the command's sake.
WIDTHS = (32, 16, 8)

_EIGHTHS = [n / 8 for n in range(8, 33)]
_BALLS = [1, 1.5, 1.75, 2, 2.5, 2.75, 3, 3.5, 3.75, 4]
# Weights that share a code, in families of vectors.
_VECTORS = {"additive": 8, "e8": 8, "trellis": 4}
# Bits a weight by family, and how they are said.
FAMILIES: dict[str, tuple[list[float], str]] = {
    "integer": ([*range(2, 9)], "a whole number from 2 to 8"),
    "binary": ([*range(1, 9)], "a whole number from 1 to 8"),
    "residual": ([*range(2, 9)], "a whole number from 2 to 8"),
    "ternary": ([1.6, 3.2, 4.8], "1.6, 3.2 or 4.8"),
    "power2": ([2, 3, 4], "2, 3 or 4"),
    "additive": (_EIGHTHS, "1 to 4 in steps of 1/8"),
    "e8": (_BALLS, ", ".join(f"{n:g}" for n in _BALLS)),
    "trellis": ([1, 2, 3, 4], "1, 2, 3 or 4"),
}


@dataclass(frozen=True)
class Scheme:
    """How a weight [out, in] is to be quantized.

    Attributes:
        bits: of codes a weight, scales not counted; what is allowed depends on `codes`.
        group: consecutive inputs that share a scale; 0 is the whole row.
        symmetric: the zero point is fixed in the middle.
        codes: the family: `integer`, one plane of numbers 0 to 2**bits - 1; `binary`, `bits`
            planes of +-1; `residual`, two planes that split the bits; `ternary`, planes of
            -1, 0, +1; `power2`, signed powers of two; `additive`, sums of 8-dimensional
            integer vectors; `e8`, points of that lattice; `trellis`, walks down the columns.
        scale_bits: 32, 16 or 8 of a scale; 8 is double quantization.
        paired: of symmetric 8-bit integers in whole rows: no two neighbours, columns 2k and 2k + 1,
            whose sum about the zero point is beyond +-128; see `penjing.grids.limits`.

    Raises:
        UsageError: a value outside these ranges.
    """

    bits: int | float
    group: int = 0
    symmetric: bool = False
    codes: str = "integer"
    scale_bits: int = 32
    paired: bool = False

    def __post_init__(self) -> None:
        if self.codes not in FAMILIES:
            raise UsageError("codes", got=repr(self.codes), allowed=", ".join(FAMILIES))
        allowed, said = FAMILIES[self.codes]
        whole = all(type(n) is int for n in allowed)
        fits = type(self.bits) is int or (not whole and type(self.bits) is float)
        if not fits or self.bits not in allowed:
            kind = "" if self.codes == "integer" else f" of {self.codes} codes"
            raise UsageError(f"bits{kind}", got=repr(self.bits), allowed=said)
        if type(self.group) is not int or self.group < 0:
            raise UsageError(
                "group", got=repr(self.group), allowed="a whole number; 0 is the whole row"
            )
        if self.group % (size := _VECTORS.get(self.codes, 1)):
            raise UsageError(
                f"group of {self.codes} codes", got=self.group, allowed=f"0 or a multiple of {size}"
            )
        if type(self.symmetric) is not bool:
            raise UsageError("symmetric", got=repr(self.symmetric), allowed="true or false")
        if self.scale_bits not in WIDTHS or type(self.scale_bits) is not int:
            raise UsageError("scale_bits", got=repr(self.scale_bits), allowed="32, 16 or 8")
        plain = (self.bits, self.group, self.symmetric, self.codes) == (8, 0, True, "integer")
        if self.paired and not plain:
            raise UsageError("paired codes", allowed="symmetric 8-bit integers, group 0")

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale in a weight of `inputs` columns, at least 1."""
        return min(self.group or inputs, inputs) or 1

    @property
    def levels(self) -> int:
        """The largest code of one plane with all the bits, 2**bits - 1."""
        return int(2**self.bits - 1)
