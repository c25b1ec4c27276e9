"""Grids of a KV cache: what they round, what they refuse, and that offsets are exact."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.cache import CacheGrid, attention_layers, rounding_cache
from penjing.errors import InputError


def flat(bits: int, scale: float, offset: float = 0.0) -> CacheGrid:
    scales, offsets = torch.full((1, 2), scale), torch.full((1, 2), offset)
    return CacheGrid(bits, scales, offsets, scales / 2, -offsets)


def test_codes_by_hand() -> None:
    grid = flat(4, 0.5, 1.0)
    x = torch.tensor([1.0, 1.2, 1.3, -9.0, 9.0, -2.9]).repeat(2, 1).T.reshape(1, 1, 6, 2)
    # 8 codes below the offset and 7 above it: -3 to 4.5.
    want = torch.tensor([1.0, 1.0, 1.5, -3.0, 4.5, -3.0])
    assert torch.allclose(grid.keys(x)[0, 0, :, 0], want)
    assert torch.allclose(flat(8, 0.5).values(torch.full((1, 1, 1, 2), 99.0)), torch.tensor(31.75))


def test_the_gradient_passes() -> None:
    x = torch.randn(1, 1, 3, 2, requires_grad=True)
    flat(4, 0.5).keys(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits of a KV cache; got 5; allowed: 8 or 4"),
        ({"key_scale": torch.ones(2)}, "scales of a KV cache; got "),
        ({"value_offset": torch.ones(1, 3)}, "scales of a KV cache; got "),
        ({"key_scale": torch.zeros(1, 2)}, "finite, and above 0"),
        ({"key_offset": torch.full((1, 2), torch.nan)}, "finite, and above 0"),
    ],
)
def test_bad_grids(change: dict[str, object], message: str) -> None:
    grid = flat(8, 1.0)
    with pytest.raises(InputError) as caught:
        CacheGrid(**({"bits": 8} | grid.tensors() | change))  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_bytes() -> None:
    assert flat(8, 1.0).bytes_per_token == 4
    assert flat(4, 1.0).bytes_per_token == 2


def test_the_places_in_the_cache() -> None:
    assert attention_layers(net.llama(2).module) == {
        0: "model.layers.0.self_attn", 1: "model.layers.1.self_attn",
    }  # fmt: skip


def test_a_cache_that_stores_nothing_gives_what_came_in() -> None:
    """A whole text in one call, the same numbers however often a block runs."""
    module = net.llama(1).module
    path = attention_layers(module)[0]
    grid = CacheGrid(8, *(torch.rand(4, 4) + 0.1 for _ in range(4)))
    cache = rounding_cache(module, {path: grid}, store=False)
    keys, values = torch.randn(2, 4, 3, 4), torch.randn(2, 4, 3, 4)
    for _ in range(2):
        got = cache.update(keys, values, 0)
        assert torch.equal(got[0], grid.keys(keys))
        assert torch.equal(got[1], grid.values(values))
    assert cache.get_seq_length() == 0
    kept = rounding_cache(module, {path: grid}, store=True)
    kept.update(keys, values, 0)
    assert kept.update(keys, values, 0)[0].shape == (2, 4, 6, 4)
