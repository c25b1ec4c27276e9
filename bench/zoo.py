"""Half of all channels taken out of every architecture at hand: does it hold?

    python bench/zoo.py [NAME ...]

Small random networks of the architectures in bench/zoo.toml, at 50 % of the units of every
group that `penjing inspect --groups` finds, with nothing said about any of them:

groups: that can go. Left: axes whose proof failed, so they stay; every other axis has its reason
    too. Parameters: of the smaller network over the whole one's.
off: the smaller network's output beside the whole one's with the weights at zero that read the
    removed units, on real random inputs, in float64, over what the removal changes.
onnx: the smaller network exported, and run by onnxruntime, beside torch (float32, largest
    difference over the largest output).
again: a fresh network with the same slices made and the weights loaded gives the same bytes.
s: of one processor, of finding the groups and proving them.

All rows are kept in bench/results/zoo.json, and the table beside it is written from all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from fits import HERE
from torch import Tensor, nn

from penjing.channelmap import ChannelMap, map_of
from penjing.coupling import Plan, drawn, remove, silence, slices
from penjing.recipe import Setting
from penjing.shapes import fresh

_LISTED = tomllib.loads((HERE / "zoo.toml").read_text())
IMAGES: dict[str, dict[str, Any]] = _LISTED["images"]
TEXTS: dict[str, dict[str, Any]] = _LISTED["texts"]
STORE = HERE / "results" / "zoo.json"
PAIRS = ("T5", "T5-gated", "BART", "Pegasus")  # encoder and decoder


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network in evaluation mode, and inputs."""
    options = dict((IMAGES | TEXTS)[name])
    own: type[Any] = getattr(transformers, options.pop("class"))
    if name == "UPerNet":
        options["backbone_config"] = transformers.ConvNextConfig(
            hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1],
            out_features=[f"stage{i}" for i in (1, 2, 3, 4)],
        )  # fmt: skip
    config = own.config_class(**options)
    config.use_cache = False
    torch.manual_seed(0)
    module = own(config).eval()
    inputs: dict[str, Tensor] = {}
    if name in IMAGES and name != "ImageGPT":
        size = options.get("image_size", 64)
        size = size if isinstance(size, int) else size[0]
        inputs["pixel_values"] = torch.randn(1, 3, size, size)
    else:
        length = {"CANINE": 128, "ImageGPT": 16}.get(name, 12)
        inputs["input_ids"] = torch.randint(5, 200, (1, length))
    if name in PAIRS:
        inputs["decoder_input_ids"] = torch.randint(5, 200, (1, 7))
    return module, inputs


class Outputs(nn.Module):
    """A network by position, with the tensors of its output alone."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        torch.manual_seed(0)  # some mask at random
        found = self.module(**given, return_dict=True)
        return tuple(x for x in found.values() if isinstance(x, Tensor))


def cast(inputs: Iterable[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def worst(found: list[Tensor], wanted: list[Tensor], over: list[Tensor]) -> float:
    """Largest difference of the outputs, each over the largest of another tensor."""
    off = 0.0
    for one, other, size in zip(found, wanted, over, strict=True):
        if one.is_floating_point():
            off = max(off, float((one - other).abs().max() / size.abs().max().clamp_min(1e-30)))
    return off


def row(name: str) -> dict[str, Any]:
    """One architecture."""
    module, inputs = build(name)
    whole = Outputs(module, list(inputs)).eval()
    made, small = halved(whole, tuple(inputs.values()))
    again = Outputs(build(name)[0], list(inputs)).eval()
    made["again"] = the_same(again, small, tuple(inputs.values()))
    return made | exported(small.net.float(), cast(inputs.values(), torch.float32))


@dataclass(frozen=True)
class Small:
    """A network without half of its units, how it became that, and what it gives."""

    net: nn.Module
    plans: list[Plan]
    known: list[Setting]
    outputs: list[Tensor]


def halved(
    whole: nn.Module, inputs: tuple[Tensor, ...], then: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], Small]:
    """A row of the table, and the smaller network with large random numbers.

    Args:
        then: called when the groups are found.
    """
    start = time.process_time()
    found = map_of(whole, lambda m, dtype: m(*cast(inputs, dtype)))
    seconds = time.process_time() - start
    then()
    plans: list[Plan] = [(f.group, list(range(0, f.group.count, 2))) for f in found.free]
    known = [s for f, (_, kept) in zip(found.free, plans, strict=True)
             for s in f.settings(len(list(kept)))]  # fmt: skip
    # Numbers that every channel is heard with, in the precision that all its operations have.
    large, was = drawn(whole, seed=1), [torch.tensor(torch.nan)]
    with contextlib.suppress(RuntimeError):
        was = list(large(*cast(inputs, torch.float64)))
    if not all(bool(torch.isfinite(x).all()) for x in was):
        large = drawn(whole, torch.float32, seed=1)
        was = list(large(*cast(inputs, torch.float32)))
    dtype = next(large.parameters()).dtype
    small = drawn(whole, dtype, seed=1)
    cuts = slices(small, plans)
    silence(large, plans)
    remove(small, plans, known)
    small = copy.deepcopy(small)  # each parameter with memory of its own, as when it is loaded
    wanted, got = (list(fresh(m)(*cast(inputs, dtype))) for m in (large, small))
    over = [a - b if a.shape == b.shape else b for a, b in zip(was, wanted, strict=True)]
    made = {
        "groups": len(found.free), "left": refused(found), "seconds": seconds,
        "parameters": sum(p.numel() for p in small.parameters())
        / sum(p.numel() for p in large.parameters()),
        "off": worst(got, wanted, over), "slices": len(cuts),
    }  # fmt: skip
    return made, Small(small, plans, known, got)


def the_same(again: nn.Module, small: Small, inputs: tuple[Tensor, ...]) -> bool:
    """Whether another network gives the same bytes, with the slices and the weights."""
    dtype = next(small.net.parameters()).dtype
    remove(again, small.plans, small.known)
    again.to(dtype).load_state_dict(small.net.state_dict())
    same = zip(again(*cast(inputs, dtype)), small.outputs, strict=True)
    return all(torch.equal(a, b) for a, b in same)


def refused(found: ChannelMap) -> int:
    """Axes that looked free, and whose proof failed."""
    why = ("the network does not run", "without them it gives")
    return sum(f.reason.startswith(why) for f in found.frozen)


def exported(small: nn.Module, given: tuple[Tensor, ...]) -> dict[str, Any]:
    """What onnxruntime gives of the exported network, beside torch."""
    for part in small.modules():
        # Of the ways to run experts the one that a graph can hold.
        config = getattr(part, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "batched_mm"
    wanted = list(fresh(small)(*given))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        names = [f"x{i}" for i in range(len(given))]
        try:
            torch.onnx.export(small, given, path, input_names=names, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)}
            found = [torch.from_numpy(np.asarray(x)) for x in session.run(None, feeds)]
        except Exception as error:  # the exporter's or the runtime's own: said in the table
            return {
                "onnx": None,
                "why": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:90],
            }
    return {"onnx": worst(found, wanted, wanted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*IMAGES, *TEXTS])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    fill(STORE, options.names, lambda name: tried(row, name), table)


def tried(make: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """A row of a table, or why there is none: it is not the end of it."""
    try:
        with torch.no_grad():
            return make(*given)
    except Exception as error:
        traceback.print_exc()
        return {"why": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:90]}


def fill(
    path: Path, names: Iterable[str], make: Callable[[str], dict[str, Any]],
    table: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """Rows, each kept as soon as it is made, and the table of all that were ever made."""
    for name in names:
        made = make(name)
        print(name, made, file=sys.stderr, flush=True)
        store: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        store[name] = made
        path.write_text(json.dumps(store, indent=1) + "\n")
        table(store)


def table(store: dict[str, Any]) -> None:
    """All rows."""
    parts = (__doc__ or "").split("\n\n")
    text = ["# Half of all channels out of every architecture", ""]
    for part in parts[2:4]:
        text += [" ".join(part.split()), ""]
    text += ["| network | groups | left | parameters | off | onnx | again | s |", "|---" * 8 + "|"]
    rows = [n for n in (*IMAGES, *TEXTS) if n in store]
    for name in rows:
        own = store[name]
        if "groups" not in own:
            text.append(f"| {name} | fails: {own['why']} | | | | | | |")
            continue
        onnx = f"{own['onnx']:.0e}" if own["onnx"] is not None else own["why"]
        again = "yes" if own["again"] else "no"
        cells = [name, own["groups"], own["left"], f"{own['parameters']:.2f}", f"{own['off']:.0e}",
                 onnx, again, f"{own['seconds']:.1f}"]  # fmt: skip
        text.append("| " + " | ".join(map(str, cells)) + " |")
    good = [n for n in rows if store[n].get("off", 1) < 1e-4 and store[n].get("again")]
    fine = [n for n in good if (store[n].get("onnx") or 0 if "why" not in store[n] else 1) < 1e-2]
    text += ["", f"{len(rows)} networks: {len(good)} equal to their silenced selves, "
             f"{len(fine)} of these exported too; "
             f"{sum(not store[n].get('groups') for n in good)} of them have no channel that can "
             "go."]  # fmt: skip
    STORE.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
