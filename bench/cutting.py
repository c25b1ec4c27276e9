"""MiniLM-L6 and SmolLM2-135M with fewer blocks, beside ShortGPT and SLEB.

    python bench/cutting.py [--missing] [ROW ...]

MiniLM: calibration and evaluation as in bench/pruning.py, 1,200 sentences to judge by; error: 1 -
cosine to the embedding of the whole network, mean over the sentences with its 95 % interval.
SmolLM2: calibration and evaluation as in bench/smollm2_pruning.py, 208 windows of 128 tokens;
increase: mean negative log-likelihood of the next token above the whole network's, in nats, with
the 95 % interval of a bootstrap over the windows. No training but in the rows that say so, and
there of patches alone: 100 steps of distillation, as `penjing cut --train 100`.

`influence, none` is ShortGPT (arXiv 2403.03853), the plain drop. `sleb` is as SLEB chooses (arXiv
2402.09025): one block after the other, that whose loss raises the perplexity of the calibration
tokens least, every block tried again in each round, no patch; on the tokens that `greedy` judges
by. All others are penjing's. What is chosen block by block is chosen once, for the most blocks,
and the first of them are a row's; seconds, of processors and one thread, are of all that.

All rows are kept in bench/results/cutting.json and the table beside it is written from all of
them; with ROW only rows whose name contains it are made, with --missing only new ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fits import HERE
from quantization import errors, sentences
from smollm2 import increase
from smollm2_fixture import WINDOWS, base, fixture, losses
from smollm2_pruning import batches
from torch import Tensor

import penjing
from penjing.apply import apply
from penjing.demo import minilm
from penjing.model import Batch, Model
from penjing.recipe import Recipe
from penjing.statistics import paired_bootstrap
from penjing.steps._trials import Piece, Trials, judges
from penjing.steps.cut import Cut
from penjing.steps.recover import Recover

STORE = HERE / "results" / "cutting.json"
COUNTS = {"minilm": (1, 2, 3), "smollm2": (3, 6)}
WAYS: dict[str, tuple[str, str, bool]] = {  # criterion, patch, refit; those trained by name
    "influence, none": ("influence", "none", False),
    "influence, linear": ("influence", "linear", False),
    "angular, none": ("angular", "none", False),
    "greedy, none": ("greedy", "none", False),
    "greedy, low-rank": ("greedy", "low-rank", False),
    "greedy, linear": ("greedy", "linear", False),
    "greedy, fused": ("greedy", "fused", True),
    "greedy, linear, refit": ("greedy", "linear", True),
    "greedy, linear, trained": ("greedy", "linear", False),
    "evolution, linear, refit": ("evolution", "linear", True),
}


def rows() -> dict[str, tuple[str, int, str]]:
    """Network, blocks that go and the way, by name."""
    made = {}
    for network, counts in COUNTS.items():
        for count in counts:
            ways = [*WAYS]
            if network == "smollm2":
                ways = ["influence, none", "sleb", *ways[1:-1]]
            for way in ways:
                made[f"{network} -{count}, {way}"] = (network, count, way)
    return made


def cut(
    model: Model, data: list[Batch], count: int, way: str, orders: dict[str, Any], network: str
) -> tuple[Any, float]:
    """What was made, and the seconds of a search that an earlier row has made."""
    if way == "sleb":
        criterion, patch, refit = "sleb", "none", False
    else:
        criterion, patch, refit = WAYS[way]
    options: dict[str, Any] = {"patch": patch, "refit": refit}
    seconds = 0.0
    if criterion in ("greedy", "sleb"):
        key = f"{network}, {criterion}, {'none' if patch == 'none' else 'linear'}"
        if key not in orders:
            start, most = time.process_time(), COUNTS[network][-1]
            blocks = sleb(model, data, most) if criterion == "sleb" else searched(
                model, data, most, options["patch"]
            )  # fmt: skip
            orders[key] = [blocks, time.process_time() - start]
        else:
            seconds = orders[key][1]
        blocks = orders[key][0]
        step = Cut(blocks=tuple(blocks[:count]), **options)
    else:
        step = Cut(count, criterion=criterion, **options)
    steps: tuple[Any, ...] = (step,)
    if way.endswith("trained"):
        steps = (step, Recover(seconds=0, steps=100, lr=1e-3, targets=("*penjing_*",)))
    return apply(model, Recipe(steps), data), seconds


def searched(model: Model, data: list[Batch], count: int, patch: str) -> list[str]:
    """Blocks in the order that `greedy` takes them."""
    step = Cut(count, criterion="greedy", patch="none" if patch == "none" else "linear")
    found = apply(model, Recipe((step,)), data).done
    drops = [(int(d.why.split()[3].rstrip(";")), d.path) for d in found if d.kind == "drop"]
    return [path for _, path in sorted(drops)]


def sleb(model: Model, data: list[Batch], count: int) -> list[str]:
    """Blocks in the order they go."""
    judging = judges(model, data)

    def loss(outputs: Sequence[Tensor]) -> float:
        found = [torch.nn.functional.cross_entropy(
            o[:, :-1].flatten(0, 1), b["input_ids"][:, 1:].flatten())
            for o, b in zip(outputs, judging, strict=True)]  # fmt: skip
        return float(torch.stack(found).mean())

    trials = Trials(model, judging, lambda first, last: None, loss)
    gone: list[Piece] = []
    for _ in range(count):
        tried = {p: trials(frozenset([*gone, p])) for p in trials.able if p not in gone}
        gone.append(min(tried, key=tried.__getitem__))
        trials.settle(frozenset(gone))
    return [model.blocks[piece.block] for piece in gone]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--missing", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    loaded: dict[str, tuple[Model, list[Batch], Callable[[Model], list[float]]]] = {}
    for name, (network, count, way) in rows().items():
        if options.rows and not any(word in name for word in options.rows):
            continue
        if options.missing and name in store:
            continue
        if network not in loaded:
            loaded = {network: {"minilm": encoder, "smollm2": decoder}[network]()}
        model, data, judged = loaded[network]
        start = time.process_time()
        orders = store.setdefault("orders", {})
        made, search = cut(model, data, count, way, orders, network)
        seconds = time.process_time() - start
        store[name] = {
            "seconds": seconds + search,
            "blocks": sorted(d.path for d in made.done if d.kind == "drop"),
            "parameters": made.model.parameter_count / model.parameter_count,
            "values": [round(x, 5) for x in judged(made.model)],
        }
        text = (f"{json.dumps(n)}: {json.dumps(r)}" for n, r in store.items())
        STORE.write_text("{\n" + ",\n".join(text) + "\n}\n")
        table(store)
        print(name, *said(store, name), sep="  ", flush=True)


def encoder() -> tuple[Model, list[Batch], Callable[[Model], list[float]]]:
    model = penjing.load(str(minilm()))
    data, judging, wanted = sentences(model)
    return model, data, lambda made: errors(made, judging, wanted).tolist()


def decoder() -> tuple[Model, list[Batch], Callable[[Model], list[float]]]:
    model = penjing.load(str(fixture()[0]))
    ids = np.load(WINDOWS / "evaluation.npy")
    return model, batches(), lambda made: losses(made.module, ids).tolist()


def said(store: dict[str, Any], name: str) -> list[str]:
    """Error or increase, of the plain drop's, of SLEB's, blocks, parameters, seconds."""
    row = store[name]
    values = np.array(row["values"])
    network = name.partition(" ")[0]
    zero = 0.0
    if network == "smollm2":
        zero = float(base().mean())
        own = np.stack([values, base()], 1)
        nothing = np.stack([own[:, 1]] * 2, 1)
        value, low, high = paired_bootstrap(
            nothing, own, increase, relative=False, higher_is_better=False
        )
        about = f"{value:.3f} [{low:.3f}, {high:.3f}]"
    else:
        value, half = values.mean(), 1.96 * values.std(ddof=1) / len(values) ** 0.5
        about = f"{value:.4f} ± {half:.4f}"
    shares = []
    for other in ("influence, none", "sleb"):
        beside = store.get(f"{name.split(', ')[0]}, {other}")
        shares.append(f"{value / (np.mean(beside['values']) - zero):.3f}" if beside else "")
    gone = " ".join(path.rpartition(".")[2] for path in row["blocks"])
    return [about, *shares, gone, f"{row['parameters']:.3f}", f"{row['seconds']:.0f}"]


def table(store: dict[str, Any]) -> None:
    """All rows, in the order of `rows`."""
    parts = [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")]
    text = ["# MiniLM-L6 and SmolLM2-135M with fewer blocks", "", parts[2], "", parts[3], ""]
    text += [
        "| network, blocks, way | error or increase | of the plain drop's | of sleb's "
        "| blocks that went | parameters | s |",
        "|---" * 7 + "|",
    ]
    text += [f"| {n} | {' | '.join(said(store, n))} |" for n in rows() if n in store]
    STORE.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
