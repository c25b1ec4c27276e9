"""Constrain: the budget is met, what is learned beats what is drawn, and it really goes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.api import STEPS
from penjing.apply import Applied, Journal, apply
from penjing.channelmap import channel_map
from penjing.errors import InputError, UsageError
from penjing.gradients import LABELS
from penjing.inspect import inspect
from penjing.model import Batch, Model
from penjing.recipe import Recipe
from penjing.registry import choices
from penjing.steps.constrain import Constrain
from penjing.steps.cut import Cut
from penjing.steps.prune import Prune
from penjing.steps.quantize import Quantize
from penjing.steps.shrink import Shrink

METHODS = choices("constraints")
TEXTS = [net.text_batch(seed) for seed in range(4)]
SHRINK = Shrink(criterion="learned", repair=False)


def _learned(
    model: Model, batches: list[Batch], budget: float, of: str, *, repair: bool = True,
    **options: object,
) -> Applied:  # fmt: skip
    constrain = Constrain(budget, of, **({"steps": 12, "multiple": 1} | options))  # type: ignore[arg-type]
    takes = {
        "weights": Prune(criterion="learned"),
        "neurons": Shrink(criterion="learned", repair=repair),
        "layers": Cut(criterion="learned", patch="linear" if repair else "none"),
    }
    return apply(model, Recipe((constrain, takes[of])), batches)


def _gone(before: Model, after: Model, measure: str) -> float:
    if measure == "parameters":
        return 1 - after.parameter_count / before.parameter_count
    if measure == "macs":
        was, now = (inspect(m, latency=False).totals.macs for m in (before, after))
        assert was is not None
        assert now is not None
        return 1 - now / was
    groups = [free.group for free in channel_map(before).free]
    readers = [next(m.name for m in group.members if m.summed) for group in groups]
    total, left = (sum(m.module.get_parameter(r).shape[1] for r in readers)
                   for m in (before, after))  # fmt: skip
    return 1 - left / total


@pytest.mark.parametrize(
    ("measure", "budget"), [("units", 0.2), ("parameters", 0.45), ("macs", 0.3)]
)
def test_the_budget_of_neurons_is_met_by_the_network_that_is_left(
    measure: str, budget: float
) -> None:
    for make in (net.bert, lambda: net.llama(3, intermediate_size=96)):
        model = make()
        small = _learned(model, TEXTS, budget, "neurons", measure=measure).model
        assert _gone(model, small, measure) == pytest.approx(budget, abs=0.01)
        assert not small.kept  # all that was chosen is done
        assert small.run(TEXTS[0]).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_by_every_method(method: str) -> None:
    model, batches = net.stack(4), net.arrays()
    small = _learned(model, batches, 0.4, "neurons", method=method, measure="parameters").model
    assert _gone(model, small, "parameters") == pytest.approx(0.4, abs=0.01)
    pruned = _learned(model, batches, 0.6, "weights", method=method).model
    zeros = sum(int((~mask).sum()) for mask in pruned.masks.values())
    assert zeros / sum(mask.numel() for mask in pruned.masks.values()) == pytest.approx(
        0.6, abs=1e-3
    )
    assert len(_learned(model, batches, 0.5, "layers", method=method).model.blocks) == 2


def test_channels_of_a_convolutional_network() -> None:
    model = net.resnet()
    done = _learned(model, [model.example], 0.4, "neurons", measure="macs")
    assert _gone(model, done.model, "macs") == pytest.approx(0.4, abs=0.01)
    assert done.model.structure


@pytest.mark.parametrize("make", [net.bert, net.llama, net.vit])
def test_the_small_network_is_the_gated_one(make: Callable[[], Model]) -> None:
    """Weights that read what went at zero in the original, by the slices that were made."""
    model = make()
    batches = TEXTS if "input_ids" in model.example else [model.example]
    small = _learned(model, batches, 0.4, "neurons", repair=False).model
    masked = net.masked_columns(model, small)
    with torch.no_grad():
        found, wanted, was = (m.run(batches[0]) for m in (small, masked, model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert float((was - wanted).abs().max()) > 1e-2


def _with_idle_units() -> Model:
    """The last block's odd hidden units are large and write where nothing reads."""
    model = net.stack(2)
    block, out = model.module.blocks[1], model.module.out
    with torch.no_grad():
        out.weight[:, 4:] = 0
        block.down.weight[4:, 0::2] = 0
        block.down.weight[:4, 1::2] = 0
        block.down.weight[4:, 1::2] *= 5
    return model


@pytest.mark.parametrize("method", METHODS)
def test_units_that_do_nothing_go_though_they_are_large(method: str) -> None:
    model, batches = _with_idle_units(), net.arrays()
    target = ("blocks.1.down",)
    options = {"method": method, "criterion": "magnitude", "targets": target, "steps": 80}
    small = _learned(model, batches, 0.5, "neurons", repair=False, **options).model
    drawn = apply(
        model, Recipe((Shrink(0.5, criterion="random", repair=False, multiple=1, targets=target),)),
        batches,
    ).model  # fmt: skip
    with torch.no_grad():
        wanted = model.run(batches[0])
        off, random = (float((m.run(batches[0]) - wanted).norm()) for m in (small, drawn))
    (entry,) = small.structure
    kept = next(k for _, dim, k in entry["slices"] if dim == 1)
    # Of 12 that do something; gates that are drawn at random are learned more slowly.
    assert sum(unit % 2 == 0 for unit in kept) >= (9 if method == "hard-concrete" else 12)
    assert off < (0.6 if method == "hard-concrete" else 0.2) * random


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_do_nothing_go(method: str) -> None:
    model, batches = net.stack(6), net.arrays()
    for index in (1, 4):
        model.module.blocks[index].scale = 1e-3
    done = _learned(model, batches, 1 / 3, "layers", repair=False, method=method, steps=40)
    assert {d.path for d in done.done if d.kind == "drop"} == {"blocks.1", "blocks.4"}


def test_learned_weights_beat_random_ones_and_magnitude_in_a_planted_network() -> None:
    """Half of the connections are large and read inputs that are never there."""
    model, batches = net.stack(2), net.arrays()
    with torch.no_grad():
        model.module.blocks[1].up.bias[0::2] = -100.0  # these units never fire
        model.module.blocks[1].down.weight[:, 0::2] *= 10
    target = ("blocks.1.down",)
    options = {"targets": target, "criterion": "magnitude", "steps": 60}
    learned = _learned(model, batches, 0.5, "weights", **options).model
    others = [apply(model, Recipe((Prune(0.5, c, targets=target),)), batches).model
              for c in ("magnitude", "random")]  # fmt: skip
    with torch.no_grad():
        wanted = model.run(batches[0])
        off, *rest = (float((m.run(batches[0]) - wanted).norm()) for m in (learned, *others))
    assert off < 0.2 * min(rest)
    assert float(learned.masks["blocks.1.down.weight"][:, 0::2].float().mean()) < 0.1


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_gates_of_weights_may_start_from_slopes(criterion: str) -> None:
    """The same order as the criterion itself gives, within a layer, before anything is learned."""
    model, batches = net.stack(2), net.arrays(2)
    target = ("blocks.1.down",)
    options = {"targets": target, "criterion": criterion, "steps": 1, "lr": 1e-6}
    learned = _learned(model, batches, 0.5, "weights", **options).model
    plain = apply(model, Recipe((Prune(0.5, criterion, targets=target),)), batches).model
    assert learned.masks.keys() == {"blocks.1.down.weight"}
    assert torch.equal(*(m.masks["blocks.1.down.weight"] for m in (learned, plain)))


def test_training_the_weights_along_makes_up_for_what_goes() -> None:
    model, batches = net.stack(), net.arrays(9)
    off = {}
    for rate in (0.0, 3e-3):
        small = _learned(model, batches[:8], 0.5, "neurons", repair=False, weights_lr=rate,
                         steps=150).model  # fmt: skip
        with torch.no_grad():
            off[rate] = float((small.run(batches[8]) - model.run(batches[8])).norm())
    assert off[3e-3] < 0.7 * off[0.0]


def test_gates_go_into_the_weights_that_were_trained() -> None:
    """What is left before the cut is the network that was trained: what went is at zero in it."""
    model, batches = net.stack(), net.arrays()
    constrain = Constrain(0.5, steps=30, weights_lr=1e-3, multiple=1)
    found = apply(model, Recipe((constrain,)), batches)
    assert {d.kind for d in found.done} == {"weight", "keep"}
    for path, kept in found.model.kept.items():
        weight = found.model.module.get_parameter(f"{path}.weight")
        assert not weight[:, ~kept].any()
        assert weight[:, kept].any(0).all()
    small = apply(found.model, Recipe((SHRINK,)), batches).model
    with torch.no_grad():
        torch.testing.assert_close(
            small.run(batches[0]), found.model.run(batches[0]), rtol=1e-4, atol=1e-4
        )


def test_removed_connections_stay_removed_while_weights_are_trained() -> None:
    model, batches = net.stack(), net.arrays()
    pruned = apply(model, Recipe((Prune(0.5, "magnitude"),))).model
    done = _learned(pruned, batches, 0.34, "layers", repair=False, weights_lr=1e-3, steps=20).model
    assert done.masks
    for name, mask in done.masks.items():
        assert not done.module.get_parameter(name)[~mask].any()


def test_labels_in_place_of_the_original() -> None:
    """Classes of one's own: with weights trained along the network learns what it never gave."""
    model = net.vit(2)
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(24, 3, 16, 16, generator=generator)
    classes = torch.arange(24) % 3
    pictures += classes.view(-1, 1, 1, 1)
    batches = [{"pixel_values": pictures[i : i + 8], LABELS: classes[i : i + 8]}
               for i in (0, 8, 16)]  # fmt: skip
    small = _learned(model, batches, 0.4, "neurons", loss=LABELS, weights_lr=3e-3, steps=60).model
    with torch.no_grad():
        right = [(m.run({"pixel_values": pictures}).argmax(1) == classes).float().mean()
                 for m in (model, small)]  # fmt: skip
    assert right[0] < 0.6 < 0.9 <= right[1]


def test_the_same_bytes_twice_after_a_kill_and_others_with_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = net.bert(2), TEXTS
    step = Constrain(0.4, method="hard-concrete", steps=6, weights_lr=1e-3)
    recipe = Recipe((step, Shrink(criterion="learned")))
    wanted = apply(model, recipe, batches).model
    assert net.same(apply(model, recipe, batches).model, wanted)
    other = Recipe((replace(step, seed=1), Shrink(criterion="learned")))
    assert not net.same(apply(model, other, batches).model, wanted)

    class Killed(BaseException):
        pass

    write = Journal.write

    def stop(log: Journal, number: int, unit: str, edits: list[object]) -> None:
        write(log, number, unit, edits)  # type: ignore[arg-type]
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", stop)
        with pytest.raises(Killed):
            apply(model, recipe, batches, journal=tmp_path)

    def not_again(*_: object) -> None:
        raise AssertionError("learned again")

    monkeypatch.setattr(Constrain, "plan", not_again)
    assert net.same(apply(model, recipe, batches, journal=tmp_path).model, wanted)


def test_a_recipe_reads_as_it_was_written() -> None:
    step = Constrain(0.3, "neurons", "macs", "lasso", "wanda", 50, 0.01, 1e-4, "sgd", "mse", 4, 3,
                     ("blocks.*",))  # fmt: skip
    recipe = Recipe((step, SHRINK, Constrain(0.25, "layers"), Cut(criterion="learned")), 7)
    assert Recipe.from_toml(recipe.to_toml(), STEPS) == recipe


def test_targets_alone_lose_something() -> None:
    model = net.bert(2)
    done = _learned(model, TEXTS, 0.5, "neurons", targets=("*.layer.1.output.dense",)).done
    assert {d.path for d in done} == {
        "encoder.layer.1.output.dense", "encoder.layer.1.output.dense.weight",
        "encoder.layer.1.output.dense.bias",
    }  # fmt: skip


def test_kept_neurons_are_a_multiple_where_the_budget_lets_them() -> None:
    model = net.bert(2, intermediate_size=512)
    for multiple in (8, 16):
        small = _learned(
            model, TEXTS, 0.5, "neurons", multiple=multiple, measure="parameters", steps=4
        ).model
        widths = {m.intermediate.dense.out_features for m in small.module.encoder.layer}
        assert not any(width % multiple for width in widths)
        assert _gone(model, small, "parameters") == pytest.approx(0.5, abs=0.01)


def test_refusals() -> None:
    wrong: tuple[dict[str, object], ...] = (
        {"budget": 0.0}, {"budget": 1.0}, {"of": "heads"}, {"measure": "latency"},
        {"of": "layers", "measure": "macs"}, {"method": "l3"}, {"criterion": "influence"},
        {"of": "layers", "criterion": "gram"}, {"of": "weights", "criterion": "admm"},
        {"steps": 0}, {"lr": 0.0}, {"lr": 1.0}, {"weights_lr": -0.1}, {"optimizer": "adam2"},
        {"loss": "x"}, {"multiple": 0},
    )  # fmt: skip
    for options in wrong:
        with pytest.raises(UsageError):
            Constrain(**options)  # type: ignore[arg-type]
    model, batches = net.stack(), net.arrays(1)
    with pytest.raises(UsageError, match="constrain needs data"):
        apply(model, Recipe((Constrain(),)))
    with pytest.raises(InputError, match="no neurons that may go"):
        _learned(model, batches, 0.5, "neurons", targets=("no.*",))
    with pytest.raises(InputError, match="no layers whose weights may go"):
        _learned(model, batches, 0.5, "weights", targets=("no.*",))
    with pytest.raises(InputError, match="too many blocks to cut; got 3; allowed: at most 2"):
        _learned(model, batches, 0.9, "layers")
    with pytest.raises(InputError, match=r"neurons cannot take 99% of the parameters; got at most"):
        _learned(model, batches, 0.99, "neurons", measure="parameters")
    with pytest.raises(UsageError, match="no block was learned to go"):
        apply(model, Recipe((Cut(criterion="learned"),)), batches)
    quantized = apply(model, Recipe((Quantize(8, method="rtn"),))).model
    for of in ("neurons", "weights"):
        with pytest.raises(InputError, match="quantized already"):
            _learned(quantized, batches, 0.5, of)
