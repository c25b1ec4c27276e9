"""Shrink: the small network is the masked one, and the best of the kept neurons are refitted."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.calibrate import Stream, units_of
from penjing.coupling import remove
from penjing.edits import perform, replay
from penjing.errors import InputError, UsageError
from penjing.model import Batch, Model
from penjing.planes import IntegerPlanes
from penjing.recipe import Edit, Recipe
from penjing.steps.prune import Prune
from penjing.steps.shrink import Shrink, groups_of

TEXTS = [net.text_batch(seed) for seed in (1, 2)]
BLOCKS: list[tuple[str, Callable[[], Model]]] = [
    ("bert", net.bert),
    ("llama", net.llama),
    ("vit", net.vit),
]


def _batches(name: str, model: Model) -> list[Batch]:
    return [model.example] if name == "vit" else TEXTS


@pytest.mark.parametrize(("name", "make"), BLOCKS, ids=[n for n, _ in BLOCKS])
def test_the_small_network_is_the_masked_one(name: str, make: Callable[[], Model]) -> None:
    original = make()
    step = Shrink(0.5, repair=False, multiple=4)
    small = apply(original, Recipe((step,)), _batches(name, original)).model
    assert len(small.structure) == 2 * len(original.blocks)  # heads and hidden units
    masked = net.masked_columns(original, small)
    for one in (masked, small):
        one.module.double()
        one.example = {n: v.double() if v.is_floating_point() else v
                       for n, v in one.example.items()}  # fmt: skip
    with torch.no_grad():
        wanted, found = (m.module(**m.example)[0] for m in (masked, small))
        was = original.module.double()(**masked.example)[0]
    assert wanted.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert float((was - wanted).abs().max()) > 1e-3
    removed = sum(p.numel() for p in original.module.parameters())
    assert sum(p.numel() for p in small.module.parameters()) < removed


def _unit(model: Model, batches: list[Batch]) -> net.Any:
    stream = Stream(model, batches)
    stream.enter(0)
    return next(u for u in units_of(model, stream) if u.index == 0)


@pytest.mark.parametrize(("name", "make"), BLOCKS[:2], ids=["bert", "llama"])
def test_every_single_unit_may_go(name: str, make: Callable[[], Model]) -> None:
    model = make()
    unit = _unit(model, TEXTS)
    block = model.module.get_submodule(unit.name)
    call = unit.stream.sample().double()
    free = groups_of(unit).free
    assert len(free) == 2
    for one in free:
        for gone in (0, 1, one.group.count - 1):
            kept = [u for u in range(one.group.count) if u != gone]
            masked, small = copy.deepcopy(block).double(), copy.deepcopy(block).double()
            (reader,) = (m for m in one.group.members if m.summed)
            with torch.no_grad():
                masked.get_parameter(reader.name)[:, reader.places[gone]] = 0
            remove(small, [(one.group, kept)], one.settings(len(kept)))
            torch.testing.assert_close(
                call.run(small, call.hidden), call.run(masked, call.hidden), rtol=1e-9, atol=1e-9
            )


def test_a_parameter_of_the_block_itself_goes_along() -> None:
    class Scaled(net.MlpBlock):
        def __init__(self) -> None:
            super().__init__(8, 24)
            self.gamma = nn.Parameter(torch.rand(24) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.gamma * torch.relu(self.up(x)))

    torch.manual_seed(0)
    model = net.wrap(net.Stack([Scaled(), Scaled()]), "tensor", {"x": torch.randn(2, 5, 6)})
    applied = apply(model, Recipe((Shrink(0.5, multiple=4),)), net.arrays(2))
    assert applied.model.module.blocks[1].gamma.shape == (12,)


def test_a_block_whose_width_is_held_elsewhere_is_left_whole() -> None:
    class Scaled(net.MlpBlock):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.ones(24) * torch.relu(self.up(x)))

    torch.manual_seed(0)
    blocks = [Scaled(8, 24), Scaled(8, 24)]
    model = net.wrap(net.Stack(blocks), "tensor", {"x": torch.randn(2, 5, 6)})
    applied = apply(model, Recipe((Shrink(0.5, targets=("*.down",)),)), net.arrays(2))
    assert applied.done == []
    assert net.same(applied.model, model)


def test_repair_beats_no_repair_and_is_least_squares() -> None:
    model, batches = net.stack(1 + 1), net.arrays(8)
    plain, repaired = (
        apply(model, Recipe((Shrink(0.5, repair=r, targets=("*.down",)),)), batches).model
        for r in (False, True)
    )
    with torch.no_grad():
        wanted = model.run(batches[-1])
        errors = [float((m.run(batches[-1]) - wanted).norm()) for m in (plain, repaired)]
    assert errors[1] < 0.5 * errors[0]

    # Block 0's refit by numpy, on hidden units computed by hand.
    kept = next(k for p, d, k in repaired.structure[0]["slices"] if d == 1)
    block = model.module.blocks[0]
    with torch.no_grad():
        hidden = torch.cat([torch.relu(block.up(model.module.inp(b["x"]))).flatten(0, 1)
                            for b in batches]).double().numpy()  # fmt: skip
    weight = block.down.weight.detach().double().numpy()
    bias = block.down.bias.detach().double().numpy()
    mean = hidden.mean(0)
    wanted_mean = weight @ mean + bias
    hidden = hidden - mean  # the bias holds the mean
    gram = hidden.T @ hidden / len(hidden)
    live = np.diag(gram)[np.diag(gram) > 0]
    ridge = np.sqrt(0.01 * live.mean() * len(hidden))
    rows = np.vstack([hidden, ridge * np.eye(24)])
    fitted = np.linalg.lstsq(rows[:, kept], rows @ weight.T, rcond=None)[0].T
    found = repaired.module.blocks[0].down.weight.detach().numpy()
    np.testing.assert_allclose(found, fitted, rtol=1e-3, atol=1e-4)
    found = repaired.module.blocks[0].down.bias.detach().numpy()
    np.testing.assert_allclose(found, wanted_mean - fitted @ mean[kept], rtol=1e-3, atol=1e-4)


def test_gram_beats_random() -> None:
    model, batches = net.stack(), net.arrays(8)
    wanted = model.run(batches[-1]).detach()
    errors = {}
    for criterion in ("gram", "magnitude", "random"):
        small = apply(model, Recipe((Shrink(0.5, criterion=criterion),)), batches).model
        errors[criterion] = float((small.run(batches[-1]) - wanted).detach().norm())
    assert errors["gram"] < errors["random"]


def test_a_shrunk_llama_writes_with_its_cache() -> None:
    small = apply(net.llama(), Recipe((Shrink(0.5, multiple=4),)), TEXTS).model
    attention = small.module.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (16, 8)
    ids = torch.tensor([[5, 9, 20]])
    with torch.no_grad():
        whole = small.module.generate(
            ids, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=-1
        )
        assert whole.shape == (1, 11)
        for length in range(3, 11):  # greedy, by whole forward passes
            logits = small.module(whole[:, :length], use_cache=False).logits
            assert int(logits[0, -1].argmax()) == int(whole[0, length])
        step = small.module(whole[:, :6], use_cache=True)
        last = small.module(whole[:, 6:7], past_key_values=step.past_key_values, use_cache=True)
        full = small.module(whole[:, :7], use_cache=False).logits
    torch.testing.assert_close(last.logits[:, -1], full[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("step", "heads", "hidden"),
    [
        (Shrink(0.5, multiple=8), 2, 24),
        (Shrink(0.5, multiple=16), 2, 32),  # 24 is nearer to 32 than to 16 by the even rule
        (Shrink(0.25, heads=0.0, multiple=4), 4, 36),
        (Shrink(0.0, heads=0.75), 1, 48),
        (Shrink(0.99, multiple=8), 1, 8),
    ],
)
def test_counts(step: Shrink, heads: int, hidden: int) -> None:
    small = apply(net.bert(2), Recipe((step,)), TEXTS).model
    for layer in small.module.encoder.layer:
        assert layer.attention.self.query.out_features == 8 * heads
        assert layer.attention.self.num_attention_heads == heads
        assert layer.intermediate.dense.out_features == hidden


def test_nothing_goes_at_ratio_zero() -> None:
    # 27 is no multiple of 8.
    assert apply(net.stack(hidden=27), Recipe((Shrink(0.0),)), net.arrays(1)).done == []


def test_targets_choose_consumers() -> None:
    model = net.bert(2)
    step = Shrink(0.5, targets=("*.layer.1.output.dense",))
    done = apply(model, Recipe((step,)), TEXTS).done
    path = "encoder.layer.1.output.dense"
    assert [(d.kind, d.path) for d in done] == [
        ("weight", f"{path}.weight"), ("weight", f"{path}.bias"), ("slice", path),
    ]  # fmt: skip


def test_convolutions_lose_channels_inside_the_blocks_and_between_them() -> None:
    model = net.resnet()
    batches = [model.example]
    step = Shrink(0.5, repair=False, multiple=2)
    small = apply(model, Recipe((step,)), batches).model
    first, stem = small.module.layer1[0], model.module.layer1[0]
    assert first.conv1.out_channels == stem.conv1.out_channels // 2
    assert first.conv2.out_channels == stem.conv2.out_channels // 2  # the stream
    twin = net.resnet()
    replay(twin, small.structure)
    twin.module.load_state_dict(small.module.state_dict())
    assert torch.equal(twin.run(model.example), small.run(model.example))
    # Channel by channel, the original with what reads the removed ones at zero: by each slice.
    masked = model.copy()
    left: dict[tuple[str, int], list[int]] = {}
    for entry in small.structure:
        for path, dim, kept in entry["slices"]:
            stays = left.get(
                (path, dim), list(range(dict(model.module.state_dict())[path].shape[dim]))
            )
            left[path, dim] = [stays[k] for k in kept]
    for (path, dim), kept in left.items():
        if dim == 1:
            weight = masked.module.get_parameter(path)
            gone = [i for i in range(weight.shape[1]) if i not in set(kept)]
            with torch.no_grad():
                weight[:, gone] = 0
    for one in (masked, small, model):
        one.module.double()
    example = {"x": model.example["x"].double()}
    with torch.no_grad():
        wanted, found, was = (m.module(*example.values()) for m in (masked, small, model))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert float((was - wanted).abs().max()) > 1e-3


def test_repair_helps_convolutions() -> None:
    model = net.resnet()
    generator = torch.Generator().manual_seed(0)
    shape = (16, *model.example["x"].shape[1:])
    batches = [{"x": torch.randn(shape, generator=generator)} for _ in range(3)]
    errors = {}
    for repair in (False, True):
        step = Shrink(0.25, repair=repair, multiple=1)
        small = apply(model, Recipe((step,)), batches[:2]).model
        with torch.no_grad():
            errors[repair] = float((small.run(batches[2]) - model.run(batches[2])).norm())
    assert errors[True] < 0.7 * errors[False]


class Sound(nn.Module):
    """[batch, channels, length]: a block of 1-D convolutions, one of them strided."""

    def __init__(self, inputs: int = 12) -> None:
        super().__init__()
        self.up = nn.Conv1d(inputs, 24, 5, padding=2)
        self.mid = nn.Conv1d(24, 24, 3, stride=2, dilation=2, padding=2)
        self.down = nn.Conv1d(24, inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.mid(torch.relu(self.up(x)))))


def test_one_dimensional_convolutions_lose_channels() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList([nn.Sequential(Sound(), nn.Tanh()) for _ in range(2)])
    model = net.wrap(nn.Sequential(*blocks), "tensor", {"x": torch.randn(2, 12, 40)})
    model.blocks = ("0", "1")
    batches = [{"x": torch.randn(32, 12, 40)} for _ in range(2)]
    made = {}
    for repair in (True, False):
        step = Shrink(0.5, repair=repair, multiple=1)
        made[repair] = apply(model, Recipe((step,)), batches).model
    # Those between the blocks too; what comes in and what goes out stays.
    shapes = [[tuple(p.shape) for p in block.parameters() if p.ndim > 1]
              for block in made[True].module]  # fmt: skip
    assert shapes[0] == [(12, 12, 5), (12, 12, 3), (6, 12, 1)]
    assert shapes[1] == [(12, 6, 5), (12, 12, 3), (12, 12, 1)]
    masked = net.masked_columns(model, made[False])
    with torch.no_grad():
        wanted, was = masked.run(batches[0]), model.run(batches[0])
        torch.testing.assert_close(made[False].run(batches[0]), wanted, rtol=1e-4, atol=1e-5)
        off = {r: float((m.run(batches[0]) - was).norm()) for r, m in made.items()}
    assert off[True] < 0.9 * off[False]


def test_after_pruning_the_removed_connections_stay_removed() -> None:
    model = apply(net.stack(), Recipe((Prune(0.5, "magnitude"), Shrink(0.5))), net.arrays(4)).model
    assert model.masks
    for name, mask in model.masks.items():
        weight = model.module.get_parameter(name)
        assert mask.shape == weight.shape
        assert not weight[~mask].any()
        assert 0 < float(mask.float().mean()) < 1


def test_what_is_left_of_a_pruned_layer_is_least_squares_on_its_mask() -> None:
    """Row by row by numpy, on hidden units computed by hand."""
    batches = net.arrays(8)
    for criterion in ("gram", "magnitude"):
        model = apply(net.stack(2), Recipe((Prune(0.5, "magnitude"),))).model
        step = Shrink(0.5, criterion=criterion, targets=("*.0.down",))
        small = apply(model, Recipe((step,)), batches).model
        kept = next(k for _, dim, k in small.structure[0]["slices"] if dim == 1)
        block, name = model.module.blocks[0], "blocks.0.down.weight"
        with torch.no_grad():
            hidden = torch.cat([torch.relu(block.up(model.module.inp(b["x"]))).flatten(0, 1)
                                for b in batches]).double().numpy()  # fmt: skip
        weight = block.down.weight.detach().double().numpy()
        mean = hidden.mean(0)
        hidden = hidden - mean  # the bias holds the mean
        variance = (hidden**2).mean(0)
        ridge = np.sqrt(0.01 * variance[variance > 0].mean() * len(hidden))
        rows = np.vstack([hidden, ridge * np.eye(24)])
        fitted = np.zeros_like(weight)
        for row, own in enumerate(model.masks[name].numpy()):
            there = [k for k in kept if own[k]]
            fitted[row, there] = np.linalg.lstsq(rows[:, there], rows @ weight[row], rcond=None)[0]
        found = small.module.get_parameter(name).detach().numpy()
        np.testing.assert_allclose(found, fitted[:, kept], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            small.module.blocks[0].down.bias.detach().numpy(),
            weight @ mean + block.down.bias.detach().numpy() - fitted @ mean, rtol=1e-3, atol=1e-4,
        )  # fmt: skip
        assert torch.equal(small.masks[name], model.masks[name][:, kept])


def test_channels_shared_by_blocks_keep_their_masks() -> None:
    model = apply(net.resnet(), Recipe((Prune(0.5, "magnitude"),))).model
    small = apply(model, Recipe((Shrink(0.5, multiple=2),)), [model.example]).model
    for name, mask in small.masks.items():
        weight = small.module.get_parameter(name)
        assert mask.shape == weight.shape
        assert not weight[~mask].any()
    assert small.masks.keys() == model.masks.keys()


def test_a_quantized_network_is_not_shrunk() -> None:
    model = net.stack()
    planes = IntegerPlanes(
        torch.zeros(1, 24, 8, dtype=torch.uint8), (4,), torch.ones(1, 24, 1),
        torch.zeros(24, 1), 8,
    )  # fmt: skip
    perform(model, Edit("quantize", "blocks.0.up.weight", planes, "q"))
    with pytest.raises(InputError, match="quantized already"):
        apply(model, Recipe((Shrink(0.5),)), net.arrays(1))


class Twice(nn.Module):
    """What reads the hidden units reads them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 24), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        return self.down(torch.cat([hidden, hidden.flip(0)], -1))


def test_a_layer_that_reads_units_twice_loses_both_columns() -> None:
    torch.manual_seed(0)
    model = net.wrap(Twice(), "tensor", {"x": torch.randn(64, 5)})
    small = apply(model, Recipe((Shrink(0.5, multiple=1),)), [model.example]).model
    assert small.module.up.weight.shape == (12, 5)
    assert small.module.down.weight.shape == (3, 24)
    plain = apply(model, Recipe((Shrink(0.5, multiple=1, repair=False),)), [model.example]).model
    with torch.no_grad():
        wanted = model.run(model.example)
        off = [float((m.run(model.example) - wanted).square().mean()) for m in (small, plain)]
    assert off[0] < off[1]


def test_options_and_data() -> None:
    with pytest.raises(UsageError, match="ratio"):
        Shrink(1.0)
    with pytest.raises(UsageError, match="heads"):
        Shrink(0.5, heads=-0.1)
    with pytest.raises(UsageError, match="multiple"):
        Shrink(multiple=0)
    with pytest.raises(UsageError, match="unknown name in criteria"):
        Shrink(criterion="nothing")
    with pytest.raises(UsageError, match="shrink needs data"):
        apply(net.stack(), Recipe((Shrink(0.5),)))
