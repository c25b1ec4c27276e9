"""Which sizes are believed to be best, where what is measured is mostly chance."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from penjing.fit.sizesearch import Layer, searched


def test_what_few_samples_say_by_chance_is_not_believed() -> None:
    """Samples with heavy tails: the least that was measured is often not the best."""
    sizes, bits = ((3, 16), (2, 16), (4, 16)), [3.0, 2.0, 4.0]
    believed, least = [], []
    for seed in range(40):
        random = np.random.default_rng(seed)
        hurt, hard = random.uniform(1, 3, 4), random.lognormal(-0.5, 1.0, 100)
        errors = [1.0, 4.0, 0.25]
        layers = [Layer(str(i), float(h) ** 1.25, errors, bits) for i, h in enumerate(hurt)]
        true = {
            pick: sum(h * errors[o] for h, o in zip(hurt, pick, strict=True))
            for pick in itertools.product(range(3), repeat=4)
        }

        def run(
            pick: tuple[int, ...], true: dict[tuple[int, ...], float] = true,
            random: np.random.Generator = random, hard: np.ndarray = hard,
        ) -> torch.Tensor:  # fmt: skip
            return torch.tensor(true[pick] * hard * random.lognormal(-0.5, 1.0, 100))

        best, made = searched(layers, sizes, run, None, 6)
        assert best is not None
        optimum = min(e for pick, e in true.items() if sum(bits[o] for o in pick) <= 12)
        believed.append(true[best] / optimum - 1)
        least.append(true[min(made, key=made.__getitem__)] / optimum - 1)
    assert np.mean(believed) < 0.5 * np.mean(least)
