"""Hidden states and statistics, against plain hooks on the whole network and numpy."""

from __future__ import annotations

import functools
import gc
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing import calibrate
from penjing.calibrate import Stream, Unit, units_of
from penjing.calls import Call
from penjing.edits import perform
from penjing.errors import InputError
from penjing.model import Batch, Model
from penjing.recipe import Edit, Patch

GRAM = frozenset({"gram"})


def _seen(model: Model, path: str, batches: list[Batch]) -> list[Tensor]:
    """What a module gets when the whole network runs."""
    found: list[Tensor] = []
    handle = model.module.get_submodule(path).register_forward_pre_hook(
        lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        for batch in batches:
            model.run(batch)
    handle.remove()
    return found


class Skips(nn.Module):
    """Blocks that are no chain: each but the first takes the sum of two."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(net.MlpBlock(6, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for block in self.blocks:
            total = total + block(total)
        return total


def _skips() -> Model:
    torch.manual_seed(0)
    return net.wrap(Skips(), "tensor", {"x": torch.randn(2, 5, 6)})


class Biased(nn.Module):
    """Like T5: the first block makes something that the others use."""

    def __init__(self) -> None:
        super().__init__()
        parts = [nn.ModuleDict({"mlp": net.MlpBlock(6, 8)}) for _ in range(3)]
        self.blocks = nn.ModuleList(_BiasedBlock(p["mlp"]) for p in parts)

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


class _BiasedBlock(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.bias = mlp, nn.Linear(6, 6)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        bias = self.bias(x) if bias is None else bias
        return self.mlp(x + bias), bias


def _biased() -> Model:
    torch.manual_seed(0)
    return net.wrap(Biased(), "tensor", {"x": torch.randn(2, 5, 6)})


TEXTS = [net.text_batch(seed) for seed in (1, 2)]
SIX = [{"x": torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(s))} for s in (1, 2)]
NETWORKS: dict[str, tuple[Callable[[], Model], list[Batch], bool]] = {
    "bert": (net.bert, TEXTS, True),
    "llama": (net.llama, TEXTS, True),
    "llama with a cache": (lambda: net.llama(embedding=True), TEXTS, True),
    "vit": (net.vit, [net.vit().example], True),
    "resnet": (net.resnet, [net.resnet().example], True),
    "stack": (net.stack, net.arrays(2), True),
    "skips": (_skips, SIX, False),
    "first block's bias": (_biased, SIX, False),
}


def _spoil(model: Model, index: int) -> None:
    """Any edit of a block."""
    name, weight = next((n, p) for n, p in model.module.get_submodule(
        model.blocks[index]).named_parameters() if p.ndim > 1)  # fmt: skip
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(index)) > 0.5
    perform(model, Edit("mask", f"{model.blocks[index]}.{name}", mask, "t"))


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_states_are_those_of_the_edited_network(name: str) -> None:
    make, batches, chained = NETWORKS[name]
    model = make()
    stream = Stream(model, batches)
    assert stream.chained is chained
    for index, path in enumerate(model.blocks):
        stream.enter(index)
        calls = list(stream.calls())
        for call, wanted in zip(calls, _seen(model, path, batches), strict=True):
            torch.testing.assert_close(call.hidden, wanted, rtol=1e-5, atol=1e-5)
        _spoil(model, index)


@pytest.mark.parametrize("name", NETWORKS)
def test_twin_goes_its_own_way_without_a_run_of_the_network(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, batches, chained = NETWORKS[name]
    model = make()
    plain = model.copy()
    wanted = [_seen(plain, path, batches) for path in model.blocks]
    stream = Stream(model, batches)
    if chained:
        monkeypatch.setattr(Model, "run", None)
    twin = stream.twin(plain)
    for index in range(len(model.blocks)):
        stream.enter(index)
        twin.enter(index)
        for call, hidden in zip(twin.calls(), wanted[index], strict=True):
            torch.testing.assert_close(call.hidden, hidden, rtol=1e-5, atol=1e-5)
        _spoil(model, index)


@pytest.mark.parametrize("name", ["bert", "llama", "llama with a cache", "skips"])
def test_walk_gives_inputs_and_outputs(name: str) -> None:
    make, batches, _ = NETWORKS[name]
    model = make()
    wanted = [_seen(model, b, batches) for b in model.blocks]
    for index, _, calls, outputs in Stream(model, batches).walk():
        for call, want in zip(calls, wanted[index], strict=True):
            torch.testing.assert_close(call.hidden, want, rtol=1e-5, atol=1e-5)
        if index + 1 < len(model.blocks) and name != "skips":
            for output, want in zip(outputs, wanted[index + 1], strict=True):
                torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)


def test_a_patch_does_not_break_the_chain() -> None:
    model = net.stack()
    eye = torch.eye(8)
    perform(model, Edit("patch", "blocks.1", Patch(2 * eye, torch.ones(8), "before"), "t"))
    perform(model, Edit("patch", "blocks.1", Patch(3 * eye, torch.ones(8), "after"), "t"))
    batches = net.arrays(2)
    stream = Stream(model, batches)
    assert stream.chained
    stream.enter(2)
    for call, wanted in zip(stream.calls(), _seen(model, "blocks.2", batches), strict=True):
        torch.testing.assert_close(call.hidden, wanted)


def _unit(model: Model, stream: Stream, index: int) -> Unit:
    stream.enter(index)
    return next(u for u in units_of(model, stream) if u.index == index)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gram_matrices_are_of_real_tokens_only(name: str) -> None:
    make, batches, _ = NETWORKS[name]
    model = make()
    stream = Stream(model, batches)
    stats = stream.collect(_unit(model, stream, 1), GRAM)
    assert len(stats) >= 6
    for path, found in stats.items():
        rows = np.concatenate(
            [
                x[b["attention_mask"].bool()].double().numpy()
                for x, b in zip(_seen(model, path, batches), batches, strict=True)
            ]
        )
        assert found.count == len(rows) == sum(int(b["attention_mask"].sum()) for b in batches)
        gram = rows.T @ rows / len(rows)
        np.testing.assert_allclose(found.gram, gram, rtol=1e-4, atol=1e-5 * np.abs(gram).max())
        np.testing.assert_allclose(found.norm, np.sqrt((rows**2).mean(0)), rtol=1e-4, atol=1e-5)
        assert found.low == pytest.approx(min(rows.min(), 0), rel=1e-5)
        assert found.high == pytest.approx(max(rows.max(), 0), rel=1e-5)


def test_ranges_alone_need_no_gram() -> None:
    model, batches = net.stack(), net.arrays(2)
    stream = Stream(model, batches)
    found = stream.collect(_unit(model, stream, 0), frozenset({"range"}))["blocks.0.up"]
    seen = torch.cat(_seen(model, "blocks.0.up", batches))
    assert (found.gram, found.norm) == (None, None)
    assert (found.low, found.high) == (float(seen.min()), float(seen.max()))
    assert found.count > 0


def test_the_gram_of_a_convolution_is_that_of_its_patches() -> None:
    model = net.resnet()
    stream = Stream(model, [model.example])
    stats = stream.collect(_unit(model, stream, 2), GRAM)
    path = "layer2.0.conv1"  # stride 2, padding 1
    x = np.pad(_seen(model, path, [model.example])[0].numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = np.array(
        [
            x[n, :, i : i + 3, j : j + 3].reshape(-1)
            for n in range(2)
            for i in range(0, 8, 2)
            for j in range(0, 8, 2)
        ]
    )
    np.testing.assert_allclose(stats[path].gram, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    # The rows are laid out as the weight matrix is: product and convolution agree.
    layer = model.module.get_submodule(path)
    product = rows @ layer.weight.detach().reshape(16, -1).numpy().T
    with torch.no_grad():
        direct = layer(_seen(model, path, [model.example])[0]).permute(0, 2, 3, 1).reshape(-1, 16)
    np.testing.assert_allclose(product, direct.numpy(), rtol=1e-4, atol=1e-5)


def test_grouped_convolutions_have_no_gram() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    model = net.wrap(module, "tensor", {"x": torch.randn(1, 4, 5, 5)})
    stream = Stream(model, [model.example])
    back = list(units_of(model, stream))
    stats = {n: s for u in back for n, s in stream.collect(u, GRAM).items()}
    assert stats["0"].gram is None
    assert stats["0"].count > 0


def test_units_have_every_layer_once_in_order() -> None:
    model = net.llama(2)
    for stream in (None, Stream(model, TEXTS)):
        units = list(units_of(model, stream))
        assert [u.name for u in units] == ["front", *model.blocks, "back"]
        assert list(units[0].layers) == ["model.embed_tokens"]
        assert list(units[-1].layers) == ["lm_head"]
        names = [n for u in units for n in u.layers]
        assert len(names) == len(set(names)) == 2 + 2 * 7


def test_front_is_what_runs_before_the_blocks() -> None:
    model = net.stack()
    units = list(units_of(model, Stream(model, net.arrays(1))))
    assert list(units[0].layers) == ["inp"]
    assert list(units[-1].layers) == ["out"]
    stats = units[0].stream.collect(units[0], GRAM)["inp"]  # type: ignore[union-attr]
    rows = net.arrays(1)[0]["x"].reshape(-1, 6).double().numpy()
    np.testing.assert_allclose(stats.gram, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_a_layer_that_never_runs_or_gets_nothing_has_no_statistics() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.empty, self.never = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            self.empty(x[:0])
            return self.used(x)

    model = net.wrap(Experts(), "tensor", {"x": torch.randn(3, 4)})
    stream = Stream(model, [model.example])
    stats = {n: s for u in units_of(model, stream) for n, s in stream.collect(u, GRAM).items()}
    assert {n: s.count for n, s in stats.items()} == {"used": 3, "empty": 0, "never": 0}
    assert stats["empty"].gram is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_are_named(value: float) -> None:
    model = net.stack()
    batch = {"x": torch.full((1, 2, 6), value)}
    stream = Stream(model, [batch])
    with pytest.raises(InputError, match=r"input of blocks\.1\.up is NaN or infinite"):
        stream.collect(_unit(model, stream, 1), GRAM)


def test_no_data_is_refused() -> None:
    with pytest.raises(InputError, match="no calibration data"):
        Stream(net.stack(), [])


def _held(width: int) -> int:
    """Bytes of live hidden states [4, 64, width]."""
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) is Tensor  # no parameters, and no fake tensors that a tracer left
    }
    return sum(size for size in storages.values() if size == 4 * 64 * width * 4)


@pytest.mark.parametrize("walk", [False, True])
def test_one_hidden_state_a_batch_is_kept(walk: bool) -> None:
    width = 37  # so that nothing else has the size
    model = net.stack(6, width=width)
    batches = [{"x": torch.randn(4, 64, 6)} for _ in range(3)]
    before = _held(width)
    stream = Stream(model, batches)
    one = 4 * 64 * width * 4
    assert _held(width) - before <= 3 * one
    if walk:
        for step in stream.walk():
            held = _held(width) - before
            assert held <= 6 * one  # inputs and outputs of one block
            del step
    else:
        for index in range(6):
            stream.enter(index)
            assert _held(width) - before <= 3 * one


def _call(hidden: Tensor, *args: Any, **kwargs: Any) -> Call:
    return Call(hidden, args, kwargs, False)


def test_the_first_of_a_call() -> None:
    b, n, w = 3, 12, 12  # the width is the length: only dimension 1 is cut
    call = _call(
        torch.randn(b, n, w), torch.randn(b, 1, n, n), None,
        mask=torch.randn(1, 1, n, n), padding=torch.randn(b, n),
        position=(torch.randn(1, n, w), torch.randn(b, n, w)),
        places=torch.arange(n), samples=torch.arange(b), other=torch.randn(7), flag=True,
    )  # fmt: skip
    short = call.first(1, 5)
    assert short.hidden.shape == (1, 5, w)
    assert short.args[0].shape == (1, 1, 5, 5)
    assert short.args[1] is None
    assert short.kwargs["mask"].shape == (1, 1, 5, 5)
    assert short.kwargs["padding"].shape == (1, 5)
    assert [p.shape for p in short.kwargs["position"]] == [(1, 5, w), (1, 5, w)]
    assert short.kwargs["places"].tolist() == list(range(5))
    assert short.kwargs["samples"].tolist() == [0]
    assert short.kwargs["other"].shape == (7,)
    assert short.kwargs["flag"] is True
    assert short.double().hidden.dtype == torch.float64
    assert short.double().kwargs["places"].dtype == torch.int64


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_first_sample_runs_as_it_does_alone(name: str) -> None:
    """Causal or short texts: the first positions do not depend on what was cut off."""
    model = NETWORKS[name][0]()
    length = 6 if name == "llama" else 12
    stream = Stream(model, TEXTS[:1])
    stream.enter(1)
    call = next(stream.calls())
    block = model.module.get_submodule(model.blocks[1])
    short = call.first(1, length)
    whole = call.run(block, call.hidden)
    torch.testing.assert_close(short.run(block, short.hidden), whole[:1, :length])


def test_stages_have_the_statistics_of_the_whole_block() -> None:
    """What runs only up to a stage, beside a run of the whole block; nothing behind it runs."""
    model = net.bert(2)
    batches = [net.text_batch(seed) for seed in (1, 2)]
    stream, other = Stream(model, batches), Stream(model.copy(), batches)
    stream.enter(1)
    other.enter(1)
    name = model.blocks[1]
    block = model.module.get_submodule(name)
    layers = {f"{name}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    unit = Unit(name, model, layers, stream, 1)
    needs = frozenset({"gram", "cross"})
    whole = stream.collect(unit, needs, other)
    stages = stream.stages(unit)
    assert [len(stage) for stage in stages] == [3, 1, 1, 1]  # query, key and value together
    ran: Counter[str] = Counter()
    for path, layer in layers.items():
        layer.register_forward_hook(lambda *_, path=path: ran.update([path]))
    walked = stream.staged(unit, needs, other)
    for number, stage in enumerate(stages):
        own, found = next(walked)
        assert list(own) == list(stage)
        # Once to see the order, twice a batch to see that it may be stopped; then once a batch what
        # is before the stage, and nothing behind it.
        assert ran == {n: 7 if p < number else 5 for p, s in enumerate(stages) for n in s}
        for path, stats in found.items():
            for wanted, got in (
                (whole[path].gram, stats.gram), (whole[path].cross, stats.cross),
                (whole[path].mean, stats.mean), (whole[path].was, stats.was),
            ):  # fmt: skip
                assert torch.equal(wanted, got)
    assert next(walked, None) is None
    # By hand, of the tokens that are there.
    rows = []
    layer = layers[f"{name}.output.dense"]
    handle = layer.register_forward_pre_hook(lambda _, x: rows.append(x[0]))
    with torch.no_grad():
        for batch in batches:
            model.run(batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    kept = torch.cat([x[mask] for x, mask in zip(rows, masks, strict=True)]).double()
    torch.testing.assert_close(whole[f"{name}.output.dense"].mean, kept.mean(0), atol=1e-6, rtol=0)


def test_later_batches_are_not_run_past_the_blocks() -> None:
    """Logits are larger than all that is kept; the first batch shows what comes after."""
    model = net.llama()
    runs: list[int] = []
    head: nn.Module = model.module.lm_head  # type: ignore[assignment]
    head.register_forward_hook(lambda *_: runs.append(1))
    batches = [net.text_batch(seed) for seed in range(4)]
    stream = Stream(model, batches)
    assert stream.chained
    assert len(runs) == 1
    stream.enter(2)
    inputs = [call.hidden.clone() for call in stream.calls()]
    for batch, found in zip(batches, inputs, strict=True):
        alone = Stream(model, [batch])
        alone.enter(2)
        assert torch.equal(next(alone.calls()).hidden, found)


def test_masks_that_only_later_batches_need_are_each_block_s_own() -> None:
    """A short text without padding shows no mask; a long one has another in a sliding window."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=50, use_sliding_window=True, sliding_window=4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    module = transformers.Qwen2ForCausalLM(config).eval()
    batches: list[Batch] = []
    for length, padding in ((3, 0), (12, 0), (12, 5)):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, length - padding :] = 0
        batches.append({"input_ids": torch.randint(50, (2, length)), "attention_mask": mask})
    model = net.wrap(module, "causal", batches[0])
    seen: list[Tensor] = []
    block = module.model.layers[2]
    handle = block.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        for batch in batches:
            model.run(batch)
    handle.remove()
    stream = Stream(model, batches)
    assert stream.chained
    stream.enter(2)
    for call, wanted in zip(stream.calls(), seen, strict=True):
        assert torch.equal(call.hidden, wanted)


class _InPlace(nn.Module):
    """Two layers read one tensor, which is changed between them."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.tanh()
        h += self.first(h)
        return x + self.third(self.second(h).tanh())


class _Keeps(nn.Module):
    """State on the module between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        self.skip = x.tanh()
        y = self.first(self.skip)
        return x + self.third(self.second(y.relu() + self.skip).tanh())


class _Turns(nn.Module):
    """The order is the data's."""

    def forward(self, x: Tensor) -> Tensor:
        one, two = (self.first, self.second) if x.mean() > 0 else (self.second, self.first)
        return x + self.third(two(one(x).tanh()).tanh())


class _Half(nn.Module):
    """A mode of the thread around two layers."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.second(self.first(x.tanh()).tanh())
        return x + self.third(y.float().tanh())


class _Named(nn.Module):
    """Layers are called by the name of their input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(input=self.first(input=x.tanh()).tanh())
        return x + self.third(input=y.tanh())


@pytest.mark.parametrize("kind", [_InPlace, _Keeps, _Turns, _Half, _Named])
def test_blocks_that_cannot_be_stopped_have_their_own_statistics(kind: type[nn.Module]) -> None:
    """Beside plain hooks and numpy, every stage after the edits before it; nothing else changes."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(kind() for _ in range(2))
    for block in blocks:
        for name in ("first", "second", "third"):
            setattr(block, name, nn.Linear(6, 6))
    module = nn.Module()
    module.blocks = blocks
    module.forward = lambda x: blocks[1](blocks[0](x))  # type: ignore[method-assign]
    batches = [{"x": torch.randn(8, 6) + shift} for shift in (1.0, -1.0, 0.2)]
    model = net.wrap(module, "tensor", batches[0])
    stream = Stream(model, batches)
    for unit in units_of(model, stream):
        if unit.index is None:
            continue
        stream.enter(unit.index)
        for layers, stats in stream.staged(unit, GRAM):
            inputs: dict[str, list[Tensor]] = {name: [] for name in layers}

            def see(_: nn.Module, args: Any, kwargs: Any, name: str, inputs: Any = inputs) -> None:
                inputs[name].append((args or [*kwargs.values()])[0].float().clone())

            handles = [
                layer.register_forward_pre_hook(functools.partial(see, name=name), with_kwargs=True)
                for name, layer in layers.items()
            ]
            with torch.no_grad():
                for batch in batches:
                    model.run(batch)
            for handle in handles:
                handle.remove()
            for name, layer in layers.items():
                rows = torch.cat(inputs[name]).double().numpy()
                assert stats[name].count == len(rows) == 24
                gram = stats[name].gram
                assert gram is not None
                np.testing.assert_allclose(gram.numpy(), rows.T @ rows / 24, rtol=1e-2, atol=1e-5)
                perform(model, Edit("weight", f"{name}.weight", 0.5 * layer.weight.detach(), ""))  # type: ignore[operator]
    assert not torch.is_autocast_enabled("cpu")
    assert not any(m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"dilation": 3, "padding": 2}, {"stride": 3}]
)
def test_the_gram_of_a_one_dimensional_convolution_is_that_of_its_outputs(
    options: dict[str, int],
) -> None:
    """W G W^T is the mean outer product of what the layer gives, W times its mean the mean."""
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 3, bias=False, **options)
    x = torch.randn(5, 4, 30)
    model = net.wrap(nn.Sequential(layer), "tensor", {"x": x})
    stream = Stream(model, [{"x": x}])
    unit = Unit("whole", model, {"0": layer}, stream, None)
    found = stream.collect(unit, frozenset({"gram"}))["0"]
    with torch.no_grad():
        given = layer(x).double().movedim(1, -1).reshape(-1, 6)  # [places, out]
    matrix = layer.weight.detach().double().flatten(1)
    assert found.gram is not None
    assert found.mean is not None
    assert found.count == len(given)
    torch.testing.assert_close(matrix @ found.gram @ matrix.T, given.T @ given / len(given),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    torch.testing.assert_close(matrix @ found.mean, given.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [2, 3])
@pytest.mark.parametrize("held", [1 << 30, 0])
def test_layers_anywhere_in_order_each_after_the_edits_before(
    held: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside hooks on the network as the caller has made it so far; run once where it may be."""
    monkeypatch.setattr(calibrate, "_HELD", held)
    model = net.resnet()
    batches = [{"x": torch.randn(images, 3, 8, 8)} for _ in range(3)]
    other = Stream(model.copy(), batches)
    stream = Stream(model, batches)
    layers = {n: m for n, m in model.module.named_modules() if isinstance(m, nn.Linear)}
    layers |= {n: m for n, m in model.module.named_modules() if isinstance(m, nn.Conv2d)}
    runs: list[int] = []
    first = next(m for m in layers.values() if isinstance(m, nn.Conv2d))
    before = {n: _rows(other.model, n, batches) for n in layers}
    handle = first.register_forward_hook(lambda *_: runs.append(1))
    seen = []
    for part, found in stream.through(layers, frozenset({"gram", "cross"}), other):
        seen += [*part]
        count = len(runs)
        for name, stats in found.items():
            now, was = _rows(model, name, batches), before[name]
            torch.testing.assert_close(stats.gram, now.T @ now / len(now), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stats.cross, was.T @ now / len(now), rtol=1e-4, atol=1e-5)
            weight: Tensor = layers[name].weight  # type: ignore[assignment]
            perform(model, Edit("weight", f"{name}.weight", 0.5 * weight.detach(), ""))
        del runs[count:]
    assert sorted(seen) == sorted(layers)
    # One sample for the order; then each batch, and two of them to see that they may be stopped.
    assert len(runs) == (1 + 3 + 2 + 3 if held else 1 + 3 * len(layers))
    handle.remove()
    assert not any(m._forward_pre_hooks for m in model.module.modules())


def _rows(model: Model, path: str, batches: list[Batch]) -> Tensor:
    """Inputs of a layer as rows that its matrix multiplies."""
    layer = model.module.get_submodule(path)
    found = [x[0] if isinstance(x, tuple) else x for x in _seen(model, path, batches)]
    if isinstance(layer, nn.Conv2d):
        found = [
            nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            .movedim(1, -1).flatten(0, 1) for x in found
        ]  # fmt: skip
    return torch.cat(found).double()


def test_layers_that_run_twice_are_seen_both_times() -> None:
    torch.manual_seed(0)
    twice, once = nn.Linear(4, 4), nn.Linear(4, 4)
    module = nn.Module()
    module.twice, module.once = twice, once
    module.forward = lambda x: twice(once(twice(x)))  # type: ignore[method-assign]
    batches = [{"x": torch.randn(5, 4)} for _ in range(2)]
    model = net.wrap(module, "tensor", batches[0])
    found = Stream(model, batches).through({"once": once, "twice": twice}, GRAM)
    assert {name: part[name].count for _, part in found for name in part} == {
        "twice": 20,
        "once": 10,
    }


def test_of_many_places_some_are_seen_evenly() -> None:
    """Every other patch of 8,192, as they come; beside torch's own."""
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(8, 2, 32, 32)
    model = net.wrap(nn.Sequential(layer), "tensor", {"x": x})
    unit = Unit("whole", model, {"0": layer}, None, None)
    found = Stream(model, [{"x": x}]).collect(unit, GRAM)["0"]
    rows = nn.functional.unfold(x, 3, padding=1).movedim(1, -1).flatten(0, 1)[::2].double()
    assert found.count == len(rows) == 4096
    assert found.gram is not None
    torch.testing.assert_close(found.gram, rows.T @ rows / 4096, rtol=1e-5, atol=1e-6)
