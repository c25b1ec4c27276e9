"""Sparse codes against numpy, the bytes against their formula, hostile parts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from penjing import sparsecodes
from penjing.errors import InputError
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import rtn

SHAPE = (33, 64)


def planes_of(
    bits: int, density: float, *, symmetric: bool = False, signs: bool = False, **more: Any
) -> IntegerPlanes:
    generator, shape = torch.Generator().manual_seed(bits), SHAPE
    weight = torch.randn(shape, generator=generator)
    if signs:  # none is so small that it is rounded to zero
        weight = weight.sign()
    weight[torch.rand(shape, generator=generator) >= density] = 0
    return rtn.fit(weight, Scheme(bits, 16, symmetric, **more), None)


@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_same_planes_come_back(bits: int, density: float, symmetric: bool) -> None:
    planes = planes_of(bits, density, symmetric=symmetric)
    parts = sparsecodes.tensors(planes)
    again = sparsecodes.from_tensors(parts, planes.describe())
    assert torch.equal(again.codes, planes.codes)
    assert torch.equal(again.dequantize(), planes.dequantize())
    assert again.describe() == planes.describe()
    zero = np.repeat(planes.zero_point.numpy(), 16, axis=1)
    kept = planes.codes[0].numpy() != zero
    np.testing.assert_array_equal(parts["bits"], np.packbits(kept, bitorder="little"))
    # The codes in order, each `bits` bits of one stream.
    stream = np.unpackbits(parts["codes0"][0].numpy(), bitorder="little")
    codes = stream[: kept.sum() * bits].reshape(-1, bits) @ (1 << np.arange(bits))
    np.testing.assert_array_equal(codes, planes.codes[0].numpy()[kept])
    size = sum(t.numel() * t.element_size() for t in parts.values())
    rest = planes.stored_bytes - 33 * math.ceil(64 * bits / 8)
    assert size == rest + math.ceil(33 * 64 / 8) + math.ceil(kept.sum() * bits / 8)
    assert sparsecodes.stored_bytes(planes) == size


@pytest.mark.parametrize("scale_bits", [32, 16, 8])
def test_scales_of_every_width_and_kernels(scale_bits: int) -> None:
    planes = planes_of(4, 0.4, scale_bits=scale_bits)
    kernel = replace(planes, shape=(33, 16, 2, 2))
    for one in (planes, kernel):
        again = sparsecodes.from_tensors(sparsecodes.tensors(one), one.describe())
        assert torch.equal(again.dequantize(), one.dequantize())


def test_it_pays_in_8_bits_sooner_than_in_4_and_never_in_1() -> None:
    # A bit for each weight against the codes that go: more than 1 / bits of them must.
    found = []
    for bits in (8, 4):
        made = (planes_of(bits, density, symmetric=True, signs=True) for density in (1, 0.78, 0.4))
        found.append([sparsecodes.pays(planes) for planes in made])
    assert found == [[False, True, True], [False, False, True]]
    scale = torch.ones(2, 33, 1)
    codes = torch.zeros(2, *SHAPE, dtype=torch.uint8)
    assert not sparsecodes.pays(IntegerPlanes(codes, (1, 1), scale, torch.zeros(33, 1), 64))


GOOD = planes_of(4, 0.5)
PARTS, ABOUT = sparsecodes.tensors(GOOD), GOOD.describe()
HOSTILE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "got: none": ({"bits": None}, {}),
    "codes of": ({"codes0": None}, {}),
    "bits set": ({"codes0": PARTS["codes0"][:, :-1]}, {}),
    "allowed: torch.uint8": ({"bits": PARTS["bits"][:-1]}, {}),
    "bits of a tensor": ({}, {"shape": [2**31, 2**31]}),
    "whole numbers": ({}, {"shape": [-33, 64]}),
    "description": ({}, {"shape": []}),
    "of sparse codes": ({}, {"bits": [4, 4]}),
    "1 to 8": ({}, {"bits": [16]}),
    "scale": ({"scale": PARTS["scale"][:, :-1]}, {}),
    "integer planes": ({}, {"group": 0}),
}


@pytest.mark.parametrize("words", HOSTILE)
def test_parts_that_do_not_fit_are_refused(words: str) -> None:
    parts, about = HOSTILE[words]
    given = {name: t for name, t in (PARTS | parts).items() if t is not None}
    with pytest.raises(InputError, match=words.replace("got: none", "got none|none")):
        sparsecodes.from_tensors(given, ABOUT | about)


def test_codes_without_zero_points_are_refused() -> None:
    parts = PARTS | {"table0": torch.zeros(16, 1, dtype=torch.int8), "shift": GOOD.shift}
    about = ABOUT | {"tables": [0], "dim": 1, "offset": "float"}
    with pytest.raises(InputError, match="one plane of integers"):
        sparsecodes.from_tensors(parts, about)
