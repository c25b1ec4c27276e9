"""Each formula written again, sample by sample, in numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from penjing.features import (
    attention,
    attention_maps,
    crd,
    fitnets,
    hidden,
    relations,
    rkd,
    similarity,
)

GENERATOR = torch.Generator().manual_seed(3)
S = torch.randn(4, 3, 6, generator=GENERATOR)
T = torch.randn(4, 3, 6, generator=GENERATOR)
WIDE = torch.randn(4, 3, 12, generator=GENERATOR)


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def test_hidden_is_one_for_the_mean() -> None:
    mean = T.flatten(0, 1).mean(0).expand_as(T)
    assert float(hidden.loss(mean, T)) == pytest.approx(1)
    s, t = S.double().numpy().reshape(-1, 6), T.double().numpy().reshape(-1, 6)
    wanted = ((s - t) ** 2).mean() / t.var(0).mean()
    assert float(fitnets.loss(S, T)) == pytest.approx(wanted, rel=1e-5)


def test_attention() -> None:
    maps = []
    for x in (S.double().numpy(), WIDE.double().numpy()):
        a = (x**2).sum(-1)
        maps.append(a / np.linalg.norm(a, axis=1, keepdims=True))
    wanted = ((maps[0] - maps[1]) ** 2).sum(1).mean()
    assert float(attention.loss(S, WIDE)) == pytest.approx(wanted, rel=1e-5)


def test_similarity() -> None:
    grams = []
    for x in (S.double().numpy(), WIDE.double().numpy()):
        q = x.reshape(4, -1)
        g = q @ q.T
        grams.append(g / np.linalg.norm(g, axis=1, keepdims=True))
    wanted = np.linalg.norm(grams[0] - grams[1]) ** 2 / 16
    assert float(similarity.loss(S, WIDE)) == pytest.approx(wanted, rel=1e-5)


def test_rkd() -> None:
    xs = [x.double().numpy().mean(1) for x in (S, WIDE)]
    pairs = list(itertools.combinations(range(4), 2))
    far = [[np.linalg.norm(x[i] - x[j]) for i, j in pairs] for x in xs]
    distance = np.mean([huber(a / np.mean(far[0]) - b / np.mean(far[1]))
                        for a, b in zip(*far, strict=True)])  # fmt: skip

    def cosine(x: np.ndarray, j: int, i: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))

    angle = np.mean([huber(cosine(xs[0], *c) - cosine(xs[1], *c))
                     for c in itertools.product(range(4), repeat=3)])  # fmt: skip
    assert float(rkd.loss(S, WIDE)) == pytest.approx(distance + 2 * angle, rel=1e-4)


def test_relations() -> None:
    found = []
    # gcd(6, 12) = 6 heads, of width 1 and 2.
    for sample, head, place in itertools.product(range(4), range(6), range(3)):
        rows = []
        for x, d in ((WIDE, 2), (S, 1)):
            own = x[sample].double().numpy()[:, head * d : head * d + d]
            rows.append(softmax(own[place] @ own.T / math.sqrt(d)))
        found.append(rel_entr(*rows).sum())
    assert float(relations.loss(S, WIDE)) == pytest.approx(np.mean(found), rel=1e-5)


def test_crd() -> None:
    units = []
    for x in (S, T):
        own = x.double().numpy().mean(1)
        units.append(own / np.linalg.norm(own, axis=1, keepdims=True))
    scores = units[0] @ units[1].T / 0.1
    both = [-np.log(np.diag(softmax(scores, axis=axis))).mean() for axis in (0, 1)]
    assert float(crd.loss(S, T)) == pytest.approx(np.mean(both), rel=1e-5)
    same = T[:1].expand_as(T)
    assert float(crd.loss(same, same)) == pytest.approx(math.log(4), rel=1e-5)


@pytest.mark.parametrize("heads", [2, 3])
def test_attention_maps(heads: int) -> None:
    s = torch.randn(2, 4, 2, 4, generator=GENERATOR)
    t = torch.randn(2, 4, heads, 4, generator=GENERATOR)
    rows = [softmax(x.double().numpy(), axis=-1) for x in (t, s)]
    if heads != 2:
        rows = [own.mean(2, keepdims=True) for own in rows]
    wanted = rel_entr(*rows).sum(-1)  # [batch, places, heads]
    assert float(attention_maps.loss(s, t)) == pytest.approx(wanted.mean(), rel=1e-5)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    kept = wanted[mask.numpy()].mean()
    assert float(attention_maps.loss(s, t, mask)) == pytest.approx(kept, rel=1e-5)
