"""Every loss: a scalar, least at the teacher, larger further away, and with a gradient."""

import pytest
import torch

from penjing import registry

NAMES = registry.choices("losses")
GENERATOR = torch.Generator().manual_seed(0)
TEACHER = torch.randn(6, 5, 9, generator=GENERATOR)
OTHER = torch.randn(6, 5, 9, generator=GENERATOR)


@pytest.mark.parametrize("name", NAMES)
def test_zero_at_the_teacher_and_growing_towards_random(name: str) -> None:
    loss = registry.lookup("losses", name, "loss")
    values = [float(loss(torch.lerp(TEACHER, OTHER, t), TEACHER)) for t in (0.0, 0.1, 0.3, 1.0)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values == sorted(values)
    assert values[3] > values[1] * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_step_helps_and_the_teacher_gets_none(name: str, dtype: torch.dtype) -> None:
    loss = registry.lookup("losses", name, "loss")
    student = OTHER.clone().to(dtype).requires_grad_()
    value = loss(student, TEACHER)
    assert value.shape == ()
    assert value.dtype == torch.float32
    value.backward()
    assert student.grad is not None
    student, gradient = student.detach(), student.grad
    stepped = student - gradient / gradient.float().norm()
    assert float(loss(stepped, TEACHER)) < value.item()
