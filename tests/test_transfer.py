"""The verb: what is matched comes nearer, alone and together; what cannot be is refused."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.networks import ResNet, arrays, bert, resnet, stack, text_batch, vit, wrap
from tests.transferring.test_spans import TEXTS, bytes_bpe
from tests.transferring.test_spans import model as speaker

import penjing
from penjing.data import Dataset
from penjing.errors import InputError, PenjingError, UsageError
from penjing.model import Model
from penjing.transfer import transfer


def pictures(count: int = 96) -> Dataset:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        labels = resnet().module(torch.from_numpy(x)).argmax(1).numpy()
    return Dataset("arrays", tuple({"x": row} for row in x), labels.astype(np.int64))


def student() -> Model:
    torch.manual_seed(1)
    return wrap(ResNet(), "tensor", resnet().example)


def far(model: Model, teacher: Model, seed: int = 7) -> float:
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        own, wanted = model.module(x).log_softmax(-1), teacher.module(x).softmax(-1)
    return float((wanted * (wanted.log() - own)).sum(-1).mean())


OPTIONS: dict[str, Any] = {"steps": 40, "within": 0, "lr": 5e-3, "batch": 16, "samples": 96}


@pytest.mark.parametrize("outputs", ["kl", "dkd", "jsd", {"kl": 0.5, "mse": 0.5}])
def test_outputs_come_nearer(outputs: Any) -> None:
    teacher, start = resnet(), student()
    made = transfer(teacher, start, pictures(), parameters=False, outputs=outputs,
                    temperature=2.0, **OPTIONS)  # fmt: skip
    assert far(made, teacher) < 0.7 * far(start, teacher)
    assert not made.module.training


@pytest.mark.parametrize("name", ["hidden", "fitnets", "attention", "similarity", "rkd", "crd"])
def test_a_feature_alone_comes_nearer(name: str) -> None:
    told: list[str] = []
    made = transfer(resnet(), student(), pictures(), parameters=False, features=name, outputs=(),
                    tell=told.append, **OPTIONS)  # fmt: skip
    before, after = (float(part.split()[-1]) for part in told[-1].split(" to "))
    assert after < before
    assert made.module.training is False


def test_relations_of_a_text_network_and_blocks_by_cka(tmp_path: Path) -> None:
    teacher = bert(4)
    batches = [teacher.example]
    small = bert(2, hidden_size=16, intermediate_size=24)
    from penjing.transferring.aim import Aim
    from penjing.transferring.depth import by_cka
    from penjing.transferring.distil import distil

    blocks = by_cka(small, teacher, batches)
    aim = Aim(small, teacher, {"cosine": 1.0}, {"relations": 1.0, "hidden": 1.0}, blocks)
    found = distil(small, aim, batches * 3, steps=20, seconds=0, lr=3e-3)
    assert found.steps == 20
    assert found.after < found.before


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_maps_come_nearer(heads: int) -> None:
    from penjing.transferring.aim import Aim
    from penjing.transferring.distil import distil

    teacher, batches = bert(4), [text_batch(n) for n in range(4)]
    small = bert(2, hidden_size=16, intermediate_size=24, num_attention_heads=heads)
    aim = Aim(small, teacher, {}, {"attention-maps": 1.0}, (1, 3))
    found = distil(small, aim, batches, steps=60, seconds=0, lr=1e-2)
    assert found.after < 0.7 * found.before
    pictures_of = resnet()
    with pytest.raises(UsageError, match="attention in every block"):
        Aim(pictures_of, pictures_of, {}, {"attention-maps": 1.0}, (0, 1, 2, 3))


def test_attention_maps_of_other_numbers_of_places_are_refused() -> None:
    from penjing.transferring.aim import Aim

    teacher, coarse = vit(2), vit(2)
    config = copy.deepcopy(teacher.module.config)
    config.patch_size = 8
    coarse.module = type(teacher.module)(config).eval()
    aim = Aim(coarse, teacher, {}, {"attention-maps": 1.0}, (0, 1))
    with pytest.raises(UsageError, match="5 and 17 places"):
        aim(teacher.example)


def test_parameters_alone_train_nothing() -> None:
    teacher = resnet()
    made = transfer(teacher, student(), pictures(), outputs=(), **OPTIONS)
    states = (m.module.state_dict().values() for m in (made, teacher))
    assert all(torch.equal(own, wanted) for own, wanted in zip(*states, strict=True))


def test_labels_are_learned() -> None:
    data = pictures()
    x = torch.stack([torch.from_numpy(sample["x"]) for sample in data.samples])
    rights = []
    for model in (
        student(),
        transfer(resnet(), student(), data, parameters=False, outputs="labels", **OPTIONS),
    ):
        with torch.no_grad():
            rights.append(float((model.module(x).argmax(1).numpy() == data.labels).mean()))
    assert rights[1] > rights[0] + 0.2


def test_the_same_seed_gives_the_same_student() -> None:
    one, two = (transfer(resnet(), student(), pictures(), features="hidden", **OPTIONS)
                for _ in range(2))  # fmt: skip
    for a, b in zip(
        one.module.state_dict().values(), two.module.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_a_cache_gives_the_same_student(tmp_path: Path) -> None:
    plain, cached, again = (
        transfer(resnet(), student(), pictures(), parameters=False, cache=place, **OPTIONS)
        for place in (None, tmp_path, tmp_path)
    )
    for a, b, c in zip(*(m.module.state_dict().values() for m in (plain, cached, again)),
                       strict=True):  # fmt: skip
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"outputs": "nothing"}, "allowed"),
        ({"features": "nothing"}, "allowed"),
        ({"features": "relations"}, "queries, keys and values"),
        ({"parameters": False, "outputs": ()}, "nothing to transfer"),
        ({"layers": "luck"}, "place, cka"),
        ({"outputs": "kl=x"}, "NAME=NUMBER"),
        ({"outputs": "kl=-1"}, "more than 0"),
        ({"lr": 2.0}, "0 < lr < 1"),
        ({"steps": 0, "within": 0}, "--steps or --within"),
        ({"optimizer": "luck"}, "adamw"),
        ({"batch": 0}, "1 or more"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        transfer(resnet(), student(), pictures(), **(OPTIONS | options))


def test_networks_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="student and teacher"):
        transfer(bert(), student(), pictures(), **OPTIONS)
    data = Dataset("arrays", tuple({"x": x.numpy()} for b in arrays() for x in b["x"]))
    with pytest.raises(PenjingError, match="class"):
        transfer(stack(), stack(2), data, outputs="labels", **OPTIONS)


def test_connections_that_a_student_has_lost_stay_away() -> None:
    start = penjing.prune(student(), 0.5, criterion="magnitude")
    for parameters in (True, False):
        made = transfer(resnet(), start, pictures(), parameters=parameters, **OPTIONS)
        assert made.masks
        for name, mask in made.masks.items():
            weight = made.module.get_parameter(name)
            assert not bool(weight[~mask].any())
            assert not torch.equal(weight, start.module.get_parameter(name))


def test_random_weights_are_random_everywhere() -> None:
    from penjing.transfer import _fresh

    model = vit()
    made = _fresh(model, 0)
    for (name, own), (_, was) in zip(made.parameters(), model.parameters(), strict=True):
        if own.ndim > 1:
            assert float((own - was).abs().max()) > 1e-3, name


def test_a_student_is_derived_and_then_taught() -> None:
    data = Dataset("arrays", tuple({"x": x[:5].numpy()} for b in arrays() for x in b["x"]))
    told: list[str] = []
    made = transfer(stack(), None, data, share=0.3, of="parameters", outputs="mse",
                    tell=told.append, **(OPTIONS | {"batch": 4, "lr": 1e-3}))  # fmt: skip
    assert made.parameter_count <= 0.3 * stack().parameter_count
    assert "structure" in told[0]
    before, after = (float(part.split()[-1]) for part in told[-1].split(" to "))
    assert after < before
    with pytest.raises(UsageError, match="either a student or the share"):
        transfer(stack(), None, data)


def test_the_verb_is_public() -> None:
    assert penjing.transfer is transfer


def texts() -> Dataset:
    return Dataset("text", tuple(f"{a} {b} {a}" for a in TEXTS for b in TEXTS))


def test_a_language_model_of_another_tokenizer_is_taught() -> None:
    teacher, start = (speaker(bytes_bpe(size)) for size in (290, 262))
    told: list[str] = []
    options: dict[str, Any] = {"parameters": False, "tell": told.append, **(OPTIONS | {"batch": 4})}
    made = transfer(teacher, start, texts(), length=16, **options)
    before, after = (float(part.split()[-1]) for part in told[-1].split(" to "))
    assert after < 0.7 * before
    # On a text that was not trained on, counted by hand: the sum over its tokens.
    wanted, was, now = (said(model, "a mat and the hat") for model in (teacher, start, made))
    assert abs(now - wanted) < abs(was - wanted)
    for more, words in (
        ({"parameters": True}, "--no-parameters"), ({"features": "hidden"}, "--features"),
        ({"outputs": "jsd"}, "kl at temperature 1"),
    ):  # fmt: skip
        with pytest.raises(PenjingError, match=words):
            transfer(teacher, start, texts(), **(options | more))


def said(model: Model, text: str) -> float:
    """log p of a text."""
    found = model.tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        logs = model.run(found).log_softmax(-1)[0]
    ids = found["input_ids"][0].tolist()
    return sum(float(logs[n, token]) for n, token in enumerate(ids[1:]))


def test_an_encoder_of_another_tokenizer_is_taught() -> None:
    teacher, start = bert(2, vocab_size=290), bert(1, vocab_size=262)
    teacher.tokenizer, start.tokenizer = bytes_bpe(290), bytes_bpe(262)
    teacher.example = start.example = {n: x[:, :8] % 200 for n, x in teacher.example.items()}
    made = transfer(teacher, start, texts(), parameters=False, length=16,
                    **(OPTIONS | {"batch": 4}))  # fmt: skip

    def near(model: Model) -> float:
        found = [m.run(m.tokenizer(["a mat and the hat"], return_tensors="pt"))
                 for m in (model, teacher)]  # fmt: skip
        return float(torch.cosine_similarity(*found).detach())

    assert near(made) > near(start)
