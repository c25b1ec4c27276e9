"""Quantize: planes are the weights, ranges are what was seen, tied tables count once."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.calibrate import LayerStats
from penjing.errors import InputError, UsageError
from penjing.model import Model
from penjing.planes import Scheme
from penjing.quantizers import gptq
from penjing.recipe import Recipe
from penjing.registry import lookup
from penjing.rotation import Rotation
from penjing.steps.prune import Prune
from penjing.steps.quantize import Quantize

TEXTS = [net.text_batch(seed) for seed in (1, 2)]


def _inputs(model: Model, path: str, batches: list[net.Batch]) -> np.ndarray:
    """Rows that a layer gets, padding left out."""
    found = []

    def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        mask = batch.get("attention_mask")
        found.append(args[0][mask.bool()] if mask is not None else args[0].flatten(0, -2))

    handle = model.module.get_submodule(path).register_forward_pre_hook(see)
    with torch.no_grad():
        for batch in batches:
            model.run(batch)
    handle.remove()
    return torch.cat(found).double().numpy()


@pytest.mark.parametrize(
    ("make", "batches"),
    [(net.llama, TEXTS), (net.stack, net.arrays(2)), (net.resnet, [net.resnet().example])],
    ids=["llama", "stack", "resnet"],
)
@pytest.mark.parametrize("method", ["gptq", "rtn", "random"])
def test_the_planes_are_the_weights(make: net.Any, batches: list[net.Batch], method: str) -> None:
    model = make()
    done = apply(model, Recipe((Quantize(4, 16, method),)), batches)
    small = done.model
    layers = {f"{n}.weight" for n, m in model.module.named_modules()
              if isinstance(m, nn.Linear | nn.Conv2d)}  # fmt: skip
    assert set(small.planes) == layers
    for name, planes in small.planes.items():
        weight, old = small.module.get_parameter(name), model.module.get_parameter(name)
        codes = planes.codes[0].double().numpy()
        assert codes.max() <= 15
        # w = scale * code + shift, by numpy, group by group.
        group = np.arange(codes.shape[1]) // planes.group
        by_hand = planes.scale[0].double().numpy()[:, group] * codes
        by_hand += planes.shift.double().numpy()[:, group]
        np.testing.assert_allclose(
            weight.detach().flatten(1).numpy(), by_hand, rtol=1e-5, atol=1e-6
        )
        assert planes.shape == tuple(old.shape)
        error = float((weight - old).detach().norm() / old.detach().norm())
        noted = next(d.note for d in done.done if d.path == name)["weight_error"]
        assert noted == pytest.approx(error, rel=1e-4)
        if method != "random":
            assert error < 0.3


def test_gptq_beats_rtn_beats_random_on_the_output() -> None:
    model, batches = net.stack(), net.arrays(6)
    with torch.no_grad():
        wanted = model.run(batches[-1])
        errors = [
            float((apply(model, Recipe((Quantize(3, method=m),)), batches[:-1])
                   .model.run(batches[-1]) - wanted).norm())
            for m in ("gptq", "rtn", "random")
        ]  # fmt: skip
    assert errors[0] < errors[1] < errors[2]


def test_the_bias_takes_up_the_mean_of_the_error() -> None:
    """Mean outputs over the calibration data, by hand, of the first layer and of a later one."""
    model, batches = net.stack(), net.arrays(4)
    for name in ("inp", "blocks.1.up"):  # inputs with means that are not zero
        model.module.get_submodule(name).bias.data += 0.5
    small = apply(model, Recipe((Quantize(2),)), batches).model
    plain = apply(model, Recipe((Quantize(2, bias=False),)), batches).model
    for name in ("inp", "blocks.1.up"):
        wanted, got, kept = (
            _mean_output(network, name, batches) for network in (model, small, plain)
        )
        assert np.abs(got - wanted).max() < 1e-5
        assert np.abs(kept - wanted).max() > 1e-3
    assert torch.equal(plain.module.inp.bias, model.module.inp.bias)


def _depthwise() -> Model:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU6(),
        torch.nn.Conv2d(8, 16, 3, padding=1, groups=8), torch.nn.ReLU6(),
        torch.nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    return net.wrap(module, "tensor", {"x": torch.randn(2, 3, 8, 8)})


def _pictures(count: int = 4) -> list[net.Batch]:
    """Neighbouring places are nearly equal, as in a photograph."""
    generator = torch.Generator().manual_seed(3)
    small = torch.randn(count, 6, 3, 4, 4, generator=generator)
    return [
        {"x": torch.nn.functional.interpolate(x, scale_factor=4, mode="bilinear")} for x in small
    ]


def test_a_depthwise_layer_is_rounded_by_what_it_sees() -> None:
    model, batches = _depthwise(), _pictures()
    x = torch.from_numpy(_inputs_of_images(model, "2", batches))
    layer = model.module[2]
    with torch.no_grad():
        wanted = layer(x)
    errors, shifts = {}, {}
    for method in ("rtn", "gptq"):
        step = Quantize(bits=4, symmetric=True, method=method, targets=("2",))
        made = apply(model, Recipe((step,)), batches).model.module[2]
        with torch.no_grad():
            change = (made(x) - wanted).double()
        shifts[method] = float(change.mean((0, 2, 3)).abs().max())
        errors[method] = float((change - change.mean((0, 2, 3), keepdim=True)).norm())
    assert errors["gptq"] < 0.6 * errors["rtn"]
    # The bias holds the mean, at the padded edges too.
    assert shifts["gptq"] < 1e-5 < shifts["rtn"]


def test_paired_weights_follow_the_kernels() -> None:
    """Of a dense kernel 7 bits, of a depthwise one 8, of one place 8 whose neighbours fit."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU6(),
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.nn.ReLU6(),
        torch.nn.Conv2d(8, 16, 3, padding=1, groups=8), torch.nn.ReLU6(),
        torch.nn.Conv2d(16, 40, 1),
    )  # fmt: skip
    model = net.wrap(module, "tensor", {"x": torch.randn(2, 3, 8, 8)})
    step = Quantize(8, symmetric=True, activations=8, paired=True)
    planes = apply(model, Recipe((step,)), _pictures()).model.planes
    assert [planes[f"{n}.weight"].bits for n in (0, 2, 4, 6)] == [(7,), (8,), (7,), (8,)]
    signed = planes["6.weight"].signed
    assert signed is not None
    codes = signed.int()
    assert int(codes.abs().max()) > 64
    assert int((codes[:, ::2] + codes[:, 1::2]).abs().max()) <= 128
    assert int(planes["2.weight"].signed.int().abs().max()) > 64  # type: ignore[union-attr]


@pytest.mark.parametrize("outlier", [False, True])
def test_channels_are_divided_where_it_helps_on_other_inputs(outlier: bool) -> None:
    """An outlier channel is there again; peaks of a few vectors of even channels are chance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=generator).exp()
    if outlier:
        x[:, 3] *= 100
    layer = torch.nn.Linear(48, 16)
    model = net.wrap(torch.nn.Sequential(layer), "tensor", {"x": x[:2]})
    step = Quantize(8, symmetric=True, activations=8, method="rtn")
    made = apply(model, Recipe((step,)), [{"x": x}]).model.activations["0"]
    assert (made.channels is not None) == outlier


def _inputs_of_images(network: Model, layer: str, batches: list[net.Batch]) -> np.ndarray:
    kept: list[torch.Tensor] = []
    handle = network.module.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: kept.append(args[0].clone())
    )
    with torch.no_grad():
        for batch in batches:
            network.run(batch)
    handle.remove()
    return torch.cat(kept).numpy()


def _mean_output(network: Model, layer: str, batches: list[net.Batch]) -> np.ndarray:
    module = network.module.get_submodule(layer)
    weight, bias = module.weight.detach().double(), module.bias.detach().double()
    return _inputs(network, layer, batches).mean(0) @ weight.numpy().T + bias.numpy()


def test_later_blocks_are_calibrated_on_edited_earlier_ones() -> None:
    """Block 1's planes are those of a Gram matrix of the quantized block 0's output."""
    model, batches = net.stack(), net.arrays(4)
    small = apply(model, Recipe((Quantize(2, alpha=0.0, bias=False),)), batches).model
    partly = model.copy()
    partly.module.inp.load_state_dict(small.module.inp.state_dict())
    partly.module.blocks[0].load_state_dict(small.module.blocks[0].state_dict())

    def fit(network: Model, layer: str) -> torch.Tensor:
        rows = _inputs(network, layer, batches)
        stats = type("S", (), {"gram": torch.from_numpy(rows.T @ rows / len(rows))})
        weight = model.module.get_submodule(layer).weight.detach()
        return gptq.fit(weight, Scheme(2), stats).codes

    found = small.planes["blocks.1.up.weight"].codes
    assert torch.equal(found, fit(partly, "blocks.1.up"))
    assert not torch.equal(found, fit(model, "blocks.1.up"))  # nor that of the original
    # Within a block likewise: `down` reads what the quantized `up` gives.
    found = small.planes["blocks.1.down.weight"].codes
    assert not torch.equal(found, fit(partly, "blocks.1.down"))
    partly.module.blocks[1].up.load_state_dict(small.module.blocks[1].up.state_dict())
    assert torch.equal(found, fit(partly, "blocks.1.down"))


def test_a_layer_makes_up_for_what_was_lost_before_it() -> None:
    """With alpha the outputs come nearer to the original's, on data that nothing was fitted to."""
    model = net.stack()
    batches = net.arrays(80)
    errors = []
    for alpha in (0.0, 0.5):
        small = apply(model, Recipe((Quantize(2, alpha=alpha),)), batches[:-2]).model
        with torch.no_grad():
            gaps = [float((small.run(b) - model.run(b)).norm()) for b in batches[-2:]]
        errors.append(sum(gaps))
    assert errors[1] < errors[0]


def test_static_ranges_cover_what_was_seen() -> None:
    model = net.llama(2)
    step = Quantize(8, 0, "rtn", symmetric=True, activations=8, migrate=0.0,
                    targets=("*.down_proj",))  # fmt: skip
    small = apply(model, Recipe((step,)), TEXTS).model
    path = "model.layers.0.mlp.down_proj"
    rows = _inputs(model, path, TEXTS)
    found = small.activations[path]
    assert found.scale == pytest.approx((rows.max() - rows.min()) / 255, rel=1e-5)
    assert found.zero_point == round(-rows.min() / found.scale)
    # The module computes with rounded inputs and weights.
    layer, x = small.module.get_submodule(path), torch.from_numpy(rows).float()
    grid = np.clip(np.rint(x.numpy() / found.scale) + found.zero_point, 0, 255)
    rounded = (grid - found.zero_point) * found.scale
    wanted = rounded @ layer.weight.detach().double().numpy().T
    np.testing.assert_allclose(layer(x).detach(), wanted, rtol=1e-3, atol=1e-4)
    assert set(small.activations) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}


def test_dynamic_ranges_need_no_data() -> None:
    model = net.stack()
    step = Quantize(8, 0, "rtn", symmetric=True, activations=8, dynamic=True)
    small = apply(model, Recipe((step,))).model
    assert {(r.scale, r.zero_point) for r in small.activations.values()} == {(0.0, 0)}
    assert len(small.activations) == 8
    with torch.no_grad():
        torch.testing.assert_close(
            small.run(model.example), model.run(model.example), rtol=0.1, atol=0.1
        )


def test_static_ranges_need_data() -> None:
    step = Quantize(8, 0, "rtn", symmetric=True, activations=8)
    with pytest.raises(UsageError, match="saw no calibration data"):
        apply(net.stack(), Recipe((step,)))


def test_zeros_and_layers_never_run() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(0 * x)

    model = net.wrap(Idle(), "tensor", {"x": torch.randn(2, 4)})
    step = Quantize(8, 0, "rtn", symmetric=True, activations=8)
    small = apply(model, Recipe((step,)), [model.example]).model
    assert set(small.activations) == {"used"}
    assert set(small.planes) == {"used.weight", "never.weight"}
    torch.testing.assert_close(small.run(model.example), model.run(model.example))


def test_a_tied_table_is_quantized_once() -> None:
    model = net.llama(2, tie_word_embeddings=True, vocab_size=600)
    table = "model.embed_tokens.weight"
    once = apply(model, Recipe((Quantize(4, method="rtn", embeddings=8),))).model
    assert "lm_head.weight" not in once.planes
    assert once.planes[table].bits == (8,)
    assert once.tied() == [(table, "lm_head.weight")]
    assert once.module.lm_head.weight is once.module.model.embed_tokens.weight
    assert torch.equal(once.module.lm_head.weight, once.planes[table].dequantize())
    # Without embeddings the head is a linear layer as any other.
    assert apply(model, Recipe((Quantize(4, method="rtn"),))).model.planes[table].bits == (4,)


def test_small_tables_are_left() -> None:
    model = net.bert(2, vocab_size=600)
    small = apply(
        model, Recipe((Quantize(0, method="rtn", embeddings=4, embedding_group=8),))
    ).model
    assert set(small.planes) == {"embeddings.word_embeddings.weight"}
    assert small.planes["embeddings.word_embeddings.weight"].group == 8


def test_targets_and_skip() -> None:
    step = Quantize(4, method="rtn", targets=("blocks.*",), skip=("*.0.*", "*.down"))
    small = apply(net.stack(), Recipe((step,))).model
    assert set(small.planes) == {"blocks.1.up.weight", "blocks.2.up.weight"}


def test_layers_of_other_bits_and_groups() -> None:
    step = Quantize(bits=3, widths=("blocks.1.*=2/4", "blocks.*.up=5"))
    assert step._sizes is step._sizes  # read once, not for every layer
    made = apply(net.stack(), Recipe((step,)), net.arrays()).model
    found = {n: (p.bits, p.group) for n, p in made.planes.items() if n.startswith("blocks.")}
    assert found == {
        "blocks.0.up.weight": ((5,), 8), "blocks.0.down.weight": ((3,), 24),
        "blocks.1.up.weight": ((2,), 4), "blocks.1.down.weight": ((2,), 4),
        "blocks.2.up.weight": ((5,), 8), "blocks.2.down.weight": ((3,), 24),
    }  # fmt: skip


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_pruned_connections_stay_zero(method: str) -> None:
    recipe = Recipe((Prune(0.5, "magnitude"), Quantize(4, 4, method)))
    small = apply(net.stack(), recipe, net.arrays(4)).model
    assert len(small.masks) == 6
    for name, mask in small.masks.items():
        weight = small.module.get_parameter(name)
        assert not weight[~mask].any()
        assert torch.equal(weight, small.planes[name].dequantize())
        assert weight[mask].any()


def test_a_quantized_layer_is_not_quantized_again() -> None:
    once = apply(net.stack(), Recipe((Quantize(4, method="rtn"),))).model
    twice = apply(once, Recipe((Quantize(2, method="rtn"),)))
    assert net.same(once, twice.model)
    assert {done.kind for done in twice.done} == {"left"}
    assert all("already in 4 bits" in why for why in twice.model.left.values())


def test_refusals(tmp_path: Path) -> None:
    for wrong, message in (
        ({"bits": 9}, "bits"),
        ({"embeddings": 1}, "bits"),
        ({"embeddings": 4, "embedding_group": -1}, "group"),
        ({"method": "best"}, "unknown name in quantizers"),
        ({"activations": 4}, "activations"),
        ({"activations": 8}, "symmetric weights"),
        ({"activations": 8, "symmetric": True, "group": 32}, "group = 0"),
        ({"widths": ("*.up",)}, "GLOB=BITS"),
        ({"widths": ("*.up=9",)}, "bits"),
        ({"widths": ("*.up=4",), "codes": "binary", "bits": 2}, "integer codes"),
        ({"paired": True}, "paired"),
        ({"paired": True, "activations": 8, "symmetric": True, "bits": 7}, "paired"),
        ({"paired": True, "activations": 8, "symmetric": True, "method": "hqq"}, "paired"),
    ):
        with pytest.raises(UsageError, match=message):
            Quantize(**wrong)  # type: ignore[arg-type]
    model = net.stack()
    with torch.no_grad():
        model.module.blocks[0].up.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        apply(model, Recipe((Quantize(4, method="rtn"),)))


def test_a_method_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from penjing.quantizers import rtn\n"
        "def fit(weight, scheme, stats=None):\n"
        "    assert stats.gram.shape == (weight.shape[1],) * 2\n"
        "    return rtn.fit(2 * weight, scheme)\n"
    )
    model = net.stack()
    recipe = Recipe((Quantize(8, method=f"{file}:fit", alpha=0.0),))
    small = apply(model, recipe, net.arrays(1)).model
    torch.testing.assert_close(
        small.module.out.weight, 2 * model.module.out.weight, rtol=0.02, atol=0.02
    )


def test_a_block_that_nothing_is_wanted_of() -> None:
    """Blocks of other widths before and after the one that is quantized, as in CNNs."""
    torch.manual_seed(0)
    widths = (3, 5, 7, 4)
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    data = [{"x": torch.randn(6, 3)} for _ in range(3)]
    model = net.wrap(nn.Sequential(*layers), "tensor", data[0])
    model.blocks = ("0", "1", "2")
    for targets in (("0.*",), ("1.*",), ("2.*",)):
        made = apply(model, Recipe((Quantize(4, method="gptq", targets=targets),)), data).model
        assert list(made.planes) == [f"{targets[0][0]}.0.weight"]


@pytest.mark.parametrize(
    ("codes", "bits", "most"),
    [
        ("binary", 2, 3.0),
        ("residual", 3, 4.0),
        ("ternary", 1.6, 2.5),
        ("power2", 3, 4.0),
        ("additive", 2, 4.5),  # its books are most of a layer this small
        ("e8", 2, 2.6),
        ("trellis", 2, 2.6),
    ],
)
def test_other_codes_inside_a_network(codes: str, bits: float, most: float) -> None:
    """With feedback nearer on the output than the nearest codes, at the stored bits said."""
    model, batches = net.stack(width=32, hidden=64), net.arrays(12)
    errors = []
    for method in ("rtn", "gptq"):
        step = Quantize(bits, 32, method, codes=codes, scale_bits=8, targets=("blocks.*",))
        small = apply(model, Recipe((step,)), batches).model
        assert len(small.planes) == 6
        for name, planes in small.planes.items():
            assert torch.equal(small.module.get_parameter(name), planes.dequantize())
            assert planes.stored_bits <= most
        with torch.no_grad():
            errors.append(sum(float((small.run(b) - model.run(b)).norm()) for b in batches))
    assert errors[1] < errors[0]
    assert Recipe.from_toml(Recipe((step,)).to_toml(), {"quantize": Quantize}).steps == (step,)


def test_refusals_of_other_codes() -> None:
    for options in (
        {"bits": 2.5},
        {"bits": 2, "codes": "binry"},
        {"bits": 3, "codes": "ternary"},
        {"bits": 2, "codes": "binary", "method": "hqq"},
        {"bits": 8, "scale_bits": 7},
        {"bits": 1.5, "codes": "trellis"},
        {"bits": 8, "codes": "binary", "activations": 8, "symmetric": True},
    ):
        with pytest.raises(UsageError):
            Quantize(**options)  # type: ignore[arg-type]
    pruned = apply(net.stack(), Recipe((Prune(0.5, "magnitude"),))).model
    with pytest.raises(InputError, match="removed connections"):
        apply(pruned, Recipe((Quantize(2, method="rtn", codes="binary"),)))


def _dense(size: int) -> np.ndarray:
    """Q [size, size], by what it does to unit vectors."""
    return np.asarray(Rotation(size).apply(torch.eye(size, dtype=torch.float64)).T.numpy())


@pytest.mark.parametrize("method", ["rtn", "gptq", "clip", "hqq"])
def test_rotated_codes_are_those_of_the_rotated_problem(method: str) -> None:
    """W Q^T and H' = Q H Q^T by dense matrices, given to the quantizer itself."""
    model, batches = net.stack(), net.arrays(4)
    name = "blocks.1.down"
    options = {"alpha": 0.0, "bias": False, "targets": (name,), "method": method}
    data = batches if method == "gptq" else []
    small = apply(model, Recipe((Quantize(4, rotate=True, **options),)), data).model
    planes = small.planes[f"{name}.weight"]
    layer = model.module.get_submodule(name)
    q = _dense(layer.in_features)
    x = _inputs(model, name, batches)
    seen = LayerStats(gram=torch.from_numpy(q @ (x.T @ x / len(x)) @ q.T))
    turned = torch.from_numpy(layer.weight.detach().double().numpy() @ q.T).float()
    fit = lookup("quantizers", method, "fit")
    wanted = fit(turned, Scheme(4), seen if data else LayerStats())
    assert planes.rotation == 0
    assert float((planes.codes != wanted.codes).float().mean()) < 0.02
    torch.testing.assert_close(planes.scale, wanted.scale, rtol=0.02, atol=0)
    # The network's own weight is back in its own basis.
    by_hand = (planes.scale[0] * planes.codes[0] + planes.shift).double().numpy() @ q
    now = small.module.get_parameter(f"{name}.weight").detach().numpy()
    np.testing.assert_allclose(now, by_hand, atol=1e-5)


def test_rotation_tames_outliers() -> None:
    """A few large weights in every row: without a rotation they set the scale of all."""
    model = net.stack()
    layer = model.module.get_submodule("blocks.0.down")
    layer.weight.data[:, 1] *= 30
    before = layer.weight.detach().clone()
    errors = []
    for rotate in (False, True):
        step = Quantize(4, method="rtn", rotate=rotate, targets=("blocks.0.down",))
        after = apply(model, Recipe((step,))).model.module.blocks[0].down.weight.detach()
        errors.append(float((after - before)[:, [0, *range(2, 8)]].norm()))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize(
    ("codes", "bits"), [("binary", 2), ("e8", 2), ("additive", 2), ("trellis", 2)]
)
def test_families_are_rotated_with_their_data(codes: str, bits: int) -> None:
    model = net.llama()
    step = Quantize(bits, codes=codes, rotate=True, scale_bits=8, targets=("model.layers.*",))
    done = apply(model, Recipe((step,)), TEXTS)
    assert all(planes.rotation == 0 for planes in done.model.planes.values())
    why = [d.why for d in done.done if d.kind == "quantize"]
    assert why
    assert all("inputs rotated" in text for text in why)
    with torch.no_grad():
        wanted = model.run(model.example)
        far = (done.model.run(model.example) - wanted).norm()
    assert float(far) < float(wanted.norm())


def test_what_is_not_rotated_says_so() -> None:
    model = net.llama(layers=1, tie_word_embeddings=True)
    done = apply(model, Recipe((Quantize(4, method="rtn", rotate=True),)))
    said = {d.path: d.why for d in done.done if d.kind == "quantize"}
    assert "not rotated: its matrix has another reader" in said["model.embed_tokens.weight"]
    assert done.model.planes["model.embed_tokens.weight"].rotation is None
    assert done.model.planes["model.layers.0.mlp.up_proj.weight"].rotation == 0
    odd = net.wrap(nn.Sequential(nn.Linear(521, 4)), "tensor", {"x": torch.randn(2, 521)})
    done = apply(odd, Recipe((Quantize(4, method="rtn", rotate=True),)))
    assert "not rotated: 521 inputs" in done.done[0].why
    pictures = apply(_depthwise(), Recipe((Quantize(4, method="rtn", rotate=True),)))
    assert all("not rotated: a Conv2d" in d.why for d in pictures.done if d.kind == "quantize")


def test_refusals_of_rotations() -> None:
    with pytest.raises(UsageError, match="8-bit activations"):
        Quantize(8, symmetric=True, activations=8, rotate=True)
    with pytest.raises(InputError, match=r"removed connections.*rotated"):
        apply(
            net.stack(), Recipe((Prune(0.5, "magnitude"), Quantize(4, method="rtn", rotate=True)))
        )


def test_a_rotated_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    model, recipe = net.llama(), Recipe((Quantize(2, codes="binary", rotate=True),))
    whole = apply(model, recipe, TEXTS, journal=tmp_path / "a").model
    lines = (tmp_path / "a" / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a" / "journal.jsonl").write_text("".join(lines[:3]))
    again = apply(model, recipe, TEXTS, journal=tmp_path / "a").model
    for name, planes in whole.planes.items():
        assert torch.equal(again.planes[name].codes, planes.codes)
        assert torch.equal(again.module.get_parameter(name), whole.module.get_parameter(name))


def test_layers_that_read_one_input_have_one_grid() -> None:
    """Chosen alone, their grids differ, and a runtime rounds the input for each."""
    batches = [net.text_batch(seed, samples=4) for seed in range(3)]
    step = Quantize(bits=8, symmetric=True, activations=8, observer="auto")
    found = apply(net.bert(3), Recipe((step,)), batches).model.activations
    for block in range(3):
        names = (f"encoder.layer.{block}.attention.self.{n}" for n in ("query", "key", "value"))
        assert len({found[name].key for name in names}) == 1
    assert len({r.key for r in found.values()}) > 3
