"""Cache: ranges by brute force, offsets that softmax does not see, stored and read back."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.cache import attention_layers
from penjing.errors import InputError, UsageError
from penjing.load import load
from penjing.recipe import Recipe
from penjing.steps.cache import Cache, grid
from penjing.steps.cut import Cut
from penjing.steps.shrink import Shrink
from penjing.storededits import pack, unpack
from penjing.writers.artifact import save


def data(count: int = 3) -> list[Any]:
    return [net.text_batch(seed, samples=4) for seed in range(count)]


def rounded(bits: int = 8) -> Any:
    return apply(net.llama(2), Recipe((Cache(bits),)), data()).model


@pytest.mark.parametrize("bits", [8, 4])
def test_the_grid_is_near_the_best_of_all(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(300, 1, 2), torch.tensor([[[9.0, -1.0]]])])
    weight = torch.full((301,), 1 / 301)
    scale, offset = grid(x, bits, weight)
    half = 2 ** (bits - 1)

    def error(scale: torch.Tensor, offset: torch.Tensor, channel: int) -> float:
        rows = x[:, 0, channel]
        codes = ((rows - offset) / scale).round().clamp(-half, half - 1)
        return float((codes * scale + offset - rows).square() @ weight)

    for channel in range(2):
        low, high = x[:, 0, channel].min(), x[:, 0, channel].max()
        steps = torch.linspace(0, 0.45, 46) * (high - low)
        best = min(
            error((high - b - low - a) / (2 * half - 1),
                  low + a + half * (high - b - low - a) / (2 * half - 1), channel)
            for a, b in itertools.product(steps, steps)
        )  # fmt: skip
        assert error(scale[0, channel], offset[0, channel], channel) < 1.1 * best


def test_a_heavy_token_is_not_clipped() -> None:
    """What the first token of a text is given weight for."""
    torch.manual_seed(0)
    x = torch.cat([torch.tensor([[[30.0]]]), torch.randn(5000, 1, 1)])
    weight = torch.cat([torch.tensor([0.2]), torch.full((5000,), 0.8 / 5000)])

    def top(weight: torch.Tensor) -> float:
        scale, offset = grid(x, 4, weight)
        return float(offset + 7 * scale)

    assert top(weight) > 29
    assert top(torch.full((5001,), 1 / 5001)) < 20


def test_a_channel_that_never_changes_is_exact() -> None:
    x = torch.full((10, 1, 3), 2.5)
    scale, offset = grid(x, 4, torch.full((10,), 0.1))
    codes = ((x - offset) / scale).round().clamp(-8, 7)
    assert torch.allclose(codes * scale + offset, x)


def test_four_bits_are_sixteen_times_as_coarse() -> None:
    done = {b: apply(net.llama(2), Recipe((Cache(b),)), data()).done for b in (8, 4)}
    for fine, coarse in zip(done[8], done[4], strict=True):
        for name in ("key_error", "value_error"):
            assert 10 < coarse.note[name] / fine.note[name] < 20


def test_padding_has_no_part_in_the_ranges() -> None:
    clean = data()
    other = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in clean]
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 33
    grids = [apply(net.llama(2), Recipe((Cache(),)), d).model.cache for d in (clean, other)]
    for path, found in grids[0].items():
        for name, tensor in found.tensors().items():
            assert torch.allclose(tensor, getattr(grids[1][path], name), atol=1e-5)


def test_stored_and_read_back(tmp_path: Path) -> None:
    model = rounded(4)
    edits = apply(net.llama(2), Recipe((Cache(4),)), data()).done
    assert [e.kind for e in edits] == ["cache", "cache"]
    assert all(0 < e.note["key_error"] < 0.3 for e in edits)
    from penjing.recipe import Edit

    made = [Edit("cache", path, value, "why") for path, value in model.cache.items()]
    again = unpack(*pack(made))
    for before, after in zip(made, again, strict=True):
        assert after.value.bits == 4  # type: ignore[union-attr]
        for name, tensor in before.value.tensors().items():  # type: ignore[union-attr]
            assert torch.equal(tensor, getattr(after.value, name))


def test_an_artifact_holds_it(tmp_path: Path) -> None:
    net.llama(2).module.save_pretrained(tmp_path / "llama")
    model = apply(load(tmp_path / "llama"), Recipe((Cache(4),)), data()).model
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    batch = net.text_batch(9)
    with torch.no_grad():
        assert torch.equal(again.run(batch), model.run(batch))
    assert set(again.cache) == set(attention_layers(model.module).values())


def test_a_cut_block_takes_its_grid_along() -> None:
    recipe = Recipe((Cache(), Cut(1, patch="none")))
    model = apply(net.llama(3), recipe, data()).model
    assert list(model.cache) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    with torch.no_grad():
        assert torch.isfinite(model.run(net.text_batch(9))).all()


def test_some_layers_alone() -> None:
    recipe = Recipe((Cache(targets=("*.1.*",)),))
    assert list(apply(net.llama(3), recipe, data()).model.cache) == ["model.layers.1.self_attn"]
    with pytest.raises(InputError, match="match no attention"):
        apply(net.llama(1), Recipe((Cache(targets=("nowhere",)),)), data())


def test_heads_go_before() -> None:
    with pytest.raises(InputError, match="put cache last in the recipe"):
        apply(net.llama(2), Recipe((Cache(), Shrink(0.5))), data())


def test_refused() -> None:
    with pytest.raises(UsageError, match="allowed: 8 or 4"):
        Cache(2)
    with pytest.raises(UsageError, match="a decoder of transformers"):
        apply(net.bert(1), Recipe((Cache(),)), data())
    with pytest.raises(InputError, match="need data"):
        apply(net.llama(1), Recipe((Cache(),)))
    with pytest.raises(InputError, match="NaN or infinite"):
        grid(torch.full((3, 1, 1), torch.nan), 8, torch.ones(3))
