"""Bitmasks against numpy's packbits, the count of bytes against its formula, hostile parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from penjing import bitmask
from penjing.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = [(), (0,), (1,), (8,), (7, 9), (0, 3), (33, 64), (3, 4, 5, 2)]


def some(shape: tuple[int, ...], density: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(dtype)
    return values.masked_fill(torch.rand(shape, generator=generator) >= density, 0)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_the_same_bits_come_back(
    shape: tuple[int, ...], density: float, dtype: torch.dtype
) -> None:
    tensor = some(shape, density, dtype)
    parts = bitmask.pack(tensor)
    again = bitmask.unpack(parts, shape)
    assert (again.dtype, again.shape) == (dtype, tensor.shape)
    assert raw(again) == raw(tensor)
    kept = int((tensor != 0).sum())
    size = -(-tensor.numel() // 8) + kept * tensor.element_size()
    assert bitmask.stored_bytes(tensor) == size == sum(len(raw(p)) for p in parts.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_and_values_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    tensor = some(shape, 0.4)
    parts, array = bitmask.pack(tensor), tensor.numpy().reshape(-1)
    np.testing.assert_array_equal(parts["bits"], np.packbits(array != 0, bitorder="little"))
    np.testing.assert_array_equal(parts["values"], array[array != 0])


def test_negative_zeros_nan_and_tensors_that_lie_otherwise_in_memory() -> None:
    tensor = torch.tensor([[0.0, -0.0, float("nan")], [float("-inf"), 0.0, 1e-45]])
    for one in (tensor, tensor.T, tensor[:, ::2], tensor.expand(2, 2, 3)):
        assert raw(bitmask.unpack(bitmask.pack(one), one.shape)) == raw(one)


def test_it_pays_where_the_file_gets_smaller() -> None:
    # 4,096 floats are 16,384 bytes: 512 of bits and 4 for each value that stays.
    for gone, pays in ((0, False), (128, False), (150, False), (200, True), (4096, True)):
        tensor = torch.ones(64, 64)
        tensor.view(-1)[:gone] = 0
        assert bitmask.pays(tensor) is pays, gone
    assert not bitmask.pays(torch.zeros(4, 4))  # the names in the file's header are longer
    assert not bitmask.pays(torch.zeros(64, 64, dtype=torch.long))
    assert not bitmask.pays(torch.zeros(64, 64, device="meta"))


GOOD = bitmask.pack(some((7, 9), 0.5))
BITS, VALUES = GOOD["bits"], GOOD["values"]
SPILT = BITS.clone()
SPILT[-1] |= 128
FLIPPED = BITS.clone()
FLIPPED[0] ^= 1
HOSTILE = {
    "parts": ({"bits": BITS}, (7, 9)),
    "parts of a": ({"values": VALUES}, (7, 9)),
    "parts of": ({**GOOD, "more": VALUES}, (7, 9)),
    "its bits set": ({"bits": BITS, "values": VALUES[:-1]}, (7, 9)),
    "values of a bitmask": ({"bits": FLIPPED, "values": VALUES}, (7, 9)),
    "beyond its 63": ({"bits": SPILT, "values": VALUES}, (7, 9)),
    r"bits of a tensor \[7, 9\]": ({"bits": BITS[:-1], "values": VALUES}, (7, 9)),
    r"bits of a tensor \[8, 9\]": (GOOD, (8, 9)),
    r"uint8 \(1, 8\)": ({"bits": BITS.reshape(1, -1), "values": VALUES}, (7, 9)),
    "float32": ({"bits": BITS.float(), "values": VALUES}, (7, 9)),
    "one row": ({"bits": BITS, "values": VALUES.reshape(1, -1)}, (7, 9)),
    "floats": ({"bits": BITS, "values": VALUES.long()}, (7, 9)),
    "whole numbers": (GOOD, (-7, -9)),
    "from 0": (GOOD, (7, 9.0)),
    "2305843009213693952": (GOOD, (2**32, 2**32)),  # nothing of that size is made
}


@pytest.mark.parametrize("words", HOSTILE)
def test_parts_that_do_not_fit_are_refused(words: str) -> None:
    parts, shape = HOSTILE[words]
    with pytest.raises(InputError, match=words):
        bitmask.unpack(parts, shape)  # type: ignore[arg-type]
