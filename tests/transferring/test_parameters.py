"""A student of another shape, with its teacher's parameters."""

from typing import Any

import pytest
import torch
from tests.networks import Basic, ResNet, arrays, bert, llama, resnet, stack, text_batch, vit, wrap
from torch import nn

from penjing.apply import apply
from penjing.errors import InputError
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps.cut import Cut
from penjing.steps.shrink import Shrink
from penjing.transferring.parameters import inherit

TEXTS = [text_batch(seed) for seed in range(3)]
IMAGES = [{"x": torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(n))}
          for n in range(4)]  # fmt: skip


def scrambled(model: Model) -> Model:
    """Random numbers in every parameter."""
    made = model.copy()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def far(one: Model, two: Model) -> float:
    """Relative difference of the outputs on the example."""
    with torch.no_grad():
        a, b = one.run(one.example), two.run(one.example)
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("make", [bert, llama, vit, resnet, stack])
def test_the_same_shape_gives_the_same_outputs(make: Any) -> None:
    teacher = make()
    assert far(inherit(scrambled(teacher), teacher).model, teacher) < 1e-6


@pytest.mark.parametrize(("make", "batches"), [(llama, TEXTS), (resnet, IMAGES), (bert, TEXTS)])
def test_a_narrower_student_is_what_shrink_makes(make: Any, batches: Any) -> None:
    teacher = make()
    small = apply(teacher, Recipe((Shrink(0.5),)), batches).model
    found = inherit(scrambled(small), teacher, batches).model
    for (name, own), wanted in zip(found.parameters(), small.module.parameters(), strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", [bert, llama, vit])
def test_a_shallower_student_has_the_blocks_that_are_left(make: Any) -> None:
    teacher = make(5)
    paths = [teacher.blocks[n] for n in (1, 3)]
    batches = [teacher.example]
    small = apply(teacher, Recipe((Cut(blocks=tuple(paths), patch="none"),)), batches).model
    found = inherit(scrambled(small), teacher)
    assert found.blocks == (0, 2, 4)
    assert far(found.model, small) < 1e-6


class Named(nn.Module):
    """The residual network of the tests with other names, and a block less in each stage."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.body = nn.Sequential(Basic(width, width), Basic(width, 2 * width, 2))
        self.classes = nn.Linear(2 * width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.classes(self.body(x).mean((2, 3)))


def test_names_need_not_agree_and_stages_are_kept() -> None:
    teacher = resnet()
    student = wrap(Named(), "tensor", teacher.example)
    found = inherit(student, teacher)
    assert found.alone == ()
    assert found.blocks[1] == 2
    own, theirs = found.model.module, teacher.module
    assert torch.equal(own.first.weight, theirs.stem[0].weight)
    assert torch.equal(own.body[1].down[0].weight, theirs.layer2[0].down[0].weight)
    assert torch.equal(own.norm.running_var, theirs.stem[1].running_var)
    assert torch.equal(own.classes.weight, theirs.fc.weight)


def test_narrower_and_shallower_at_once_is_nearer_than_chance() -> None:
    teacher = resnet()
    student = wrap(Named(4), "tensor", teacher.example)
    found = inherit(student, teacher, IMAGES)
    assert "groups" in found.why
    assert far(found.model, teacher) < far(student, teacher)


def test_a_narrower_residual_stream_is_refitted() -> None:
    teacher = bert()
    student = scrambled(bert(hidden_size=16, num_attention_heads=2))
    plain = inherit(student, teacher).model
    found = inherit(student, teacher, TEXTS)
    assert "refitted" in found.why

    def unlike(model: Model) -> float:
        """How far the queries of the last block are from the teacher's of the same heads."""
        seen = []
        for one in (model, teacher):
            path = "encoder.layer.2.intermediate.dense"
            hook = one.module.get_submodule(path).register_forward_hook(
                lambda m, a, out: seen.append(out)
            )
            with torch.no_grad():
                one.run(TEXTS[0])
            hook.remove()
        return float((seen[0] - seen[1]).norm() / seen[1].norm())

    assert unlike(found.model) < 0.8 * unlike(plain)


@pytest.mark.parametrize(
    ("make", "wide"),
    [
        (bert, {"intermediate_size": 72}),
        (bert, {"hidden_size": 64, "num_attention_heads": 8}),
        (llama, {"intermediate_size": 100}),
        (llama, {"num_attention_heads": 16, "num_key_value_heads": 8}),
        (llama, {"hidden_size": 64, "embedding": True}),
    ],
)
def test_a_wider_student_gives_the_same_outputs(make: Any, wide: dict[str, Any]) -> None:
    teacher = make(**({"embedding": True} if "embedding" in wide else {}))
    student = scrambled(make(**wide))
    found = inherit(student, teacher).model
    if "hidden_size" in wide:  # what it gives is as wide
        with torch.no_grad():
            given, wanted = found.run(teacher.example), teacher.run(teacher.example)
        torch.testing.assert_close(given, wanted.repeat(1, 2), rtol=1e-4, atol=1e-5)
    else:
        assert far(found, teacher) < 1e-5


def test_copies_have_different_shares() -> None:
    found = inherit(scrambled(stack(hidden=48)), stack()).model
    weight = found.module.get_parameter("blocks.0.down.weight")
    assert not torch.allclose(weight[:, :24], weight[:, 24:])


def test_a_wider_residual_network_gives_the_same_outputs() -> None:
    class Wide(ResNet):
        def __init__(self) -> None:
            super().__init__()
            self.layer1[1].conv1, self.layer1[1].bn1 = nn.Conv2d(8, 20, 3, 1, 1), nn.BatchNorm2d(20)
            self.layer1[1].conv2 = nn.Conv2d(20, 8, 3, 1, 1)

    teacher = resnet()
    assert far(inherit(wrap(Wide(), "tensor", teacher.example), teacher).model, teacher) < 1e-5


@pytest.mark.parametrize("make", [llama, vit, stack])
def test_a_deeper_student_gives_the_same_outputs(make: Any) -> None:
    teacher = make(3)
    found = inherit(scrambled(make(5)), teacher)
    assert "2 of 2 blocks more start as identities" in found.why
    assert far(found.model, teacher) < 1e-5


def test_normalization_behind_the_sum_lets_no_block_be_an_identity() -> None:
    assert "0 of 1 blocks more" in inherit(scrambled(bert(4)), bert(3)).why


def test_nothing_in_common_is_an_error() -> None:
    teacher = wrap(nn.Sequential(nn.Linear(4, 4)), "tensor", {"x": torch.randn(2, 4)})
    student = wrap(nn.Sequential(nn.Conv1d(4, 4, 1)), "tensor", {"x": torch.randn(2, 4, 1)})
    with pytest.raises(InputError, match="no kind of layer in common"):
        inherit(student, teacher)


def test_neither_network_changes() -> None:
    teacher, student = stack(), scrambled(stack(hidden=8))
    before = [p.clone() for m in (teacher, student) for p in m.module.parameters()]
    inherit(student, teacher, arrays())
    after = [p for m in (teacher, student) for p in m.module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = torch.nn.LSTM(7, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.g = torch.nn.GRU(12, 5, batch_first=True)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.g(self.l(x)[0])[0][:, -1])


def test_a_network_of_the_same_shapes_is_copied_whole() -> None:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(wrap(Recurrent(), "tensor", {"x": torch.randn(4, 9, 7)}))
    batches = [{"x": torch.randn(4, 9, 7)}]
    found = inherit(made[0], made[1], batches).model
    for (name, own), wanted in zip(
        found.module.named_parameters(), made[1].module.parameters(), strict=True
    ):
        assert torch.equal(own, wanted), name
