"""Packing against numpy.packbits; the formula against plain loops."""

import numpy as np
import pytest
import torch

from penjing.errors import InputError, UsageError
from penjing.planes import IntegerPlanes, Scheme, pack_bits, unpack_bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [0, 1, 7, 8, 13])
@pytest.mark.parametrize("rows", [0, 3])
def test_packing_is_numpys_little_endian_bit_order(bits: int, n: int, rows: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (rows, n), dtype=np.uint8)
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    wanted = np.packbits(stream.reshape(rows, n * bits), axis=1, bitorder="little")
    packed = pack_bits(torch.from_numpy(codes), bits)
    np.testing.assert_array_equal(packed.numpy(), wanted)
    np.testing.assert_array_equal(unpack_bits(packed, bits, n).numpy(), codes)


def random_planes(bits: tuple[int, ...], group: int, shape: tuple[int, ...]) -> IntegerPlanes:
    rng = np.random.default_rng(0)
    out, inputs = shape[0], int(np.prod(shape[1:]))
    groups = -(-inputs // group)
    codes = np.stack([rng.integers(0, 2**b, (out, inputs), dtype=np.uint8) for b in bits])
    return IntegerPlanes(
        torch.from_numpy(codes),
        bits,
        torch.from_numpy(rng.random((len(bits), out, groups), dtype=np.float32)),
        torch.from_numpy(rng.random((out, groups), dtype=np.float32)),
        group,
        shape,
    )


CASES = [((4,), 3, (2, 7)), ((1, 1, 1), 4, (3, 8)), ((2, 2), 9, (4, 1, 3, 3)), ((8,), 5, (2, 5))]


@pytest.mark.parametrize(("bits", "group", "shape"), CASES)
def test_the_formula_by_loops(bits: tuple[int, ...], group: int, shape: tuple[int, ...]) -> None:
    planes = random_planes(bits, group, shape)
    wanted = np.zeros(planes.codes.shape[1:])
    for o, i in np.ndindex(*wanted.shape):
        wanted[o, i] = float(planes.shift[o, i // group]) + sum(
            float(planes.scale[k, o, i // group]) * int(planes.codes[k, o, i])
            for k in range(len(bits))
        )
    found = planes.dequantize()
    assert found.shape == shape
    np.testing.assert_allclose(found.reshape(wanted.shape).numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize(("bits", "group", "shape"), CASES)
def test_stored_and_back(bits: tuple[int, ...], group: int, shape: tuple[int, ...]) -> None:
    planes = random_planes(bits, group, shape)
    tensors = planes.tensors()
    again = IntegerPlanes.from_tensors(tensors, planes.describe())
    assert torch.equal(again.dequantize(), planes.dequantize())
    assert planes.stored_bytes == sum(t.nbytes for t in tensors.values())
    out, inputs = planes.codes.shape[1:]
    rows = sum(-(-inputs * b // 8) for b in bits)
    assert planes.stored_bytes == out * (rows + 4 * (len(bits) + 1) * -(-inputs // group))


def test_zero_points_of_one_plane() -> None:
    scale, zero = torch.tensor([[[0.1, 0.7]]]), torch.tensor([[3.0, 128.0]])
    planes = IntegerPlanes(
        torch.zeros(1, 1, 4, dtype=torch.uint8), (8,), scale, -scale[0] * zero, 2
    )
    assert planes.zero_point.tolist() == zero.tolist()
    assert planes.shape == (1, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": (17,)},
        {"bits": (4, 4)},
        {"scale": torch.ones(1, 2, 1)},
        {"shift": torch.ones(2, 1)},
        {"group": 0},
        {"codes": torch.zeros(2, 6, dtype=torch.uint8)},
    ],
)
def test_planes_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    whole = {
        "codes": torch.zeros(1, 2, 6, dtype=torch.uint8),
        "bits": (4,),
        "scale": torch.ones(1, 2, 2),
        "shift": torch.ones(2, 2),
        "group": 3,
    }
    IntegerPlanes(**whole)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="integer planes"):
        IntegerPlanes(**(whole | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 10**12]},
        {"shape": [-2, 7]},
        {"shape": []},
        {"bits": [0]},
        {"bits": []},
        {"bits": [4, 4]},
        {"group": 0},
    ],
)
def test_a_description_that_lies_sizes_nothing(change: dict[str, object]) -> None:
    planes = random_planes((4,), 3, (2, 7))
    with pytest.raises(InputError, match="integer planes"):
        IntegerPlanes.from_tensors(planes.tensors(), planes.describe() | change)


@pytest.mark.parametrize("name", ["codes0", "scale", "shift"])
def test_a_missing_tensor_is_named(name: str) -> None:
    planes = random_planes((4,), 3, (2, 7))
    tensors = planes.tensors()
    del tensors[name]
    with pytest.raises(InputError, match=name.replace("codes0", "codes 0")):
        IntegerPlanes.from_tensors(tensors, planes.describe())


def test_schemes_are_checked() -> None:
    for bad in ({"bits": 1}, {"bits": 9}, {"bits": 4.0}, {"bits": True}):
        with pytest.raises(UsageError, match="bits"):
            Scheme(**bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="group"):
        Scheme(4, -1)
    with pytest.raises(UsageError, match="symmetric"):
        Scheme(4, 0, 1)  # type: ignore[arg-type]
    assert Scheme(4).levels == 15
    assert [Scheme(4, g).group_of(n) for g, n in ((0, 6), (4, 6), (64, 6), (0, 0))] == [6, 4, 6, 1]
