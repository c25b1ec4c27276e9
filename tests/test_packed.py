"""The stored form of one weight, and its inverse for several planes."""

import pytest
import torch

from penjing import packed
from penjing.planes import IntegerPlanes


def planes(bits: tuple[int, ...], rows: int, width: int, group: int) -> IntegerPlanes:
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 2**b, (rows, width), generator=generator) for b in bits]
    groups = -(-width // group)
    scale = torch.rand(len(bits), rows, groups, generator=generator)
    return IntegerPlanes(torch.stack(codes).to(torch.uint8), bits, scale, -scale[0], group)


@pytest.mark.parametrize(
    ("bits", "shape", "group"),
    [((8,), (3, 4, 2), 8), ((4,), (3, 8), 3), ((1, 1, 1), (3, 8), 8), ((2, 2), (24,), 5)],
)
def test_there_and_back(bits: tuple[int, ...], shape: tuple[int, ...], group: int) -> None:
    rows = shape[0] if len(shape) > 1 else 1
    whole = planes(bits, rows, 24 // rows, group)
    wanted = whole.dequantize().reshape(shape)
    description, stored = packed.pack(whole, wanted)
    assert set(stored) == packed.keys(description)
    assert torch.equal(packed.unpack(dict(stored), description), wanted)


def test_values_beyond_a_dtype_are_cut_to_its_range() -> None:
    top = IntegerPlanes(
        torch.tensor([[[0, 3]]], dtype=torch.uint8),
        (2,),
        torch.tensor([[[50000.0]]]),
        torch.tensor([[-75000.0]]),
        2,
    )
    assert packed.restored(top, torch.float16).tolist() == [[-65504.0, 65504.0]]
    assert packed.restored(top, torch.float64).tolist() == [[-75000.0, 75000.0]]


def test_tables_and_shared_scales() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(1, 3, 2, generator=generator).expand(2, -1, -1).contiguous()
    tables = torch.randint(-9, 9, (2, 300, 4), generator=generator).to(torch.int8)
    codes = torch.randint(0, 300, (2, 3, 3), generator=generator).to(torch.int32)
    two = IntegerPlanes(codes, (9, 9), scale, -scale[0], 5, (3, 10), tables=tables)
    one = two.nested(1)
    ternary = IntegerPlanes(
        codes.remainder(3).to(torch.uint8), (1.6, 1.6), scale[..., :1].contiguous(),
        -2 * scale[0, :, :1], 3, offset="centre", centre=(1.0, 1.0), scale_bits=32,
    )  # fmt: skip
    for whole in (two, one, ternary, ternary.nested(1)):
        wanted = whole.dequantize()
        description, stored = packed.pack(whole, wanted)
        assert set(stored) == packed.keys(description)
        assert torch.equal(packed.unpack(dict(stored), description), wanted)
