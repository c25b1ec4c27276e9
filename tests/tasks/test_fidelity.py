import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.special import softmax
from scipy.stats import entropy

from penjing.errors import UsageError
from penjing.model import Model, Source
from penjing.tasks.fidelity import Fidelity

RNG = np.random.default_rng(0)


def test_cosine_against_scipy() -> None:
    ours, theirs = RNG.normal(size=(2, 7, 5)).astype(np.float32)
    rows = Fidelity("cosine").record(ours, {}, theirs)
    expected = [1 - cosine(a, b) for a, b in zip(ours.astype(float), theirs, strict=True)]
    np.testing.assert_allclose(rows[:, 0], expected, atol=1e-6)


def test_the_original_is_exactly_itself() -> None:
    output = RNG.normal(size=(500, 33)).astype(np.float32)
    output[3] = 0
    assert (Fidelity("cosine").record(output, {}, output.copy()) == 1).all()
    assert (Fidelity("kl").record(output, {}, output.copy()) == 0).all()


def test_a_vanished_vector_has_no_cosine() -> None:
    rows = Fidelity("cosine").record(np.zeros((1, 3)), {}, np.ones((1, 3)))
    assert rows[0, 0] == 0


def test_kl_against_scipy() -> None:
    ours, theirs = RNG.normal(size=(2, 6, 9)).astype(np.float32)
    rows = Fidelity("kl").record(ours, {}, theirs)
    expected = entropy(softmax(theirs, axis=1), softmax(ours, axis=1), axis=1)
    np.testing.assert_allclose(rows[:, 0], expected, rtol=1e-5)


def test_kl_of_text_is_the_mean_over_its_tokens() -> None:
    ours, theirs = RNG.normal(size=(2, 2, 4, 9))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows = Fidelity("kl").record(ours, {"attention_mask": mask}, theirs)
    tokens = entropy(softmax(theirs, axis=-1), softmax(ours, axis=-1), axis=-1)
    np.testing.assert_allclose(rows[:, 0], [tokens[0].mean(), tokens[1, :2].mean()], rtol=1e-9)


def test_impossible_classes_add_nothing() -> None:
    theirs = np.array([[0.0, 0.0, -np.inf]])
    ours = np.array([[0.0, np.log(3.0), -np.inf]])
    # KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - log 3 / 2.
    assert Fidelity("kl").record(ours, {}, theirs)[0, 0] == pytest.approx(np.log(2) - np.log(3) / 2)


def test_a_reference_is_needed() -> None:
    for reference in (None, np.zeros((2, 4))):
        with pytest.raises(UsageError, match="original's output for the same batch"):
            Fidelity().record(np.zeros((2, 3)), {}, reference)


def test_one_number_a_sample_is_judged_by_its_error() -> None:
    theirs = RNG.normal(3.0, 2.0, size=(400, 1)).astype(np.float32)
    ours = theirs + RNG.normal(0.0, 0.5, size=theirs.shape).astype(np.float32)
    task = Fidelity("error")
    rows = task.record(ours, {}, theirs)
    correlation = np.corrcoef(ours[:, 0], theirs[:, 0])[0, 1]
    # Of additive noise, error / variance = 1 / r^2 - 1 about.
    assert task.reduce(rows) == pytest.approx(1 / correlation**2 - 1, rel=0.1)
    assert task.reduce(task.record(theirs, {}, theirs)) == 0


@pytest.mark.parametrize(("outputs", "metric"), [(1, "error"), (3, "kl")])
def test_the_metric_that_sees_the_output(outputs: int, metric: str) -> None:
    module = torch.nn.Linear(4, outputs)
    example = {"pixel_values": torch.randn(2, 4)}
    model = Model(module.eval(), "image", example, Source("factory", "here", "0"))
    assert Fidelity().bind(model).metric == metric
    runs: list[object] = []
    module.register_forward_hook(lambda *_: runs.append(1))
    for asked in (model, model, model.copy()):
        assert asked.suited_loss == {"error": "mse", "kl": "kl"}[metric]
    assert not runs  # `bind` has asked before
