import pytest
import torch
from tests.networks import bert, llama, resnet, vit
from torch import nn

from penjing.errors import UsageError
from penjing.transferring.taps import alike, attention_of, tapped


def test_blocks_of_text_and_of_pictures() -> None:
    model = resnet()
    with tapped(model, [[block] for block in model.blocks]) as states:
        model.run(model.example)
    assert [tuple(own[0].shape) for own in states] == [(2, 64, 8)] * 2 + [(2, 16, 16)] * 2
    bare = model.module.layer2(model.module.layer1(model.module.stem(model.example["x"])))
    assert torch.equal(states[3][0], bare.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("make", [bert, llama, vit])
def test_queries_keys_and_values(make) -> None:  # type: ignore[no-untyped-def]
    found = attention_of(make())
    for paths in found:
        assert [path.rpartition(".")[2][0] for path in paths] == ["q", "k", "v"]


def test_a_fused_projection_is_cut_in_thirds() -> None:
    model = bert()
    block = model.module.encoder.layer[0]
    block.fused = nn.Linear(32, 96)
    with tapped(model, [["encoder.layer.0.fused"]]) as states:
        given = block.fused(torch.ones(1, 2, 32))
    assert [tuple(x.shape) for x in states[0]] == [(1, 2, 32)] * 3
    assert torch.equal(torch.cat(states[0], -1), given)


def test_no_attention_is_an_error() -> None:
    with pytest.raises(UsageError, match="queries, keys and values"):
        attention_of(resnet())


def test_places_are_averaged_over_neighbours() -> None:
    small, large = torch.randn(2, 3, 4), torch.arange(6.0).view(1, 6, 1).expand(2, 6, 5)
    s, t = alike(small, large)
    assert torch.equal(s, small)
    assert t[0, :, 0].tolist() == [0.5, 2.5, 4.5]
