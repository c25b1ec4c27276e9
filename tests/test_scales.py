"""Rounded scales against numpy's float16, and 8-bit codes by their definition."""

import numpy as np
import pytest
import torch

from penjing.errors import InputError, UsageError
from penjing.scales import centred, read, round_scales, scale_bytes, store

SHAPES = [(1, 3, 1), (2, 5, 7), (1, 70, 2), (1, 2, 0), (1, 0, 3)]


def random(shape: tuple[int, ...], seed: int = 0, *, signed: bool = False) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(-4, 2, shape)).astype(np.float32)
    return torch.from_numpy(values * rng.choice([-1, 1], shape) if signed else values).float()


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_once_is_rounded_for_good(
    bits: int, signed: bool, shape: tuple[int, int, int]
) -> None:
    for seed in range(20):
        scale = random(shape, seed, signed=signed)
        once = round_scales(scale, bits, signed=signed)
        assert torch.equal(round_scales(once, bits, signed=signed), once)
        stored = store("scale", once, bits, signed=signed)
        assert sum(t.nbytes for t in stored.values()) == scale_bytes(shape, bits)
        assert torch.equal(read(stored, "scale", shape, bits, signed=signed), once)
        if not signed:
            assert ((once > 0) == (scale > 0)).all()


def test_sixteen_bits_are_numpys_float16() -> None:
    scale = random((1, 50, 4))
    wanted = scale.numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(round_scales(scale, 16).numpy(), wanted)
    # Too small for float16, yet no group is lost.
    assert round_scales(torch.tensor([[1e-12, 0.0]]), 16).tolist() == [[2.0**-24, 0.0]]
    with pytest.raises(InputError, match="16 bits"):
        round_scales(torch.tensor([[7e4]]), 16)


def test_eight_bits_are_whole_steps_of_each_run() -> None:
    scale = random((2, 10, 20))  # 200 scales a plane: runs of 64, 64, 64, 8
    found = round_scales(scale, 8).numpy().reshape(2, 200)
    before = scale.numpy().reshape(2, 200)
    for plane in range(2):
        for start in range(0, 200, 64):
            own, was = (x[plane, start : start + 64] for x in (found, before))
            step = own.max() / np.float32(255)
            codes = own / step
            np.testing.assert_array_equal(codes, np.rint(codes))
            assert 1 <= codes.min() <= codes.max() == 255
            # A bfloat16 step is within 2**-9 of max / 255: half a step at the top.
            assert abs(own.max() - was.max()) <= was.max() * 2**-8
            near = was > step
            assert (np.abs(own - was)[near] <= 0.5 * step * 1.01 + was[near] * 2**-8).all()
    equal = torch.full((1, 6, 1), 0.37)
    assert float(round_scales(equal, 8).unique()) == pytest.approx(0.37, rel=2**-8)


def test_what_cannot_be_rounded_is_named() -> None:
    with pytest.raises(UsageError, match="scale_bits"):
        round_scales(torch.ones(1, 1), 4)
    with pytest.raises(InputError, match="at least 0"):
        round_scales(torch.tensor([[-1.0]]), 8)
    for bits in (16, 8):
        with pytest.raises(InputError, match="NaN"):
            round_scales(torch.tensor([[float("nan")]]), bits)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scale": None}, "scale of"),
        ({"scale": torch.zeros(1, 2, 3, dtype=torch.uint8)}, "scale of"),
        ({"scale": torch.zeros(1, 3, 2)}, "scale_step"),
        ({"scale_step": None}, "scale_step"),
        ({"scale_step": torch.ones(1, 2)}, "scale_step"),
    ],
)
def test_damaged_scales_are_refused(change: dict[str, torch.Tensor | None], match: str) -> None:
    stored = store("scale", round_scales(random((1, 3, 2)), 8), 8)
    read(stored, "scale", (1, 3, 2), 8)
    damaged = {k: t for k, t in (stored | change).items() if t is not None}
    with pytest.raises(InputError, match=match):
        read(damaged, "scale", (1, 3, 2), 8)
    with pytest.raises(InputError, match="floats"):
        read(stored, "scale", (1, 3, 2), 16)


def test_the_shift_of_centres() -> None:
    scale = torch.tensor([[[2.0]], [[3.0]]])
    assert centred(scale, (1.5, 0.5)).tolist() == [[-4.5]]
