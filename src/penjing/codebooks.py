"""Tables of small integers that need not be stored, because their name gives them.

power2-b   2**b numbers: 0, then +1, -1, +2, -2, +4, ...: the last power has no minus
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from penjing.errors import InputError

__all__ = ["NAMES", "table"]


def _power2(bits: int) -> Tensor:
    numbers = [0]
    for power in range(2**bits // 2):
        numbers += [2**power, -(2**power)]
    return torch.tensor(numbers[: 2**bits], dtype=torch.int16).unsqueeze(1)


_MAKERS = {f"power2-{bits}": functools.partial(_power2, bits) for bits in (2, 3, 4)}
NAMES = tuple(_MAKERS)


@functools.cache
def table(name: str) -> Tensor:
    """The table [entries, dim] of this name, int8 or int16; not to be written to.

    Raises:
        InputError: an unknown name.
    """
    if name not in _MAKERS:
        raise InputError("name of a codebook", got=repr(name), allowed=", ".join(NAMES))
    return _MAKERS[name]()
