"""MiniLM-L6 with fewer connections and fewer neurons, beside Wanda and SparseGPT.

    python bench/pruning.py [--missing] [ROW ...]

All linear layers of the encoder (10.6 M weights), without any training. Calibration: 400 sentences
each of State of the Union speeches, of BBC News and of WordNet's glosses. Evaluation: 1,200
sentences about movies (as in bench/quantization.py). Error: 1 - cosine to the embedding of the
whole network, mean over the sentences with its 95 % interval.

Connections: Wanda and SparseGPT as published (a block's layers see the block unpruned with Wanda,
pruned so far with SparseGPT; no target but the layer's own output); `fast` looks at a fifth of the
sentences; `global` takes as many connections, more of some layers than of others. Neurons: hidden
units of the MLPs; `wanda` is by the sums of Wanda's scores, without a repair, and so are the other
criteria but `gram`; `measured` takes as many, more of some layers than of others. MACs: heads and
hidden units, until so much of the network's multiplications is gone, ranked layer by layer or
against each other. Seconds are of processors, one thread.

All rows are kept in bench/results/pruning-minilm.json and the table beside it is written from all
of them; with ROW only rows whose name contains it are made, with --missing only new ones.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from fits import HERE
from quantization import ENCODER, errors, sentences

import penjing
from penjing.apply import apply
from penjing.demo import minilm
from penjing.recipe import Recipe, Step
from penjing.steps.prune import Prune
from penjing.steps.shrink import Shrink

STORE = HERE / "results" / "pruning-minilm.json"
MLP = ("encoder.layer.[0-9].output.dense",)
# Of all parameters, those that the hidden units of the MLPs have.
UNITS = 6 * 1536 * (2 * 384 + 1) / 22_565_376


def rows() -> dict[str, tuple[Step, ...]]:
    """Steps by name; a row's first part says what it is compared within."""
    made: dict[str, tuple[Step, ...]] = {}
    own: dict[str, Any]
    for about, options in (
        ("50 %", {"sparsity": 0.5}), ("70 %", {"sparsity": 0.7}), ("2:4", {"pattern": "2:4"}),
    ):  # fmt: skip
        given: dict[str, Any] = options | {"targets": ENCODER}
        made[f"{about}, magnitude"] = (Prune(criterion="magnitude", **given),)
        made[f"{about}, wanda"] = (Prune(criterion="wanda", **given),)
        made[f"{about}, sparsegpt"] = (
            Prune(criterion="sparsegpt", alpha=0.0, bias=False, **given),
        )
        for name in ("taylor", "fisher"):
            made[f"{about}, {name}"] = (Prune(criterion=name, **given),)
        for name in ("fast", "admm"):
            made[f"{about}, {name}"] = (Prune(criterion=name, **given),)
        if "pattern" not in given:
            made[f"{about}, admm, global"] = (Prune(criterion="admm", ranking="global", **given),)
    for share, block in ((0.5, "1x4"), (0.5, "4x4"), (0.9, "4x4")):
        about = f"{share:.0%} in {block}".replace("%", " %")
        own = {"sparsity": share, "pattern": block, "targets": ENCODER}
        made[f"{about}, magnitude"] = (Prune(criterion="magnitude", **own),)
        made[f"{about}, sparsegpt"] = (Prune(criterion="sparsegpt", alpha=0.0, bias=False, **own),)
        for name in ("fast", "admm"):
            made[f"{about}, {name}"] = (Prune(criterion=name, **own),)
    for ratio in (0.3, 0.5):
        about = f"MLP -{ratio:.0%}".replace("%", " %")
        own = {"ratio": ratio, "targets": MLP, "multiple": 1}
        for name in (
            "random", "magnitude", "l2", "fpgm", "activation", "taylor", "fisher", "wanda",
        ):  # fmt: skip
            made[f"{about}, {name}"] = (Shrink(criterion=name, repair=False, **own),)
        made[f"{about}, wanda, repaired"] = (Shrink(criterion="wanda", **own),)
        made[f"{about}, gram"] = (Shrink(**own),)
        own |= {"ratio": ratio * UNITS, "of": "parameters"}
        made[f"{about}, gram, measured"] = (Shrink(ranking="measured", **own),)
    for share in (0.3, 0.5):
        for ranking in ("layer", "global", "measured"):
            name = f"MACs -{share * 100:.0f} %, {ranking}"
            made[name] = (Shrink(share, of="macs", ranking=ranking),)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--missing", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = penjing.load(str(minilm()))
    calibration, data, reference = sentences(model)
    found: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    for name, steps in rows().items():
        if options.rows and not any(word in name for word in options.rows):
            continue
        if options.missing and name in found:
            continue
        start = time.process_time()
        made = apply(model, Recipe(steps), calibration).model
        seconds = time.process_time() - start
        off = errors(made, data, reference)
        half = 1.96 * float(off.std()) / len(off) ** 0.5
        found[name] = [float(off.mean()), half, seconds]
        print(f"{name:30s} {off.mean():.5f} +- {half:.5f}  {seconds:.0f} s", flush=True)
        STORE.write_text(json.dumps(found, indent=1) + "\n")
        table(found)


def table(found: dict[str, list[float]]) -> None:
    """All rows, in the order of `rows`, beside two methods."""
    parts = [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")]
    text = ["# MiniLM-L6 with fewer connections and neurons", "", parts[2], "", parts[3], ""]
    text += [
        "| what goes, how | error, 95 % interval | of wanda's | of sparsegpt's | s |",
        "|---" * 5 + "|",
    ]
    for name in (name for name in rows() if name in found):
        error, half, seconds = found[name]
        about = name.split(", ")[0]
        ratios = []
        for method in ("wanda", "sparsegpt"):
            other = found.get(f"{about}, {method}")
            ratios.append(f"{error / other[0]:.3f}" if other else "")
        text.append(f"| {name} | {error:.5f} ± {half:.5f} | {' | '.join(ratios)} | {seconds:.0f} |")
    STORE.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
