import pytest
from tests.networks import bert, llama, resnet, stack, vit

from penjing.transferring.matching import match


@pytest.mark.parametrize("make", [bert, llama, vit, resnet])
def test_a_network_matches_itself(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    found = match(model, model)
    assert found.blocks == tuple(range(len(model.blocks)))
    assert all(mine == theirs for mine, theirs in found.layers.items())
    assert found.alone == ()


@pytest.mark.parametrize(
    ("own", "other", "wanted"),
    [
        (3, 6, (0, 2, 5)),
        (2, 7, (0, 6)),
        (6, 3, (0, 0, 1, 1, 2, 2)),
        (4, 3, (0, 1, 1, 2)),
    ],
)
def test_blocks_are_spread_evenly(own: int, other: int, wanted: tuple[int, ...]) -> None:
    found = match(stack(own), stack(other)).blocks
    # Two places are as near as each other where a half is rounded.
    assert found[0] == wanted[0]
    assert found[-1] == wanted[-1]
    assert len(set(found)) == len(set(wanted))
    assert all(abs(a - b) <= 1 for a, b in zip(found, wanted, strict=True))


def test_a_layer_without_a_counterpart_is_alone() -> None:
    # A decoder's second matrix of the gated layer has none in BERT, nor have its norms.
    found = match(llama(embedding=True), bert())
    assert any("norm" in path for path in found.alone)
    assert found.layers["embed_tokens"] == "embeddings.word_embeddings"
