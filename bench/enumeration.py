"""Every recipe of a small space made and evaluated, and what the search finds beside the best.

    python bench/enumeration.py

The network is bench/tiny.py's: 19,000 weights, trained on Fashion-MNIST. The space: 2, 3, 4 or 5
bits in groups of 32 of each of the six layers of its blocks, by error feedback on 128 images that
were not trained on: 4,096 recipes of 19 different sizes. Error is the mean of KL(network ||
quantized) in nats on the first 5,000 test images, which no search sees; size is stored bytes.

`penjing.fit.allocate` (`quantize --mixed`) searches within ten budgets between the smallest and the
largest, and compares outputs on 26, 128 or 512 other images; tries=1 is its integer program alone.
`excess`: the error of what it found over the least of any recipe within the budget. `bytes`: its
bytes over the fewest of any recipe with no more error. The least on the test images is the least of
many, by chance too: `best on 2,000` is the excess of the recipe that is best on 2,000 other images,
of all recipes. `again`: of each recipe found, how far `apply` comes out from the enumeration, which
adds the same sums in another order, so that now and then a weight has another code.

All recipes are kept in the cache, the figures are in bench/results/enumeration.json, and the tables
beside it are written from them.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import fashion
import numpy as np
import tiny
import torch
from fits import CACHE, HERE
from torch import Tensor, nn
from torch.nn import functional

import penjing
from penjing.apply import apply
from penjing.calibrate import LayerStats, Unit
from penjing.fit.allocate import allocate
from penjing.layerstats import Collector
from penjing.model import Batch, Model
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize

STORE = HERE / "results" / "enumeration.json"
SIZES = ((2, 32), (3, 32), (4, 32), (5, 32))
STEP = Quantize(3, 32, scale_bits=16, targets=("blocks.*",))
CALIBRATION, SEARCH, DEVELOPMENT, TEST = 128, 512, 2000, 5000
BUDGETS = 10
# What is compared on, and how many networks are made.
SEARCHES = ((512, 1), (26, 6), (128, 6), (512, 6))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images: to fit codes to, to search on, to develop on, to report on."""
    unseen, _ = tiny.unseen()
    pool = unseen[torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0))]
    parts = pool.split([CALIBRATION, SEARCH, DEVELOPMENT, len(pool) - 2640])
    return (*parts[:3], fashion.images("t10k")[0][:TEST])


def batches(images: Tensor) -> list[Batch]:
    return [{"pixel_values": part} for part in images.split(16)]


def network() -> Model:
    tiny.trained()
    return penjing.load(f"{HERE / 'tiny.py'}:network", weights=tiny.WEIGHTS)


class Errors:
    """Errors of recipes on the development and on the test images."""

    def __init__(self, module: nn.Module) -> None:
        self.images = torch.cat(data()[2:])
        with torch.no_grad():
            self._wanted = module(self.images)

    def of(self, logits: Tensor) -> tuple[float, float]:
        p, q = self._wanted.log_softmax(1), logits.log_softmax(1)
        far = (p.exp() * (p - q)).sum(1).double()
        return float(far[:DEVELOPMENT].mean()), float(far[DEVELOPMENT:].mean())


class Tree:
    """Sizes of all layers, depth first: what stands before a layer is made once for all after it.

    A layer's codes depend on the codes before it (`Quantize.alpha`), so every node of the tree is
    a quantization of its own, and a leaf is what `apply` makes of the recipe.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._module = model, model.module
        self._paths = [f"{b}.{part}" for b in model.blocks for part in ("up", "down")]
        self._errors = Errors(model.module)
        self._images = torch.cat([data()[0], self._errors.images])
        self._before: list[Tensor] = []  # inputs of every layer on the calibration images
        layers = [model.module.get_submodule(p) for p in self._paths]
        handles = [m.register_forward_pre_hook(lambda _, a: self._before.append(a[0]))
                   for m in layers]  # fmt: skip
        with torch.no_grad():
            self._module(self._images[:CALIBRATION])
        for handle in handles:
            handle.remove()
        self.rows: list[tuple[float, float, float]] = []  # stored bytes, both errors

    @torch.no_grad()
    def grow(self) -> None:
        h = self._module.stem(self._module.pool(self._images).flatten(1))
        self._layer(0, h, self._module.blocks[0].norm(h), 0)

    def _layer(self, depth: int, h: Tensor, x: Tensor, stored: int) -> None:
        """`h` [n, width] is the residual stream, `x` the layer's input."""
        path, layer = self._paths[depth], self._module.get_submodule(self._paths[depth])
        own = Collector({path: layer}, STEP.needs, {path: layer})
        own.begin(None)
        own.before(path, self._before[depth])
        own.now(path, x[:CALIBRATION])
        stats = own.stats()
        for size in SIZES:
            weight, bias, taken = self._planned(path, layer, size, stats)
            y, total = functional.linear(x, weight, bias), stored + taken
            if path.endswith("up"):
                self._layer(depth + 1, h, functional.gelu(y), total)
            elif depth + 1 < len(self._paths):
                after = self._module.blocks[depth // 2 + 1].norm
                self._layer(depth + 1, h + y, after(h + y), total)
            else:
                logits = self._module.head(self._module.norm(h + y))[CALIBRATION:]
                self.rows.append((total, *self._errors.of(logits)))

    def _planned(
        self, path: str, layer: nn.Module, size: tuple[int, int], stats: dict[str, LayerStats]
    ) -> tuple[Tensor, Tensor, int]:
        step = replace(STEP, bits=size[0], group=size[1])
        unit = Unit(path, self._model, {path: layer}, None, None)
        edits = {e.kind: e.value for e in step.plan(unit, stats)}
        planes = edits["quantize"]
        return planes.dequantize().float(), edits["weight"], planes.stored_bytes


def kept(make: Callable[[], list[Any]]) -> np.ndarray:
    """[recipes, 3] stored bytes, error on development and on test images."""
    path = CACHE / "enumeration-1.npy"
    if not path.exists():
        start = time.process_time()
        rows = make()
        np.save(path, np.asarray(rows, dtype=float))
        print(f"{len(rows)} recipes in {time.process_time() - start:.0f} CPU seconds", flush=True)
    return np.load(path)


def beside(table: np.ndarray, index: int, limit: float) -> dict[str, float]:
    """A recipe beside the best within the limit, and beside the smallest that is as good."""
    size, development, test = table.T
    fits = np.flatnonzero(size <= limit)
    hindsight = fits[development[fits].argmin()]
    least = test[fits].min()
    return {
        "limit": limit, "bytes": size[index], "error": test[index], "least": least,
        "excess": test[index] / least - 1, "best_on_2000": test[hindsight] / least - 1,
        "bytes_excess": size[index] / size[test <= test[index]].min() - 1,
    }  # fmt: skip


def ladder(size: np.ndarray) -> list[float]:
    return np.linspace(size.min(), size.max(), BUDGETS + 2)[1:-1].tolist()


def searched(model: Model) -> dict[str, Any]:
    def make() -> list[Any]:
        tree = Tree(model)
        tree.grow()
        return tree.rows

    table = kept(make)
    recipes = list(itertools.product(SIZES, repeat=2 * len(model.blocks)))
    calibration, search, *_ = data()
    errors, checked = Errors(model.module), {}
    found = {}
    for count, tries in SEARCHES:
        rows = []
        for limit in ladder(table[:, 0]):
            one = allocate(model, STEP, batches(calibration), batches(search[:count]), SIZES,
                           limit=8 * limit, tries=tries)  # fmt: skip
            index = recipes.index(tuple(one.sizes.values()))
            if index not in checked:
                made = apply(model, Recipe((one.step,)), batches(calibration)).model
                with torch.no_grad():
                    checked[index] = errors.of(made.module(errors.images))[1]
            rows.append(beside(table, index, limit) | {
                "evaluations": one.evaluations, "bits": [bits for bits, _ in one.sizes.values()],
                "again": checked[index] / table[index, 2] - 1,
            })  # fmt: skip
        found[f"{count} images, tries={tries}"] = rows
        print(summary(found), flush=True)
    return found


def summary(found: dict[str, Sequence[dict[str, Any]]]) -> str:
    lines = [
        "| compared on | networks run | excess: mean | most | within 1 % | bytes: most "
        "| within 1 % | best on 2,000: mean, most | again: most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        excess, more, other, again = (
            np.array([r[k] for r in rows])
            for k in ("excess", "bytes_excess", "best_on_2000", "again")
        )
        runs = [r["evaluations"] for r in rows]
        lines.append(
            f"| {name} | {min(runs)} to {max(runs)} | {excess.mean():.1%} | {excess.max():.1%} "
            f"| {(excess <= 0.01).sum()} of {len(rows)} | {more.max():.1%} "
            f"| {(more <= 0.01).sum()} of {len(rows)} | {other.mean():.1%}, {other.max():.1%} "
            f"| {abs(again).max():.1%} |"
        )
    return "\n".join(lines) + "\n"


def each(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| budget | bytes | bits | error, nats | least | excess | bytes | networks run |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {r['limit']:.0f} | {r['bytes']:.0f} | {' '.join(map(str, r['bits']))} "
        f"| {r['error']:.5f} | {r['least']:.5f} | {r['excess']:.1%} | {r['bytes_excess']:.1%} "
        f"| {r['evaluations']} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    found = searched(network())
    STORE.write_text(json.dumps(found, indent=1) + "\n")
    text = (__doc__ or "").split("\n\n", 2)[2]
    last = list(found)[-1]
    STORE.with_suffix(".md").write_text(
        f"# An enumerated space\n\n{text}\n{summary(found)}\n{last}:\n\n{each(found[last])}"
    )


if __name__ == "__main__":
    main()
