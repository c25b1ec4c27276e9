"""SmolLM2-135M with fewer connections and fewer neurons, beside Wanda, SparseGPT and others.

    python bench/smollm2_pruning.py [--peer FOLDER] [--missing] [ROW ...]

The network and the windows of text are those of bench/smollm2.py. Calibration: 32 windows of 256
tokens, half of speeches, half of news, the same for all; no training. Evaluation: 208 windows of
128 tokens. Increase: mean negative log-likelihood of the next token above the whole network's, in
nats, with the 95 % interval of a bootstrap over the windows.

Connections: all linear layers of the blocks; Wanda and SparseGPT as published (bench/pruning.py).
Neurons: a fifth of all parameters goes, the table of the vocabulary counted: hidden units of the
MLPs and key-value heads with their queries. `taylor` is as LLM-Pruner chooses (arXiv 2305.11627,
element by element, first order, summed over a unit; the first four blocks and the last stay),
without its fine-tuning. `torch-pruning` is as its example for language models does, by magnitude,
which takes channels of the residual stream too. Seconds are of processors, one thread.

`--peer` is a folder with the package torch_pruning, for its row.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fits import HERE
from smollm2 import increase
from smollm2_fixture import WINDOWS, base, fixture, losses
from torch import nn

import penjing
from penjing.apply import apply
from penjing.model import Batch, Model
from penjing.recipe import Recipe, Step
from penjing.statistics import paired_bootstrap
from penjing.steps.prune import Prune
from penjing.steps.shrink import Shrink

STORE = HERE / "results" / "smollm2-pruning.json"
BLOCKS = ("model.layers.*",)
SHARE = 0.2  # of all parameters
MIDDLE = tuple(f"model.layers.{k}.*" for k in range(4, 29))  # what LLM-Pruner prunes


def rows(tp: Any) -> dict[str, Callable[[Model, list[Batch]], nn.Module]]:
    """What makes a row's network."""
    made: dict[str, Callable[[Model, list[Batch]], nn.Module]] = {}
    for share in (0.5, 0.7):
        given: dict[str, Any] = {"sparsity": share, "targets": BLOCKS}
        about = f"{share:.0%}".replace("%", " %")
        made[f"{about}, wanda"] = applied(Prune(criterion="wanda", **given))
        made[f"{about}, sparsegpt"] = applied(
            Prune(criterion="sparsegpt", alpha=0.0, bias=False, **given)
        )
        for name in ("fast", "admm"):
            made[f"{about}, {name}"] = applied(Prune(criterion=name, **given))
    made["neurons, taylor"] = shrunk(criterion="taylor", repair=False, targets=MIDDLE)
    made["neurons, gram, no repair"] = shrunk(repair=False)
    made["neurons, gram"] = shrunk()
    made["neurons, gram, global"] = shrunk(ranking="global")
    if tp is not None:
        made["neurons, torch-pruning"] = lambda model, _: theirs(model, tp)
    return made


def applied(*steps: Step) -> Callable[[Model, list[Batch]], nn.Module]:
    return lambda model, batches: apply(model, Recipe(steps), batches).model.module


def shrunk(**options: Any) -> Callable[[Model, list[Batch]], nn.Module]:
    return applied(Shrink(ratio=SHARE, of="parameters", **options))


def theirs(model: Model, tp: Any) -> nn.Module:
    """As in its prune_llm.py, the ratio found by halving."""
    low, high, best = 0.0, 0.9, model.module
    for _ in range(7):
        middle = (low + high) / 2
        module = copy.deepcopy(model.module).requires_grad_(True)
        module.config.use_cache = False
        module.set_attn_implementation("eager")  # else it does not see that heads share keys
        heads: dict[nn.Module, int] = {}
        for layer in module.model.layers:
            own = layer.self_attn
            heads[own.q_proj] = module.config.num_attention_heads
            heads[own.k_proj] = heads[own.v_proj] = module.config.num_key_value_heads
        pruner = tp.pruner.BasePruner(
            module, torch.tensor([[1, 2, 3, 4]]),
            tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            global_pruning=False, pruning_ratio=middle, head_pruning_ratio=middle,
            ignored_layers=[module.lm_head], num_heads=heads, prune_num_heads=True,
            prune_head_dims=False,
        )  # fmt: skip
        pruner.step()
        for layer in module.model.layers:
            own = layer.self_attn
            own.num_heads = own.q_proj.out_features // own.head_dim
            own.num_key_value_heads = own.k_proj.out_features // own.head_dim
            own.num_key_value_groups = own.num_heads // own.num_key_value_heads
        enough = size(module) <= (1 - SHARE) * size(model.module)
        low, high = (low, middle) if enough else (middle, high)
        best = module if enough else best
    return best.eval()


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def batches() -> list[Batch]:
    ids = torch.from_numpy(np.load(WINDOWS / "calibration.npy")[::2])
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids.split(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--peer")
    options = parser.parse_args()
    if options.peer:
        sys.path.insert(0, options.peer)
    tp = importlib.import_module("torch_pruning") if options.peer else None
    torch.set_num_threads(1)
    folder, _ = fixture()
    model = penjing.load(str(folder))
    data, ids = batches(), np.load(WINDOWS / "evaluation.npy")
    store: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    for name, make in rows(tp).items():
        if options.rows and not any(word in name for word in options.rows):
            continue
        if options.missing and name in store:
            continue
        start = time.process_time()
        module = make(model, data)
        seconds = time.process_time() - start
        store[name] = {
            "seconds": seconds, "parameters": size(module) / size(model.module),
            "losses": [round(float(x), 5) for x in losses(module, ids)],
        }  # fmt: skip
        text = (f"{json.dumps(n)}: {json.dumps(r)}" for n, r in store.items())
        STORE.write_text("{\n" + ",\n".join(text) + "\n}\n")
        table(store)
        print(name, *said(store, name), sep="  ", flush=True)


def said(store: dict[str, Any], name: str) -> list[str]:
    """Increase, perplexity, share of Wanda's or Taylor's increase, parameters, seconds."""
    row = store[name]
    own = np.stack([np.array(row["losses"]), base()], 1)
    nothing = np.stack([own[:, 1]] * 2, 1)
    value, low, high = paired_bootstrap(
        nothing, own, increase, relative=False, higher_is_better=False
    )
    first = name.partition(",")[0]
    shares = []
    for other in ("wanda", "sparsegpt", "taylor"):
        beside = store.get(f"{first}, {other}")
        shares.append(f"{value / (np.mean(beside['losses']) - base().mean()):.3f}"
                      if beside else "")  # fmt: skip
    return [
        f"{value:.3f} [{low:.3f}, {high:.3f}]", f"{np.exp(own[:, 0].mean()):.2f}", *shares,
        f"{row['parameters']:.3f}", f"{row['seconds']:.0f}",
    ]  # fmt: skip


def table(store: dict[str, Any]) -> None:
    """All rows."""
    parts = [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")]
    text = ["# SmolLM2-135M with fewer connections and neurons", "", parts[2], "", parts[3], ""]
    text += [f"The whole network's perplexity: {np.exp(base().mean()):.2f}.", ""]
    text += ["| row | increase | perplexity | of wanda's | of sparsegpt's | of taylor's "
             "| parameters | s |", "|---" * 8 + "|"]  # fmt: skip
    for name in sorted(store, key=list(rows(object())).index):
        text.append(f"| {name} | {' | '.join(said(store, name))} |")
    STORE.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
