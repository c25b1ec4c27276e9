"""Packing against numpy.packbits, and against base 3 written out."""

import numpy as np
import pytest
import torch

from penjing.errors import InputError
from penjing.packing import TERNARY, is_width, pack_bits, row_bytes, unpack_bits, values


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize(("rows", "n"), [(0, 5), (3, 0), (3, 1), (2, 8), (3, 13)])
def test_a_stream_of_bits_as_numpy_makes_it(bits: int, rows: int, n: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (rows, n))
    stream = (codes[..., None] >> np.arange(bits)) & 1
    wanted = np.packbits(stream.reshape(rows, n * bits).astype(np.uint8), axis=1, bitorder="little")
    kind = torch.uint8 if bits <= 8 else torch.int32
    packed = pack_bits(torch.from_numpy(codes).to(kind), bits)
    np.testing.assert_array_equal(packed.numpy(), wanted)
    assert packed.shape == (rows, row_bytes(n, bits))
    back = unpack_bits(packed, bits, n)
    assert back.dtype == kind
    np.testing.assert_array_equal(back.numpy(), codes)


@pytest.mark.parametrize(("rows", "n"), [(0, 5), (3, 0), (3, 1), (2, 5), (4, 384)])
def test_five_ternary_codes_are_a_number_in_base_three(rows: int, n: int) -> None:
    codes = np.random.default_rng(n).integers(0, 3, (rows, n))
    packed = pack_bits(torch.from_numpy(codes).to(torch.uint8), TERNARY).numpy()
    assert packed.shape == (rows, -(-n // 5)) == (rows, row_bytes(n, 1.6))
    for row, stored in zip(codes, packed, strict=True):
        digits = "".join(np.base_repr(int(b), 3).zfill(5)[::-1] for b in stored)
        assert digits[:n] == "".join(map(str, row))
    back = unpack_bits(torch.from_numpy(packed), TERNARY, n)
    np.testing.assert_array_equal(back.numpy(), codes)


def test_a_byte_that_no_ternary_codes_make() -> None:
    assert unpack_bits(torch.tensor([[242]], dtype=torch.uint8), 1.6, 5).tolist() == [[2] * 5]
    with pytest.raises(InputError, match="243"):
        unpack_bits(torch.tensor([[243]], dtype=torch.uint8), 1.6, 5)


def test_widths() -> None:
    assert [b for b in (0, 1, 1.6, 2.0, 3.2, 16, 17, True, "4") if is_width(b)] == [1, 1.6, 16]
    assert [values(b) for b in (1, 1.6, 4, 16)] == [2, 3, 16, 65536]
