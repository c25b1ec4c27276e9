"""Cut: blocks really go, the right ones, and the patch is the ridge regression it says it is."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import Applied, apply
from penjing.calibrate import Stream
from penjing.errors import InputError, UsageError
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps._trials import Piece
from penjing.steps.cut import Cut, fit_patch, influence

TEXTS = [net.text_batch(seed) for seed in range(8)]


def _hidden(model: Model, batches: list[net.Batch]) -> list[list[Tensor]]:
    """[block][batch]: what enters each block, and last what leaves the last one."""
    blocks = [model.module.get_submodule(b) for b in model.blocks]
    found: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    handles = [
        b.register_forward_pre_hook(lambda _, args, i=i: found[i].append(args[0]), prepend=True)
        for i, b in enumerate(blocks)
    ]

    def last(_: nn.Module, args: object, output: object) -> None:
        found[-1].append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    handles.append(blocks[-1].register_forward_hook(last))
    with torch.no_grad():
        for batch in batches:
            model.run(batch)
    for handle in handles:
        handle.remove()
    return found


def _cut(model: Model, batches: list[net.Batch], *blocks: int, **options: object) -> Applied:
    step = Cut(blocks=tuple(model.blocks[b] for b in blocks), **options)  # type: ignore[arg-type]
    return apply(model, Recipe((step,)), batches)


def _ridge(x: np.ndarray, y: np.ndarray, strength: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Toward the identity, bias free: lstsq on centred rows with the ridge's rows below."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    a, b = x - mean_x, y - mean_y
    width, count = x.shape[1], len(x)
    ridge = np.sqrt(strength * (a**2).mean() * count)
    rows = np.vstack([a, ridge * np.eye(width)])
    goal = np.vstack([b, ridge * np.eye(width)])
    weight = np.linalg.lstsq(rows, goal, rcond=None)[0].T
    return weight, mean_y - weight @ mean_x


def _rows(hidden: list[Tensor], batches: list[net.Batch]) -> np.ndarray:
    kept = [h[b["attention_mask"].bool()] if "attention_mask" in b else h.flatten(0, 1)
            for h, b in zip(hidden, batches, strict=True)]  # fmt: skip
    return torch.cat(kept).double().numpy()


@pytest.mark.parametrize(
    ("gone", "position", "at"), [(1, "before", 1), (3, "after", 2), (0, "before", 0)]
)
def test_the_patch_is_a_ridge_toward_the_identity(gone: int, position: str, at: int) -> None:
    model, batches = net.bert(4), TEXTS
    hidden = _hidden(model, batches)
    applied = _cut(model, batches, gone)
    assert not any("penjing" in name for name, _ in model.module.named_modules())
    weight, bias = _ridge(*(_rows(hidden[i], batches) for i in (gone, gone + 1)))
    block = applied.model.module.get_submodule(applied.model.blocks[at])
    found = getattr(block, f"penjing_{position}")
    np.testing.assert_allclose(found.weight.detach(), weight, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found.bias.detach(), bias, rtol=2e-3, atol=2e-3)
    # What it says of the held-out error is so, of a map fitted without the last quarter.
    weight, bias = _ridge(*(_rows(hidden[i][:6], batches[:6]) for i in (gone, gone + 1)))
    x, y = (_rows(hidden[i][6:], batches[6:]) for i in (gone, gone + 1))
    note = applied.done[0].note
    scale = (y**2).sum()
    assert note["before"] == pytest.approx(((x - y) ** 2).sum() / scale, rel=1e-3)
    assert note["after"] == pytest.approx(((x @ weight.T + bias - y) ** 2).sum() / scale, rel=1e-2)
    assert note["after"] < note["before"]


def test_the_cut_network_by_hand() -> None:
    """Two gaps, one of two blocks, one at the end: every patch is where it belongs."""
    model, batches = net.stack(6), net.arrays(8)
    applied = _cut(model, batches, 1, 2, 5)
    small, whole = applied.model.module, model.module
    assert len(small.blocks) == 3
    assert applied.model.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert [d.kind for d in applied.done].count("drop") == 3
    patches = [d for d in applied.done if d.kind == "patch"]
    assert len(patches) == 2
    x = batches[0]["x"]
    with torch.no_grad():
        h = whole.blocks[0](whole.inp(x))
        h = small.blocks[1].penjing_before(h)
        h = whole.blocks[4](whole.blocks[3](h))
        h = small.blocks[2].penjing_after(h)
        torch.testing.assert_close(applied.model.run(batches[0]), whole.out(h))


def test_a_patch_behind_a_patch_is_fitted_on_the_cut_network() -> None:
    """The second gap is entered through the first patch; its goal is the whole network's."""
    model, batches = net.stack(5), net.arrays(8)
    applied = _cut(model, batches, 1, 3)
    hidden = _hidden(model, batches)
    small = applied.model.module
    with torch.no_grad():
        first = [small.blocks[1].penjing_before(h) for h in hidden[1]]
        entering = [model.module.blocks[2](h) for h in first]
    weight, bias = _ridge(_rows(entering, batches), _rows(hidden[4], batches))
    np.testing.assert_allclose(small.blocks[2].penjing_before.weight.detach(), weight, atol=2e-3)
    np.testing.assert_allclose(small.blocks[2].penjing_before.bias.detach(), bias, atol=2e-3)


def test_patches_help_on_data_not_seen() -> None:
    model, batches = net.stack(4), net.arrays(8)
    with torch.no_grad():
        wanted = model.run(batches[-1])
        errors = {}
        for patch in ("linear", "none"):
            small = _cut(model, batches[:-1], 1, patch=patch).model
            errors[patch] = float((small.run(batches[-1]) - wanted).norm())
    assert errors["linear"] < 0.7 * errors["none"]


def test_without_a_patch_it_is_the_network_without_the_block() -> None:
    model = net.stack(4)
    small = _cut(model, net.arrays(1), 2, patch="none").model
    with torch.no_grad():
        h = model.module.inp(model.example["x"])
        for index in (0, 1, 3):
            h = model.module.blocks[index](h)
        assert torch.equal(small.run(model.example), model.module.out(h))


def test_noise_gets_no_patch() -> None:
    stream = Stream(net.stack(), net.arrays(8))
    generator = torch.Generator().manual_seed(0)

    def noise() -> list[Tensor]:
        return [torch.randn(4, 16, 40, generator=generator) for _ in range(8)]

    x = noise()
    # The identity is best here; whatever is fitted besides is noise.
    assert fit_patch(stream, x, [h + 3 * n for h, n in zip(x, noise(), strict=True)], 1e-6) is None
    mix = torch.randn(40, 40, generator=generator)
    fit = fit_patch(stream, x, [h @ mix for h in x], 1e-6)
    assert fit is not None
    torch.testing.assert_close(fit.weight, mix.T, rtol=1e-2, atol=1e-2)


def test_one_batch_is_held_out_in_part() -> None:
    stream = Stream(net.stack(), net.arrays(1))
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(4, 16, 40, generator=generator) for _ in range(2))
    assert fit_patch(stream, [x], [x + 3 * noise], 1e-6) is None
    fit = fit_patch(stream, [x], [2 * x + 1], 1e-3)
    assert fit is not None
    assert fit.before > 100 * fit.after > 0  # measured, not made up


def test_attention_sinks_are_no_samples() -> None:
    stream = Stream(net.stack(), net.arrays(8))
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(4, 16, 8, generator=generator) for _ in range(8)]
    y = [2 * h for h in x]
    clean = fit_patch(stream, x, y, 0.01)
    for source, goal in zip(x, y, strict=True):
        source[:, 0], goal[:, 0] = 1.0, 1e4
    sunk = fit_patch(stream, x, y, 0.01)
    assert clean is not None
    assert sunk is not None
    torch.testing.assert_close(sunk.weight, clean.weight, rtol=1e-2, atol=1e-2)


def test_two_cuts_in_a_row() -> None:
    model, batches = net.stack(6), net.arrays(8)
    once = _cut(model, batches, 2).model
    old = once.module.blocks[2].penjing_before.weight.detach().clone()
    twice = _cut(once, batches, 1).model  # its gap meets the patch of the first cut
    assert len(twice.module.blocks) == 4
    new = twice.module.blocks[1].penjing_before
    assert not torch.equal(new.weight, old)
    assert len([s for s in twice.structure if s["kind"] == "patch"]) == 1
    # The composed patch is old after new, new fitted on what the network once cut had.
    hidden = _hidden(once, batches)
    weight, bias = _ridge(_rows(hidden[1], batches), _rows(hidden[2], batches))
    before = once.module.blocks[2].penjing_before
    np.testing.assert_allclose(new.weight.detach(), old.numpy() @ weight, atol=5e-3)
    wanted = old.numpy() @ bias + before.bias.detach().numpy()
    np.testing.assert_allclose(new.bias.detach(), wanted, atol=5e-3)


def test_a_cut_llama_writes_the_same_with_and_without_a_cache() -> None:
    small = _cut(net.llama(4), TEXTS, 1, 2).model
    assert small.module.config.num_hidden_layers == 2
    assert [x.self_attn.layer_idx for x in small.module.model.layers] == [0, 1]
    ids = torch.tensor([[5, 9, 20, 3, 7]])
    with torch.no_grad():
        full = small.module(ids, use_cache=False).logits
        torch.testing.assert_close(small.module(ids, use_cache=True).logits, full)
        past = small.module(ids[:, :3], use_cache=True).past_key_values
        rest = small.module(ids[:, 3:], past_key_values=past, use_cache=True).logits
        torch.testing.assert_close(rest, full[:, 3:], rtol=1e-4, atol=1e-4)
        written = small.module.generate(
            ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
        for length in range(5, 10):
            logits = small.module(written[:, :length], use_cache=False).logits
            assert int(logits[0, -1].argmax()) == int(written[0, length])


def _planted() -> Model:
    torch.manual_seed(0)
    blocks = [net.MlpBlock(8, 24, 3.0) for _ in range(6)]
    for index in (2, 4):
        blocks[index].scale = 1e-3
    return net.wrap(net.Stack(blocks), "tensor", {"x": torch.randn(2, 5, 6)})  # type: ignore[arg-type]


def test_influence_is_one_less_the_mean_cosine_of_real_tokens() -> None:
    model, batches = net.bert(3), TEXTS[:2]
    hidden = _hidden(model, batches)
    found = influence(Stream(model, batches))
    for index in range(3):
        x, y = (_rows(hidden[i], batches) for i in (index, index + 1))
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert found[Piece(index)] == pytest.approx(1 - cosine.mean(), abs=1e-5)


def test_blocks_that_do_nothing_go_first_and_random_is_worse() -> None:
    model, batches = _planted(), net.arrays(4)
    errors = {}
    with torch.no_grad():
        wanted = model.run(batches[0])
        for criterion in ("influence", "random"):
            step = Cut(2, criterion=criterion, patch="none")
            applied = apply(model, Recipe((step,)), batches)
            errors[criterion] = float((applied.model.run(batches[0]) - wanted).norm())
            if criterion == "influence":
                paths = {d.path for d in applied.done}
                assert paths == {"blocks.2", "blocks.4"}
    assert errors["influence"] < 0.05 * errors["random"]


def test_random_depends_on_its_seed_only() -> None:
    model, batches = net.stack(6), net.arrays(2)

    def gone(seed: int) -> frozenset[str]:
        step = Cut(2, criterion="random", patch="none", seed=seed)
        return frozenset(d.path for d in apply(model, Recipe((step,)), batches).done)

    assert gone(1) == gone(1)
    assert len({gone(seed) for seed in range(5)}) > 1


def test_blocks_that_change_the_shape_are_not_cut() -> None:
    model = net.resnet()
    applied = apply(model, Recipe((Cut(2),)), [model.example])
    assert "layer2.0" not in {d.path for d in applied.done}
    assert {d.kind for d in applied.done} == {"drop"}  # no linear patch on pictures
    assert applied.model.run(model.example).shape == (2, 5)
    # One block of each stage stays, the one that changes the shape where there is one.
    for seed in range(4):
        step = Cut(2, criterion="random", seed=seed)
        assert apply(model, Recipe((step,)), [model.example]).model.parameter_count
    with pytest.raises(InputError, match="too many blocks to cut; got 3; allowed: at most 2"):
        apply(model, Recipe((Cut(3),)), [model.example])


@pytest.mark.parametrize(("ratio", "count"), [(0.01, 1), (0.25, 2), (0.5, 3), (0.7, 4)])
def test_ratios_are_rounded(ratio: float, count: int) -> None:
    applied = apply(net.stack(6), Recipe((Cut(ratio=ratio, patch="none"),)), net.arrays(1))
    assert len(applied.done) == count


def test_refusals() -> None:
    model, batches = net.stack(3), net.arrays(1)
    with pytest.raises(InputError, match="no such block"):
        apply(model, Recipe((Cut(blocks=("blocks.9",)),)), batches)
    with pytest.raises(InputError, match="leave at least one"):
        apply(model, Recipe((Cut(blocks=model.blocks),)), batches)
    with pytest.raises(InputError, match="too many"):
        apply(model, Recipe((Cut(3),)), batches)
    with pytest.raises(UsageError, match="cut needs data"):
        apply(model, Recipe((Cut(1),)))
    plain = net.wrap(nn.Sequential(nn.Linear(6, 6)), "tensor", {"x": torch.randn(1, 6)})
    with pytest.raises(InputError, match="no repeated blocks"):
        apply(plain, Recipe((Cut(1),)), batches)
    for wrong in ({}, {"layers": 1, "ratio": 0.5}, {"layers": 0}, {"ratio": 1.0},
                  {"layers": 1, "criterion": "best"}, {"layers": 1, "patch": "cubic"}):  # fmt: skip
        with pytest.raises(UsageError):
            Cut(**wrong)  # type: ignore[arg-type]
