"""The formula against plain loops, what is stored against its parts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from penjing import codebooks
from penjing.errors import InputError
from penjing.planes import IntegerPlanes, round_scales
from penjing.rotation import Rotation


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


def family(name: str, scale_bits: int = 32, group: int = 9) -> IntegerPlanes:
    """Random planes of a family, [5, 26]."""
    rng = np.random.default_rng(1)
    out, inputs, dim, window, names = 5, 26, 1, 1, ()
    bits: tuple[float, ...]
    tables, offset, centre, shared = None, "centre", (), False
    if name == "zero":
        bits, offset = (3,), "zero"
    elif name == "symmetric":
        bits, centre = (4,), (8.0,)
    elif name == "wide":
        bits, offset = (11,), "zero"
    elif name == "binary":
        bits, centre = (1, 1, 1), (0.5, 0.5, 0.5)
    elif name == "residual":
        bits, offset = (2, 1), "float"
    elif name == "ternary":
        bits, centre, shared = (1.6, 1.6), (1.0, 1.0), True
    elif name == "power2":
        bits, centre, names = (3,), (0.0,), ("power2-3",)
        tables = codebooks.table("power2-3").unsqueeze(0).clone()
    elif name == "additive":
        bits, centre, dim, shared = (4, 4, 9), (0.0, 0.0, 0.0), 8, True
        tables = torch.from_numpy(rng.integers(-100, 100, (3, 400, 8), dtype=np.int8))
        tables[1, :16] = tables[0, :16]
    else:
        bits, centre, window = (2,), (0.0,), 5
        tables = torch.from_numpy(rng.integers(-500, 500, (1, 1024, 1), dtype=np.int16))
    n, groups = -(-inputs // dim), -(-inputs // group)
    most = [3 if b == 1.6 else 2 ** int(b) for b in bits]
    if name == "additive":
        most[2] = 400
    codes = np.stack([rng.integers(0, m, (out, n)) for m in most])
    kind = torch.int32 if max(bits) > 8 else torch.uint8
    scale = torch.from_numpy(rng.random((len(bits), out, groups), dtype=np.float32) + 0.01)
    scale = round_scales(scale[:1].expand_as(scale) if shared else scale, scale_bits)
    if offset == "zero":
        shift = -scale[0] * torch.from_numpy(rng.integers(0, most[0], (out, groups))).float()
    elif offset == "centre":
        shift = -sum(c * own for c, own in zip(centre, scale, strict=True))
    else:
        drawn = torch.from_numpy(rng.standard_normal((out, groups), dtype=np.float32))
        shift = round_scales(drawn, scale_bits, signed=True)
    return IntegerPlanes(
        torch.from_numpy(codes).to(kind), bits, scale, shift, group, (out, inputs),
        tables=tables, table_names=names, window=window, scale_bits=scale_bits,
        offset=offset, centre=centre,
    )  # fmt: skip


FAMILIES = [
    "zero", "symmetric", "wide", "binary", "residual", "ternary", "power2", "additive", "trellis",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_by_loops(name: str) -> None:
    planes = family(name)
    codes, scale = planes.codes.numpy().astype(int), planes.scale.double().numpy()
    tables = None if planes.tables is None else planes.tables.numpy().astype(float)
    wanted = np.zeros((5, 26))
    for o, i in np.ndindex(5, 26):
        total = float(planes.shift[o, i // 9])
        for k, bits in enumerate(planes.bits):
            if tables is None:
                z = float(codes[k, o, i])
            elif planes.window == 1:
                z = tables[k, codes[k, o, i // planes.dim], i % planes.dim]
            else:
                past = [codes[k, o - late, i] if o >= late else 0 for late in range(planes.window)]
                z = tables[k, sum(c << (int(bits) * late) for late, c in enumerate(past)), 0]
            total += scale[k, o, i // 9] * z
        wanted[o, i] = total
    np.testing.assert_allclose(planes.dequantize().numpy(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale_bits", [32, 16, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_stored_and_back(name: str, scale_bits: int) -> None:
    planes = family(name, scale_bits)
    tensors = planes.tensors()
    description = json.loads(json.dumps(planes.describe()))
    again = IntegerPlanes.from_tensors(tensors, description)
    assert torch.equal(again.codes, planes.codes)
    assert torch.equal(again.dequantize(), planes.dequantize())
    assert again.describe() == planes.describe()
    assert again.stored_bytes == planes.stored_bytes == sum(t.nbytes for t in tensors.values())
    assert planes.stored_bits == 8 * planes.stored_bytes / 130
    for name in tensors:
        some = {k: t for k, t in tensors.items() if k != name}
        with pytest.raises(InputError, match="integer planes"):
            IntegerPlanes.from_tensors(some, description)
        with pytest.raises(InputError, match="integer planes"):
            IntegerPlanes.from_tensors(some | {name: tensors[name][:0]}, description)


@pytest.mark.parametrize(
    ("name", "scale_bits", "wanted"),
    [
        # 5 rows of 26 codes, 3 groups a row.
        ("zero", 32, 5 * 10 + 4 * 15 + 6),  # 78 bits; 15 zero points of 3 bits
        ("symmetric", 16, 5 * 13 + 2 * 15),
        ("binary", 8, 3 * 5 * 4 + 3 * (15 + 2)),
        ("residual", 16, 5 * 7 + 5 * 4 + 2 * 30 + 2 * 15),
        ("ternary", 16, 2 * 5 * 6 + 2 * 15),  # scales shared by both planes
        ("power2", 32, 5 * 10 + 4 * 15),  # its table has a name
        # 4 codes a row of 4, 4 and 9 bits; the second plane has the first one's table.
        ("additive", 16, 5 * (2 + 2 + 5) + 2 * 15 + 8 * (16 + 400)),
        ("trellis", 16, 5 * 7 + 2 * 15 + 2 * 1024),
    ],
)
def test_stored_bytes_by_hand(name: str, scale_bits: int, wanted: int) -> None:
    assert family(name, scale_bits).stored_bytes == wanted


LIES: list[dict[str, object]] = [
    {"bits": [40]}, {"bits": "4"}, {"bits": None}, {"bits": [4] * 99}, {"shape": [5, 10**15]},
    {"shape": [10**12, 26]}, {"shape": [2**70, 1]}, {"group": 10**9}, {"group": 0},
    {"dim": 10**9}, {"dim": 0}, {"dim": 7}, {"window": 99}, {"scale_bits": 4}, {"offset": "none"},
    {"centre": []}, {"centre": [float("nan")] * 3}, {"tables": [7, 8, 9]}, {"tables": ["x"] * 3},
    {"tables": [0]}, {"tables": [[], [], []]}, {"nested": [3]}, {"nested": [0]}, {"nested": [2]},
    {"nested": 2},
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_description_of_tables_that_lies(lie: dict[str, object]) -> None:
    planes = family("additive", 8)
    with pytest.raises(InputError):
        IntegerPlanes.from_tensors(planes.tensors(), planes.describe() | lie)


def test_a_code_beyond_its_table() -> None:
    planes = family("additive")
    tensors = planes.tensors()
    tensors["table2"] = tensors["table2"][:100]
    with pytest.raises(InputError, match="codes 2"):
        IntegerPlanes.from_tensors(tensors, planes.describe())
    trellis = family("trellis")
    tensors = trellis.tensors()
    tensors["table0"] = tensors["table0"][:1000]
    with pytest.raises(InputError, match="codes 0"):
        IntegerPlanes.from_tensors(tensors, trellis.describe())


def test_an_older_description_has_float_shifts() -> None:
    planes = replace(family("symmetric"), offset="float", centre=())
    assert set(planes.describe()) == {"bits", "group", "shape"}
    assert set(planes.tensors()) == {"codes0", "scale", "shift"}


@pytest.mark.parametrize(
    "change",
    [
        {"scale_bits": 16},
        {"offset": "zero"},
        {"offset": "centre", "centre": (0.25, 0.5)},
        {"offset": "centre", "centre": (0.25,)},
        {"offset": "somewhere"},
        {"window": 2},
        {"table_names": ("power2-3",) * 2},
        {"tables": torch.zeros(2, 4, 1)},
        {"tables": torch.zeros(1, 4, 1, dtype=torch.int8)},
        {"shape": (5, 25)},
        {"shape": (26, 5)},
        {"nested_scales": {2: (torch.ones(2, 5, 3), torch.ones(5, 3))}},
        {"nested_scales": {1: (torch.ones(2, 5, 3), torch.ones(5, 3))}},
    ],
)
def test_new_parts_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"integer planes|table names"):
        replace(family("residual"), **change)  # type: ignore[arg-type]


def test_a_name_of_another_table_is_refused() -> None:
    planes = family("power2")
    assert planes.tables is not None
    with pytest.raises(InputError, match="power2-3"):
        replace(planes, tables=planes.tables * 2)


def test_zero_points_that_codes_do_not_hold() -> None:
    planes = family("zero")
    with pytest.raises(InputError, match="zero points"):
        replace(planes, shift=-planes.scale[0] * 8)
    with pytest.raises(InputError, match="shift"):
        replace(planes, shift=planes.shift + 0.3 * planes.scale[0])
    for name in ("binary", "power2", "wide"):
        with pytest.raises(InputError, match="one plane of integers"):
            _ = family(name).zero_point


@pytest.mark.parametrize("scale_bits", [32, 16, 8])
@pytest.mark.parametrize("name", ["binary", "residual", "ternary", "additive"])
def test_nested_codes(name: str, scale_bits: int) -> None:
    planes = family(name, scale_bits)
    scale = round_scales(planes.scale[:1] * 1.7, scale_bits)
    shift = round_scales(planes.shift * 0.5, scale_bits, signed=True)
    if planes.offset == "centre":
        shift = -planes.centre[0] * scale[0]
    fitted = replace(planes, nested_scales={1: (scale, shift)})
    assert torch.equal(fitted.dequantize(), planes.dequantize())
    tensors = fitted.tensors()
    assert fitted.stored_bytes == sum(t.nbytes for t in tensors.values())
    shifts = planes.offset == "float"
    more = {32: 4 * 15, 16: 2 * 15, 8: 15 + 2}[scale_bits] * (1 + shifts)
    assert fitted.stored_bytes == planes.stored_bytes + more
    again = IntegerPlanes.from_tensors(tensors, fitted.describe())
    one = again.nested(1)
    z = planes.integers(0).float()
    spread = scale[0].repeat_interleave(9, 1)[:, :26], shift.repeat_interleave(9, 1)[:, :26]
    assert torch.allclose(one.dequantize(), spread[0] * z + spread[1], atol=1e-4)
    assert one.bits == planes.bits[:1]
    # Without a fit of its own a prefix keeps the scales of the whole.
    plain = planes.nested(1)
    assert torch.equal(plain.scale, planes.scale[:1])
    assert torch.equal(planes.nested(len(planes.bits)).dequantize(), planes.dequantize())
    assert IntegerPlanes.from_tensors(one.tensors(), one.describe()).stored_bytes < (
        planes.stored_bytes
    )
    for k in (0, len(planes.bits) + 1):
        with pytest.raises(InputError, match="planes"):
            planes.nested(k)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_at_all(shape: tuple[int, int]) -> None:
    groups = -(-shape[1] // 2)
    for offset, bits in (("zero", (4,)), ("float", (4,)), ("centre", (1.6,))):
        for scale_bits in (32, 16, 8):
            planes = IntegerPlanes(
                torch.zeros(1, *shape, dtype=torch.uint8), bits, torch.ones(1, shape[0], groups),
                torch.zeros(shape[0], groups), 2, shape, offset=offset,
                centre=(0.0,) if offset == "centre" else (), scale_bits=scale_bits,
            )  # fmt: skip
            again = IntegerPlanes.from_tensors(planes.tensors(), planes.describe())
            assert again.dequantize().shape == shape
            assert planes.stored_bytes == 0


def test_rotated_planes_stand_for_the_weight_before_the_rotation() -> None:
    plain = random_planes((3,), 24, (5, 24))
    turned = replace(plain, rotation=3)
    # Q by what it does to unit vectors; its rows are orthonormal.
    q = Rotation(24, 3).apply(torch.eye(24, dtype=torch.float64)).T.numpy()
    np.testing.assert_allclose(q @ q.T, np.eye(24), atol=1e-12)
    wanted = plain.dequantize().double().numpy() @ q
    np.testing.assert_allclose(turned.dequantize().numpy(), wanted, atol=1e-5)
    # The seed is all that is kept of it, and no bytes of a tensor.
    assert turned.stored_bytes == plain.stored_bytes
    assert turned.describe() == plain.describe() | {"rotation": 3}
    again = IntegerPlanes.from_tensors(turned.tensors(), turned.describe())
    assert torch.equal(again.dequantize(), turned.dequantize())
    assert turned.kind.endswith("rotated")


@pytest.mark.parametrize("rotation", [-1, 0.5, "0", True])
def test_a_description_with_a_rotation_that_is_none(rotation: object) -> None:
    planes = random_planes((3,), 24, (5, 24))
    with pytest.raises(InputError, match="rotation"):
        IntegerPlanes.from_tensors(planes.tensors(), planes.describe() | {"rotation": rotation})


def test_shapes_that_are_not_rotated() -> None:
    with pytest.raises(InputError, match="rotated integer planes"):
        replace(random_planes((3,), 18, (4, 2, 3, 3)), rotation=0)
    with pytest.raises(InputError, match="size of a rotation"):
        replace(random_planes((3,), 521, (2, 521)), rotation=0)
