"""Prune: exact counts, and the scores by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.errors import UsageError
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps.prune import Prune


def _inputs(model: Model, path: str, batches: list[net.Batch]) -> np.ndarray:
    found = []
    handle = model.module.get_submodule(path).register_forward_pre_hook(
        lambda _, args: found.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for batch in batches:
            model.run(batch)
    handle.remove()
    return torch.cat(found).double().numpy()


@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "taylor", "fisher"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
def test_exact_counts(criterion: str, sparsity: float) -> None:
    model = net.stack()
    applied = apply(model, Recipe((Prune(sparsity, criterion),)), net.arrays(2))
    assert set(applied.model.masks) == {f"blocks.{i}.{n}.weight"
                                        for i in range(3) for n in ("up", "down")}  # fmt: skip
    for name, mask in applied.model.masks.items():
        weight, old = applied.model.module.get_parameter(name), model.module.get_parameter(name)
        gone = (~mask).sum(1)
        if criterion == "wanda":  # the same number in every row
            assert gone.tolist() == [round(sparsity * mask.shape[1])] * len(mask)
        else:
            assert int(gone.sum()) == round(sparsity * mask.numel())
        assert torch.equal(weight, old * mask)
    assert torch.equal(applied.model.module.inp.weight, model.module.inp.weight)


def test_magnitude_by_hand() -> None:
    model = net.stack()
    pruned = apply(model, Recipe((Prune(0.5, "magnitude"),))).model
    old = model.module.blocks[0].up.weight.detach().numpy()
    border = np.sort(np.abs(old).reshape(-1))[old.size // 2]
    np.testing.assert_array_equal(
        pruned.module.blocks[0].up.weight.detach().numpy(), np.where(np.abs(old) >= border, old, 0)
    )


def test_wanda_by_hand_on_the_pruned_network() -> None:
    """|w| times the norm of the input, within rows; later blocks see pruned earlier ones."""
    model, batches = net.stack(), net.arrays(3)
    pruned = apply(model, Recipe((Prune(0.5),)), batches).model
    differ = False
    for index in range(3):
        # Both layers of a block are scored before either is pruned.
        before = pruned.copy()
        before.module.blocks[index].load_state_dict(model.module.blocks[index].state_dict())
        for name in ("up", "down"):
            path = f"blocks.{index}.{name}"
            old = model.module.get_submodule(path).weight.detach().double().numpy()
            scores = np.abs(old) * np.sqrt((_inputs(before, path, batches) ** 2).mean(0))
            kept = np.zeros_like(old, dtype=bool)
            half = old.shape[1] // 2
            np.put_along_axis(kept, np.argsort(scores, 1)[:, half:], True, 1)
            np.testing.assert_array_equal(pruned.masks[f"{path}.weight"].numpy(), kept)
            plain = np.abs(old) * np.sqrt((_inputs(model, path, batches) ** 2).mean(0))
            differ |= bool(
                (np.argsort(plain, 1)[:, :half] != np.argsort(scores, 1)[:, :half]).any()
            )
    assert differ


@pytest.mark.parametrize(("criterion", "power"), [("taylor", 1), ("fisher", 2)])
def test_slopes_are_of_the_network_before_the_step(criterion: str, power: int) -> None:
    """|w g|^power, mean over samples, by one backward pass a sample of -<z, output>."""
    model, batches = net.stack(), net.arrays(2)
    pruned = apply(model, Recipe((Prune(0.5, criterion),)), batches).model
    generator = torch.Generator().manual_seed(0)
    twin = model.copy().module
    scores: dict[str, list[torch.Tensor]] = {}
    for sample in torch.cat([batch["x"] for batch in batches]):
        output = twin(sample[None])
        twin.zero_grad()
        (torch.randn(output.shape, generator=generator) * output).sum().backward()
        for name in pruned.masks:
            own = twin.get_parameter(name)
            scores.setdefault(name, []).append((own * own.grad).detach().abs() ** power)
    for name, mask in pruned.masks.items():
        own = torch.stack(scores[name]).mean(0).flatten()
        border = own.sort().values[own.numel() // 2]
        assert torch.equal(mask.flatten(), own >= border)


def test_two_of_four() -> None:
    model = net.stack()
    pruned = apply(model, Recipe((Prune(pattern="2:4", criterion="magnitude"),))).model
    for name, mask in pruned.masks.items():
        old = model.module.get_parameter(name).detach().abs().reshape(-1, 4)
        kept = mask.reshape(-1, 4)
        assert kept.sum(1).eq(2).all()
        assert (old.masked_fill(~kept, torch.inf).amin(1) >= old.masked_fill(kept, 0).amax(1)).all()


@pytest.mark.parametrize("block", [(1, 4), (4, 1), (2, 3)])
def test_blocks_by_hand(block: tuple[int, int]) -> None:
    model, (high, wide) = net.stack(), block
    step = Prune(0.5, "magnitude", f"{high}x{wide}")
    pruned = apply(model, Recipe((step,))).model
    for name, mask in pruned.masks.items():
        old = model.module.get_parameter(name).detach().abs().double().numpy()
        rows, columns = old.shape[0] // high, old.shape[1] // wide
        sums = np.zeros((rows, columns))
        for i in range(rows):
            for j in range(columns):
                sums[i, j] = old[high * i : high * (i + 1), wide * j : wide * (j + 1)].sum()
        stays = sums >= np.sort(sums.reshape(-1))[round(0.5 * sums.size)]
        wanted = np.ones(old.shape, dtype=bool)
        wanted[: rows * high, : columns * wide] = np.kron(stays, np.ones(block, dtype=bool))
        np.testing.assert_array_equal(mask.numpy(), wanted)


@pytest.mark.parametrize("criterion", ["wanda", "fast", "admm", "sparsegpt"])
def test_blocks_go_whole_with_every_criterion(criterion: str) -> None:
    model, batches = net.stack(), net.arrays(4)
    pruned = apply(model, Recipe((Prune(0.5, criterion, "2x4"),)), batches).model
    assert len(pruned.masks) == 6
    for name, mask in pruned.masks.items():
        rows, columns = mask.shape[0] // 2, mask.shape[1] // 4
        each = mask[: 2 * rows, : 4 * columns].reshape(rows, 2, columns, 4).transpose(1, 2)
        each = each.flatten(2)  # [rows, columns, 8]
        assert (each.all(-1) | ~each.any(-1)).all()
        assert float((~each[..., 0]).float().mean()) == pytest.approx(0.5, abs=0.13)
        assert not pruned.module.get_parameter(name)[~mask].any()


def test_wanda_beats_magnitude_and_random_where_inputs_differ() -> None:
    model, batches = net.stack(), net.arrays(4)
    for batch in batches:
        batch["x"] *= torch.tensor([10.0, 0.1, 5.0, 0.2, 1.0, 0.05])
    errors = {}
    for criterion in ("wanda", "magnitude", "random"):
        step = Prune(0.5, criterion, targets=("inp",))
        pruned = apply(model, Recipe((step,)), batches).model
        with torch.no_grad():
            errors[criterion] = float((pruned.run(batches[0]) - model.run(batches[0])).norm())
    assert errors["wanda"] < min(errors["magnitude"], errors["random"])


def test_targets_outside_the_blocks() -> None:
    model, batches = net.stack(), net.arrays(2)
    pruned = apply(model, Recipe((Prune(0.5, targets=("inp", "out")),)), batches).model
    assert set(pruned.masks) == {"inp.weight", "out.weight"}
    before = pruned.copy()
    before.module.out.load_state_dict(model.module.out.state_dict())
    for layer, path in ((model.module.inp, "inp"), (model.module.out, "out")):
        old = layer.weight.detach().double().numpy()
        scores = np.abs(old) * np.sqrt((_inputs(before, path, batches) ** 2).mean(0))
        kept = np.zeros_like(old, dtype=bool)
        np.put_along_axis(kept, np.argsort(scores, 1)[:, old.shape[1] // 2 :], True, 1)
        np.testing.assert_array_equal(pruned.masks[f"{path}.weight"].numpy(), kept)


def test_a_tied_weight_is_masked_under_its_first_name() -> None:
    model = net.llama(2, tie_word_embeddings=True)
    pruned = apply(model, Recipe((Prune(0.5, "magnitude", targets=("lm_head",)),))).model
    assert set(pruned.masks) == {"model.embed_tokens.weight"}
    assert pruned.tied() == model.tied() != []
    zeros = int((pruned.module.lm_head.weight == 0).sum())
    assert zeros >= pruned.module.lm_head.weight.numel() // 2


def test_convolutions() -> None:
    model = net.resnet()
    pruned = apply(model, Recipe((Prune(0.5),)), [model.example]).model
    mask = pruned.masks["layer1.0.conv1.weight"]
    assert mask.shape == (8, 8, 3, 3)
    assert (~mask).flatten(1).sum(1).tolist() == [36] * 8


def test_slopes_rank_a_grouped_convolution_too() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Flatten(), nn.Linear(32, 2))
    model = net.wrap(module, "tensor", {"x": torch.randn(4, 4, 4, 4)})
    pruned = apply(model, Recipe((Prune(0.5, "taylor"),)), [model.example]).model
    assert int((~pruned.masks["0.weight"]).sum()) == 36


def test_a_grouped_convolution_needs_a_criterion_without_data() -> None:
    model = net.wrap(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "tensor",
                     {"x": torch.randn(1, 4, 5, 5)})  # fmt: skip
    for ranking in ("layer", "global"):
        step = Prune(0.5, "admm", ranking=ranking)
        left = apply(model, Recipe((step,)), [model.example]).model
        assert left.masks == {}
        assert "no one vector of inputs: fisher, magnitude" in left.left["0"]
    for name in ("magnitude", "fisher"):
        made = apply(model, Recipe((Prune(0.5, name),)), [model.example]).model
        assert set(made.masks) == {"0.weight"}


def test_options() -> None:
    with pytest.raises(UsageError, match="sparsity"):
        Prune(1.0)
    with pytest.raises(UsageError, match="pattern"):
        Prune(pattern="4:2")
    with pytest.raises(UsageError, match="pattern"):
        Prune(0.5, pattern="4x")
    with pytest.raises(UsageError, match="unknown name in criteria"):
        Prune(criterion="best")


@pytest.mark.parametrize("criterion", ["fast", "admm", "sparsegpt"])
def test_what_stays_is_fitted_and_later_blocks_see_it(criterion: str) -> None:
    model, batches = net.stack(), net.arrays(6)
    wanted = model.run(batches[-1]).detach()
    found = {}
    for name in ("wanda", criterion):
        made = apply(model, Recipe((Prune(0.5, name),)), batches[:5]).model
        found[name] = float((made.run(batches[-1]) - wanted).detach().norm())
        for path, mask in made.masks.items():
            assert not made.module.get_parameter(path)[~mask].any()
            assert float(mask.float().mean()) == pytest.approx(0.5, abs=0.01)
    assert found[criterion] < 0.8 * found["wanda"]


def test_the_edits_of_a_pruner_can_be_resumed(tmp_path: Path) -> None:
    model, batches = net.stack(), net.arrays(3)
    recipe = Recipe((Prune(0.5, "fast"),))
    first = apply(model, recipe, batches, journal=tmp_path / "j").model
    second = apply(model, recipe, batches, journal=tmp_path / "j").model
    assert net.same(first, second)
    assert net.same(first, apply(model, recipe, batches).model)


def test_options_of_pruners() -> None:
    with pytest.raises(UsageError, match="alpha"):
        Prune(0.5, "admm", alpha=1.5)
    with pytest.raises(UsageError, match=r"wanda.*admm"):
        Prune(0.5, "nothing")


@pytest.mark.parametrize("bias", [True, False])
def test_biases_hold_the_mean_of_what_is_lost(bias: bool) -> None:
    model, batches = net.stack(), net.arrays(4)
    made = apply(model, Recipe((Prune(0.7, "fast", bias=bias),)), batches).model
    for path in ("blocks.0.up", "blocks.0.down"):
        old, new = (m.module.get_submodule(path) for m in (model, made))
        was, now = (torch.from_numpy(_inputs(m, path, batches).mean(0)) for m in (model, made))
        with torch.no_grad():
            wanted = old.weight.double() @ was + old.bias.double()
            found = new.weight.double() @ now + new.bias.double()
        if bias:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(old.bias, new.bias)
