"""Recover: nearer to the original on data not trained on; what was decided stays decided."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.calibrate import Unit
from penjing.errors import InputError, UsageError
from penjing.model import Model
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import rtn
from penjing.recipe import Recipe
from penjing.steps._grid import Grid
from penjing.steps.prune import Prune
from penjing.steps.quantize import Quantize
from penjing.steps.recover import Recover

BATCHES, SEEN_BY_NONE = net.arrays(9)[:8], net.arrays(9)[8]


def _kl(model: Model, original: Model, batch: net.Batch) -> float:
    """Mean KL divergence by torch's own."""
    with torch.no_grad():
        found, wanted = (m.run(batch).log_softmax(-1) for m in (model, original))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def _recover(steps: int = 60, lr: float = 3e-3, **options: object) -> Recover:
    return Recover(seconds=0, steps=steps, lr=lr, **options)  # type: ignore[arg-type]


def test_the_loss_falls_on_data_not_seen() -> None:
    model = net.stack()
    pruned = apply(model, Recipe((Prune(0.7, "magnitude"),))).model
    found = apply(pruned, Recipe((_recover(),)), BATCHES, original=model)
    before, after = (_kl(m, model, SEEN_BY_NONE) for m in (pruned, found.model))
    assert after < 0.5 * before
    assert "held-out loss" in found.done[0].why
    assert found.done[0].why.startswith("60 steps")


def test_masks_and_planes_stay() -> None:
    model = net.stack()
    edited = apply(
        model,
        Recipe((Prune(0.6, "magnitude"), Quantize(4, method="rtn", targets=("blocks.1.*", "out")))),
    ).model
    found = apply(edited, Recipe((_recover(30),)), BATCHES, original=model).model
    moved = 0
    for name, parameter in found.module.named_parameters():
        old = edited.module.get_parameter(name)
        if name in edited.masks:
            assert not parameter[~edited.masks[name]].any()
        if name in edited.planes:
            assert torch.equal(parameter, found.planes[name].dequantize())
            assert torch.equal(found.planes[name].codes, edited.planes[name].codes)
        else:
            moved += not torch.equal(parameter, old)
    assert moved >= 6
    assert len(edited.planes) == 3
    assert all(not p.requires_grad or p.grad is None for p in model.module.parameters())


def test_training_itself_keeps_the_masks() -> None:
    """Not only the edit: what is judged on held-out data is the masked network."""
    model = net.stack()
    pruned = apply(model, Recipe((Prune(0.6, "magnitude"),))).model
    unit = Unit("whole", pruned, {}, None, None, model, BATCHES)
    edits = {e.path: e.value for e in _recover(20).plan(unit, {})}
    for name, mask in pruned.masks.items():
        value = edits[name]
        assert isinstance(value, Tensor)
        assert not value[~mask].any()


def test_a_tied_mask_stays() -> None:
    model = net.llama(1, tie_word_embeddings=True)
    recipe = Recipe((Prune(0.5, "magnitude", targets=("lm_head",)), _recover(12)))
    texts = [net.text_batch(seed, samples=2) for seed in range(3)]
    found = apply(model, recipe, texts)
    (mask,) = found.model.masks.values()
    assert "weight" in {d.kind for d in found.done}
    assert not found.model.module.lm_head.weight[~mask].any()
    assert found.model.tied() == model.tied()


def test_ranges_do_not_stop_the_gradient() -> None:
    """All weights are on a grid and inputs are rounded: only biases can learn, and all do."""
    model = net.stack()
    quantize = Quantize(8, 0, "rtn", symmetric=True, activations=8)
    prune = Prune(0.6, "magnitude")
    found = apply(model, Recipe((prune, quantize, _recover(30))), BATCHES, original=model)
    trained = {d.path for d in found.done if d.kind == "weight"}
    assert trained == {n for n, _ in model.module.named_parameters() if n.endswith("bias")}


def test_the_same_bytes_twice_and_others_with_another_seed() -> None:
    model = net.stack()
    pruned = apply(model, Recipe((Prune(0.7, "magnitude"),))).model

    def run(seed: int) -> Model:
        return apply(pruned, Recipe((_recover(10, seed=seed),)), BATCHES, original=model).model

    one, two, other = run(0), run(0), run(1)
    assert net.same(one, two)
    assert not net.same(one, other)


def test_what_does_not_help_is_not_kept() -> None:
    model = net.stack()
    found = apply(model, Recipe((_recover(5, lr=0.5),)), BATCHES, original=model)
    assert found.done == []
    assert net.same(found.model, model)


@pytest.mark.parametrize("samples", [1, 6])
def test_a_single_batch(samples: int) -> None:
    model = net.stack()
    pruned = apply(model, Recipe((Prune(0.7, "magnitude"),))).model
    batch = {"x": BATCHES[0]["x"][:1].expand(samples, -1, -1).contiguous()}
    done = apply(pruned, Recipe((_recover(20),)), [batch], original=model).done
    assert ("held-out" in done[0].why) is (samples > 1)


def test_an_embedding_is_turned_toward_the_original() -> None:
    model = net.bert(2)
    texts = [net.text_batch(seed) for seed in range(5)]
    pruned = apply(model, Recipe((Prune(0.6, "magnitude"),))).model
    found = apply(pruned, Recipe((_recover(30, 2e-3),)), texts[:4], original=model).model

    def cosine(m: Model) -> float:
        with torch.no_grad():
            x, y = m.run(texts[4]), model.run(texts[4])
        return float((x * y).sum(1).div(x.norm(dim=1) * y.norm(dim=1)).mean())

    assert cosine(found) > cosine(pruned)


def test_padding_does_not_count_for_a_language_model() -> None:
    model = net.llama(1)
    pruned = apply(model, Recipe((Prune(0.6, "magnitude"),))).model
    batch = net.text_batch(1)
    other = {**batch, "input_ids": batch["input_ids"] + 7 * (1 - batch["attention_mask"])}
    one, two = (
        apply(pruned, Recipe((_recover(3),)), [b, b], original=model).model for b in (batch, other)
    )
    worst = max(
        float((p - q).detach().abs().max())
        for p, q in zip(one.module.parameters(), two.module.parameters(), strict=True)
    )
    change = max(
        float((p - q).detach().abs().max())
        for p, q in zip(one.module.parameters(), pruned.module.parameters(), strict=True)
    )
    assert worst < 0.02 * change


def test_targets_alone_are_trained() -> None:
    model = net.stack()
    pruned = apply(model, Recipe((Prune(0.7, "magnitude"),))).model
    step = _recover(10, targets=("blocks.1.*", "out.bias"))
    done = apply(pruned, Recipe((step,)), BATCHES, original=model).done
    blocks = {f"blocks.1.{n}.{p}" for n in ("up", "down") for p in ("weight", "bias")}
    assert {d.path for d in done} == blocks | {"out.bias"}
    with pytest.raises(UsageError, match="nothing to train"):
        apply(pruned, Recipe((_recover(1, targets=("no.*",)),)), BATCHES, original=model)
    with pytest.raises(UsageError, match="codes to learn; got a network without quantized weights"):
        apply(pruned, Recipe((_recover(1, codes=True),)), BATCHES, original=model)


def test_time_is_a_limit() -> None:
    model = net.stack()
    start = time.monotonic()
    apply(model, Recipe((Recover(seconds=0.3),)), BATCHES, original=model)
    assert time.monotonic() - start < 10


def test_refusals() -> None:
    for wrong in ({"seconds": 0.0}, {"seconds": -1.0}, {"lr": 0.0}, {"lr": 2.0}, {"loss": "x"}):
        with pytest.raises(UsageError):
            Recover(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="recover needs data"):
        apply(net.stack(), Recipe((Recover(),)))
    model = net.stack()
    broken = model.copy()
    with torch.no_grad():
        broken.module.out.bias[0] = float("inf")
    with pytest.raises(InputError, match="loss is not finite"):
        apply(broken, Recipe((_recover(3),)), BATCHES, original=model)


def test_scales_of_quantized_weights_learn_and_the_file_holds_what_was_learned() -> None:
    model = net.stack()
    for scheme in (Quantize(3, 8, method="rtn"), Quantize(2, method="rtn", symmetric=True)):
        small = apply(model, Recipe((scheme,))).model
        found = apply(small, Recipe((_recover(80, 1e-2),)), BATCHES, original=model).model
        moved = [
            n for n, p in found.planes.items() if not torch.equal(p.scale, small.planes[n].scale)
        ]
        assert len(moved) == len(small.planes)
        for name, planes in found.planes.items():
            assert torch.equal(planes.codes, small.planes[name].codes)
            assert torch.equal(found.module.get_parameter(name), planes.dequantize())
            again = IntegerPlanes.from_tensors(planes.tensors(), planes.describe())
            assert torch.equal(again.dequantize(), planes.dequantize())
        assert _kl(found, model, SEEN_BY_NONE) < _kl(small, model, SEEN_BY_NONE)


def test_learned_codes_change_and_help_beyond_scales() -> None:
    model = net.stack()
    small = apply(model, Recipe((Quantize(2, 8, method="rtn"),))).model
    errors = []
    for codes in (False, True):  # with nothing else trained, so that nothing else can help
        step = _recover(300, 1e-3, codes=codes, targets=tuple(small.planes))
        found = apply(small, Recipe((step,)), BATCHES, original=model).model
        errors.append(sum(_kl(found, model, b) for b in BATCHES))
    assert errors[1] < errors[0] < sum(_kl(small, model, b) for b in BATCHES)
    changed = [not torch.equal(p.codes, small.planes[n].codes) for n, p in found.planes.items()]
    assert any(changed)
    assert all(int(p.codes.max()) <= 3 for p in found.planes.values())


def test_the_gradient_of_a_grid_is_that_of_the_formula() -> None:
    """d/da of sum(c * w) by finite differences of the planes' own dequantization."""
    torch.manual_seed(1)
    planes = rtn.fit(torch.randn(3, 10), Scheme(4, 4))
    weights, grid = torch.randn(3, 10), Grid(planes)
    (grid(torch.empty(0)) * weights).sum().backward()
    for o, g in ((0, 0), (2, 2)):
        values = []
        for sign in (1, -1):
            scale = planes.scale.double().clone()
            scale[0, o, g] *= 1 + sign * 1e-3
            shift = -scale[0] * planes.zero_point
            made = planes.codes[0].double() * planes.spread(scale[0]) + planes.spread(shift)
            values.append(float((made * weights).sum()))
        assert grid.a.grad is not None
        assert float(grid.a.grad[0, o, g]) == pytest.approx(
            (values[0] - values[1]) / 2e-3, rel=1e-3
        )


def test_a_grid_of_rotated_planes_is_the_weight() -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(2))
    planes = replace(rtn.fit(weight, Scheme(4, 16)), rotation=0)
    grid = Grid(planes, planes.dequantize())
    torch.testing.assert_close(grid(weight), planes.dequantize(), rtol=1e-4, atol=1e-4)
    # The floats behind the codes are those of the rotated weight: at the codes themselves.
    assert grid.v is not None
    assert float((grid.v - grid.whole[0]).detach().abs().max()) < 1e-3
    assert torch.equal(grid.result().codes, planes.codes)
    assert grid.result().rotation == 0


def test_learned_codes_of_paired_weights_stay_paired() -> None:
    """Sums of neighbours fit 16 bits wherever descent goes; plain 8 bits go where they will."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 31, generator=generator) ** 3
    for paired in (True, False):
        planes = rtn.fit(weight, Scheme(8, symmetric=True, paired=paired))
        grid = Grid(planes, weight)
        assert torch.equal(grid.result().codes, planes.codes)
        assert grid.v is not None
        grid.v.data += 200 * torch.randn(grid.v.shape, generator=generator)
        found = grid.result()
        codes = np.pad(found.codes[0].numpy().astype(int) - 128, ((0, 0), (0, 1)))
        sums = np.abs(codes[:, ::2] + codes[:, 1::2]).max()
        assert (sums <= 128) == paired
        torch.testing.assert_close(grid(weight).detach(), found.dequantize(), atol=1e-5, rtol=0)
