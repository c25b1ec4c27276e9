"""Half of all channels taken out of every network of torchvision: does it hold?

    python bench/zoo_torchvision.py [--no-onnx] [NAME ...]

All networks for classification, segmentation, detection and optical flow that torchvision lists,
with their own widths and random weights, at 50 % of the units of every group that
`penjing inspect --groups` finds, with nothing said about any of them. Pictures are small (column
`px`), vision transformers are built for such pictures, MaxViT for 224; GoogLeNet and Inception
have no auxiliary heads, which are for training alone. Detectors run whole, with
resizing and suppression of boxes; they may propose 64 boxes and return 8, of any score. RAFT
refines its flow 12 times.

groups: that can go. Left: axes whose proof failed, so they stay; every other axis has its reason
    too. Parameters: of the smaller network over the whole one's.
off: the smaller network's output beside the whole one's with the weights at zero that read the
    removed units, in float64, over what the removal changes.
onnx: the smaller network exported, and run by onnxruntime, beside torch (float32, largest
    difference over the largest output); of detectors the backbone and all heads, on fixed boxes.
again: a fresh network with the same slices made and the weights loaded gives the same bytes.
s: of one processor, of finding the groups and proving them. Memory: what the process grew by from
    before the network was built to the peak of that, over the network's bytes; MB beside it.

Needs torchvision and a torch that it loads with. All rows are kept in
bench/results/zoo-torchvision.json, and the table beside it is written from all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import torch
import torchvision
from fits import HERE
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchvision import models
from zoo import exported, fill, halved, the_same, tried

from penjing.channelmap import map_of

STORE = HERE / "results" / "zoo-torchvision.json"
KINDS = {
    "classification": models, "segmentation": models.segmentation,
    "detection": models.detection, "optical flow": models.optical_flow,
}  # fmt: skip
KIND = {n: kind for kind, place in KINDS.items() for n in models.list_models(module=place)}
# Side of the picture where it is not 64: the least that the network takes, or what it is made for.
SIDES = {
    "inception_v3": 96, "maxvit_t": 224, "vit_b_32": 96, "vit_l_32": 96, "vit_h_14": 56,
    "ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320,
}  # fmt: skip
FEW = {"rpn_pre_nms_top_n_test": 64, "rpn_post_nms_top_n_test": 64, "box_score_thresh": 0.0,
       "box_detections_per_img": 8}  # fmt: skip
FEW_DENSE = {"score_thresh": 0.0, "topk_candidates": 64, "detections_per_img": 8}


class Constant(TorchFunctionMode):
    """Networks start from constants: the numbers of all that follows are drawn there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "erfinv_"):
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).fill_(0.01)
        return func(*args, **kwargs)


class Tensors(nn.Module):
    """A network that takes batches, and gives all tensors of its output."""

    def __init__(self, net: nn.Module, detects: bool) -> None:
        super().__init__()
        self.net, self.detects = net, detects

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.net(list(inputs[0])) if self.detects else self.net(*inputs)
        return tuple(x for x in tree_leaves(found) if isinstance(x, Tensor))


class Heads(nn.Module):
    """Backbone and heads of a detector: what it computes before it chooses boxes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        net: Any = self.net
        features = net.backbone(images)
        features = features if isinstance(features, dict) else {"0": features}
        if not hasattr(net, "rpn"):
            return tuple(tree_leaves(net.head(list(features.values()))))
        found = [*net.rpn.head(list(features.values()))]
        side, heads = [tuple(images.shape[-2:])], net.roi_heads
        for part in ("box", "mask", "keypoint"):
            if (pool := getattr(heads, f"{part}_roi_pool", None)) is not None:
                own = getattr(heads, f"{part}_head")(pool(features, [boxes], side))
                found.append(getattr(heads, f"{part}_predictor")(own))
        return tuple(tree_leaves(found))


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network in evaluation mode, and inputs."""
    kind = KIND[name]
    side = SIDES.get(name, 64 if kind in ("classification", "segmentation") else 128)
    options: dict[str, Any] = {}
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if kind == "detection":
        options |= FEW if "rcnn" in name else FEW_DENSE
        if not name.startswith("ssd"):
            options |= {"min_size": side, "max_size": side}
    if name.startswith("vit"):
        options["image_size"] = side
    if name in ("googlenet", "inception_v3"):
        # Another library would draw them for minutes; the other heads are for training alone.
        options |= {"init_weights": False, "aux_logits": False}
    with Constant():
        net = models.get_model(name, weights=None, **options).eval()
    torch.manual_seed(0)
    count = 2 if kind == "optical flow" else 1
    inputs = tuple(torch.rand(1, 3, side, side) for _ in range(count))
    return Tensors(net, kind == "detection").eval(), inputs


def resident(what: str) -> int:
    """Bytes of this process that are in memory: now (`VmRSS`) or at most (`VmHWM`)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if what in x)
    return int(line.split()[1]) * 1024


def row(name: str, onnx: bool) -> dict[str, Any]:
    """One network, in a process of its own."""
    first = Tensors(models.mobilenet_v2().eval(), False)  # what is loaded once counts for none
    map_of(first, lambda m, dtype: m(torch.rand(1, 3, 32, 32, dtype=dtype)))
    del first
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed counts as free
    before = resident("VmRSS")
    whole, inputs = build(name)
    own = sum(x.numel() * x.element_size() for x in whole.state_dict().values())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    peak: list[int] = []
    made, small = halved(whole, inputs, lambda: peak.append(resident("VmHWM") - before))
    made |= {"kind": KIND[name], "px": inputs[0].shape[-1], "bytes": own, "peak": peak[0]}
    made["again"] = the_same(whole, small, inputs)
    if not onnx:
        return made | {"onnx": None, "why": "not tried"}
    net, given = small.net.float(), tuple(inputs)
    del whole, small
    if KIND[name] == "detection":
        # Of three sizes, as pyramids give them to their levels.
        boxes = [[3.0, 5, 40, 50], [20.0, 10, 120, 127], [0.0, 0, 128, 100]]
        net, given = Heads(net.net).eval(), (*inputs, torch.tensor(boxes))  # type: ignore[arg-type]
    return made | exported(net, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(KIND))
    parser.add_argument("--no-onnx", action="store_true", help="do not export")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def made(name: str) -> dict[str, Any]:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return pool.apply(tried, (row, name, not options.no_onnx))

    fill(STORE, options.names, made, table)


def table(store: dict[str, Any]) -> None:
    """All rows."""
    parts = (__doc__ or "").split("\n\n")
    text = ["# Half of all channels out of every network of torchvision", ""]
    for part in parts[2:4]:
        text += [" ".join(part.split()), ""]
    text += [f"torch {torch.__version__.partition('+')[0]}, torchvision "
             f"{torchvision.__version__.partition('+')[0]}.", ""]  # fmt: skip
    text += ["| network | px | groups | left | parameters | off | onnx | again | s | memory |",
             "|---" * 10 + "|"]  # fmt: skip
    rows = [n for n in KIND if n in store]
    for name in rows:
        own = store[name]
        if "groups" not in own:
            text.append(f"| {name} | fails: {own['why']} |" + " |" * 8)
            continue
        onnx = f"{own['onnx']:.0e}" if own["onnx"] is not None else own["why"]
        cells = [name, own["px"], own["groups"], own["left"], f"{own['parameters']:.2f}",
                 f"{own['off']:.0e}", onnx, "yes" if own["again"] else "no",
                 f"{own['seconds']:.1f}",
                 f"{own['peak'] / own['bytes']:.1f} ({own['peak'] / 1e6:.0f})"]  # fmt: skip
        text.append("| " + " | ".join(map(str, cells)) + " |")
    good = [n for n in rows if store[n].get("off", 1) < 1e-3 and store[n].get("again")]
    fine = [n for n in good if (store[n].get("onnx") or 0 if "why" not in store[n] else 1) < 1e-2]
    text += ["", f"{len(rows)} networks: {len(good)} equal to their silenced selves, "
             f"{len(fine)} of these exported too."]  # fmt: skip
    STORE.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
