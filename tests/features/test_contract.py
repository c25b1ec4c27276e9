"""Every feature: a scalar, least at the teacher, with a gradient, blind to padding."""

import pytest
import torch

from penjing import registry

NAMES = registry.choices("features")
GENERATOR = torch.Generator().manual_seed(0)
TEACHER = torch.randn(6, 5, 8, generator=GENERATOR)
OTHER = torch.randn(6, 5, 8, generator=GENERATOR)
MASK = torch.arange(5) < torch.tensor([5, 3, 4, 5, 2, 5]).unsqueeze(1)


@pytest.mark.parametrize("name", NAMES)
def test_least_at_the_teacher_and_growing_towards_random(name: str) -> None:
    loss = registry.lookup("features", name, "loss")
    values = [float(loss(torch.lerp(TEACHER, OTHER, t), TEACHER)) for t in (0.0, 0.2, 0.5, 1.0)]
    assert values == sorted(values)
    assert values[3] > values[0]
    if name != "crd":  # other samples are never told apart for certain
        assert values[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_step_helps(name: str) -> None:
    loss = registry.lookup("features", name, "loss")
    student = OTHER.clone().requires_grad_()
    value = loss(student, TEACHER, MASK)
    assert value.shape == ()
    assert value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(value, student)
    assert bool((gradient[~MASK] == 0).all())
    stepped = student.detach() - 0.1 * gradient / gradient.norm()
    assert float(loss(stepped, TEACHER, MASK)) < value.item()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_padding_does_not_count(name: str) -> None:
    loss = registry.lookup("features", name, "loss")
    plain = loss(OTHER, TEACHER, MASK)
    noise = torch.randn(OTHER.shape, generator=GENERATOR) * ~MASK.unsqueeze(-1)
    assert float(loss(OTHER + noise, TEACHER - noise, MASK)) == pytest.approx(
        float(plain), rel=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_widths_may_differ_or_there_is_a_projection(name: str) -> None:
    if registry.constant("features", name, "of", "blocks") == "maps":
        return  # a row is as wide as there are places
    if registry.constant("features", name, "projection", None) is None:
        found = registry.lookup("features", name, "loss")(OTHER[..., :4], TEACHER)
        assert torch.isfinite(found)
