"""Slopes of the loss: against differences of it, Kullback-Leibler divergences, and by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.errors import InputError
from penjing.gradients import LABELS, fisher, gradients, loss_of
from penjing.model import Batch, Model


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.out = nn.Conv2d(1, 3, 2), nn.Linear(12, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.up(torch.tanh(self.conv(x)).flatten(1))))


def classifier() -> tuple[Model, Batch]:
    torch.manual_seed(0)
    batch = {"x": torch.randn(6, 1, 3, 3), LABELS: torch.tensor([0, 3, 1, 1, 2, 0])}
    return net.wrap(Classifier(), "tensor", {"x": batch["x"][:2]}), batch


def _slopes(model: Model, batch: Batch, path: str, places: list[tuple[int, int]]) -> Tensor:
    """Of every sample's cross entropy by some weights, by differences: [samples, weights]."""
    twin = model.copy().module.double()
    weight = twin.get_submodule(path).weight.data.flatten(1)
    found = []
    for place in places:
        own, sides = float(weight[place]), []
        for step in (1e-5, -1e-5):
            weight[place] = own + step
            with torch.no_grad():
                logits = twin(batch["x"].double())
            sides.append(nn.functional.cross_entropy(logits, batch[LABELS], reduction="none"))
        weight[place] = own
        found.append((sides[0] - sides[1]) / 2e-5)
    return torch.stack(found, 1)


@pytest.mark.parametrize("path", ["conv", "up", "out"])
def test_slopes_are_the_differences_of_the_labels_loss(path: str) -> None:
    model, batch = classifier()
    halves = [{n: x[:4] for n, x in batch.items()}, {n: x[4:] for n, x in batch.items()}]
    found = gradients(model, halves)[path]
    weight = model.module.get_submodule(path).weight.detach().flatten(1)
    places = [(i, j) for i in range(len(weight)) for j in range(weight.shape[1])]
    wanted = _slopes(model, batch, path, places).reshape(6, *weight.shape)
    for own, expected in (
        (found.size, wanted.abs().mean(0)),
        (found.square, wanted.square().mean(0)),
        (found.effects, (wanted * weight).sum(1)),
    ):
        torch.testing.assert_close(own.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_network_stays_as_it_is() -> None:
    model, batch = classifier()
    before, wanted = net.state(model), [p.requires_grad for p in model.module.parameters()]
    gradients(model, [batch])
    assert all(torch.equal(x, before[n]) for n, x in net.state(model).items())
    assert [p.requires_grad for p in model.module.parameters()] == wanted
    assert all(p.grad is None for p in model.module.parameters())


def test_drawn_labels_give_the_divergence_of_the_network_without_a_weight() -> None:
    """w^2 E[g^2] / 2 is the Kullback-Leibler divergence, to second order, on the average."""
    model, batch = classifier()
    model.interface = "image"
    model.example = {"pixel_values": model.example["x"]}
    one = {"pixel_values": batch["x"][:1].expand(1500, -1, -1, -1)}
    found = gradients(model, [one])["out"].square.double()
    twin = model.copy().module.double()
    weight, x = twin.out.weight.data, batch["x"][:1].double()
    before = twin(x).log_softmax(-1).detach()
    for row in range(4):
        for column in range(5):
            own = float(weight[row, column])
            weight[row, column] = own + 1e-3
            now = twin(x).log_softmax(-1).detach()
            weight[row, column] = own
            divergence = float((before.exp() * (before - now)).sum())
            assert float(found[row, column]) * 1e-6 / 2 == pytest.approx(divergence, rel=0.12)


def test_vectors_move_by_what_a_random_label_asks() -> None:
    """E[g^2] is the squared length of what a change of the weight does to the unit vector."""
    torch.manual_seed(0)
    model = net.bert(1)
    ids = torch.randint(1, 60, (1, 6))
    batch = {"input_ids": ids.expand(500, -1), "attention_mask": torch.ones(500, 6).long()}
    small = {n: x[:1] for n, x in batch.items()}
    path = "encoder.layer.0.output.dense"
    found = gradients(model, [batch])[path].square.double()
    twin = model.copy()
    twin.module.double()
    weight = twin.module.get_submodule(path).weight.data

    def unit() -> Tensor:
        with torch.no_grad():
            hidden = twin.module(**small).last_hidden_state[0].mean(0)
        return hidden / hidden.norm()

    for place in [(0, 0), (7, 31), (20, 5)]:
        own, sides = float(weight[place]), []
        for step in (1e-4, -1e-4):
            weight[place] = own + step
            sides.append(unit())
        weight[place] = own
        wanted = float(((sides[0] - sides[1]) / 2e-4).square().sum())
        assert float(found[place]) == pytest.approx(wanted, rel=0.2)


def test_next_tokens_without_padding() -> None:
    model, batch = net.llama(1), net.text_batch(samples=3)
    path = "model.layers.0.mlp.down_proj"
    found = gradients(model, [batch])[path].effects
    twin = model.copy()
    weight = twin.module.get_submodule(path).weight
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row : row + 1, :length]
        loss = twin.module(input_ids=ids, labels=ids, use_cache=False).loss  # mean over tokens
        (g,) = torch.autograd.grad(loss, [weight])
        torch.testing.assert_close(found[row], (g * weight).sum(0).detach(), rtol=1e-3, atol=1e-5)


def test_what_the_loss_does_not_depend_on_is_zero() -> None:
    class Spare(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(3, 2)

    torch.manual_seed(0)
    _, batch = classifier()
    model = net.wrap(Spare(), "tensor", {"x": batch["x"][:2]})
    found = gradients(model, [batch])
    assert not found["spare"].size.any()
    assert found["spare"].effects.shape == (6, 3)


def test_a_loss_that_is_no_number_is_refused() -> None:
    model, batch = classifier()
    batch["x"][4] = float("inf")
    with pytest.raises(InputError, match="loss on the calibration data is not finite"):
        gradients(model, [batch])


@pytest.mark.parametrize("path", ["conv", "up", "out"])
def test_information_of_outputs_is_the_sum_over_places_of_their_slopes(path: str) -> None:
    """Slopes by differences: the output of one layer is moved, one number at a time."""
    model, batch = classifier()
    found = fisher(model, [batch])[path]
    twin = model.copy().module.double()
    layer, moved = twin.get_submodule(path), [torch.zeros(())]
    layer.register_forward_hook(lambda m, a, y: y + moved[0])
    with torch.no_grad():
        shape = twin.get_submodule("conv")(batch["x"].double()).shape[1:] if path == "conv" else (
            len(layer.weight),
        )  # fmt: skip
        slopes = torch.zeros(6, *shape, dtype=torch.float64)
        for place in torch.ones(shape).nonzero():
            sides = []
            for step in (1e-5, -1e-5):
                moved[0] = torch.zeros(shape, dtype=torch.float64)
                moved[0][tuple(place)] = step
                logits = twin(batch["x"].double())
                sides.append(nn.functional.cross_entropy(logits, batch[LABELS], reduction="none"))
            slopes[(slice(None), *place)] = (sides[0] - sides[1]) / 2e-5
    rows = slopes.flatten(2).transpose(1, 2).flatten(0, 1) if path == "conv" else slopes
    torch.testing.assert_close(found, rows.T @ rows / 6, rtol=1e-4, atol=1e-6)
    (alone,) = fisher(model, [batch], [path], diagonal=True).values()
    torch.testing.assert_close(alone, found.diagonal(), rtol=1e-5, atol=1e-8)


def test_information_needs_no_parameter_that_learns() -> None:
    model, batch = classifier()
    wanted = [p.requires_grad for p in model.module.parameters()]
    found = fisher(
        model, [{n: x[:4] for n, x in batch.items()}, {n: x[4:] for n, x in batch.items()}]
    )
    assert set(found) == {"conv", "up", "out"}
    assert [p.requires_grad for p in model.module.parameters()] == wanted
    assert all(not m._forward_hooks for m in model.module.modules())


@pytest.mark.parametrize("kind", ["llama", "labels"])
def test_a_batch_loses_what_its_samples_do(kind: str) -> None:
    if kind == "llama":
        model, batch = net.llama(1), net.text_batch(samples=3)
    else:
        model, batch = classifier()
    generator = torch.Generator().manual_seed(0)
    rows = range(len(next(iter(batch.values()))))
    singles = [{n: x[row : row + 1] for n, x in batch.items()} for row in rows]
    if "attention_mask" in batch:
        cut = [int(one["attention_mask"].sum()) for one in singles]
        singles = [
            {n: x[:, :k] for n, x in one.items()} for one, k in zip(singles, cut, strict=True)
        ]
    with torch.no_grad():
        each = [float(loss_of(model, one, generator) or 0) for one in singles]
        whole = loss_of(model, batch, generator)
    assert whole is not None
    assert float(whole) == pytest.approx(sum(each), rel=1e-4)
