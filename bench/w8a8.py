"""MiniLM-L6 in 8-bit weights and activations, beside NNCF's int8 and onnxruntime's own.

    python bench/w8a8.py [--peers PYTHON] [--seconds S] [ROW ...]

Calibration: 1,200 sentences of speeches, news and definitions, the same for all; evaluation: 1,200
sentences about movies (both as in bench/quantization.py). Error: 1 - cosine to the float32
embedding of torch, mean over the sentences run through the exported file, with its 95 % interval.
Speed: median over interleaved rounds of float32's latency over the row's, in the same runtime and
run, one thread. `tables` are the embeddings; without it Penjing leaves them in float32, the peers
have them in 8 bits, but for the row of weight matrices alone. `auto`: each range is that of the
observer whose grid changes the layer's output least. `attention`: queries and keys in 8 bits too,
as NNCF has them; for OpenVINO alone.

`--peers` is the interpreter that has nncf and openvino; without it NNCF's rows are left out.
`--seconds` is how long each timing takes, 0 for none. With ROW only the row of that name is made,
or those whose names contain it. All rows are kept in bench/results/w8a8-minilm.json, of
processors that add byte products exactly in w8a8-minilm-vnni.json, and the table beside it is
written from them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fits import CACHE, HERE
from quantization import sentences
from torch import Tensor

import penjing
from penjing.apply import apply
from penjing.demo import minilm
from penjing.measure import Candidate, measure_files, median_ratio, stored_size
from penjing.model import Batch, Model
from penjing.processor import weight_bits
from penjing.recipe import Recipe
from penjing.registry import lookup
from penjing.steps.attention import Attention
from penjing.steps.quantize import Quantize

RUNTIMES = {"onnxruntime": ("onnx", ".onnx"), "openvino": ("openvino", "")}
SHAPES = ((32, 128), (1, 128))  # batch, length
WORK = CACHE / "w8a8"
STORE = HERE / "results" / f"w8a8-minilm{'-vnni' if weight_bits() == 8 else ''}.json"


def steps() -> dict[str, tuple[Any, ...]]:
    """Penjing's rows; float32 has no step."""
    plain: dict[str, Any] = {"bits": 8, "symmetric": True, "activations": 8}
    plain["paired"] = weight_bits() < 8  # exact where byte products are added in 16 bits
    best = Quantize(embeddings=8, observer="auto", **plain)
    return {
        "float32": (),
        "penjing rtn": (Quantize(method="rtn", **plain),),
        "penjing gptq": (Quantize(**plain),),
        "penjing gptq, tables": (Quantize(embeddings=8, **plain),),
        "penjing gptq, tables, auto": (best,),
        "penjing gptq, tables, auto, attention": (best, Attention()),
    }


def peers() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Rows of others: runtime, script and options."""
    static: dict[str, Any] = {"reduce_range": weight_bits() == 7}
    channels = static | {"per_channel": True, "activation_type": "QUInt8"}
    matrices = channels | {
        "op_types_to_quantize": ["MatMul", "Gemm"], "extra_options": {"MatMulConstBOnly": True},
    }  # fmt: skip
    made = {
        "nncf": ("openvino", "nncf_int8.py", {}),
        "nncf, overflow fix": ("openvino", "nncf_int8.py", {"overflow_fix": "enable"}),
        "nncf, overflow fix, full bias correction": (
            "openvino", "nncf_int8.py", {"overflow_fix": "enable", "fast_bias_correction": False},
        ),
        "quantize_static": ("onnxruntime", "ort_static.py", static),
    }  # fmt: skip
    for method in ("MinMax", "Entropy", "Percentile"):
        how = {"calibrate_method": method}
        about = f"quantize_static per channel, {method.lower()}"
        made[about] = ("onnxruntime", "ort_static.py", channels | how)
        made[f"{about}, weight matrices alone"] = (
            "onnxruntime", "ort_static.py", matrices | how,
        )  # fmt: skip
    return made


def place(name: str, runtime: str) -> Path:
    """Where a row's file is."""
    return WORK / f"{name.replace(', ', '-').replace(' ', '-')}-{runtime}{RUNTIMES[runtime][1]}"


def samples(data: list[Batch]) -> Path:
    """Calibration sentences one by one without padding, for the peers' scripts."""
    path, found = WORK / "samples.npz", {}
    for batch in data:
        for row, mask in enumerate(batch["attention_mask"].bool()):
            number = len(found) // len(batch)
            for name, values in batch.items():
                found[f"{number}/{name}"] = values[row : row + 1, mask].numpy()
    np.savez(path, **found)
    return path


def errors(path: Path, runtime: str, data: list[Batch], wanted: Tensor) -> Tensor:
    """1 - cosine of every sentence, through the file."""
    session = lookup("runtimes", runtime, "open")(path, threads=1)
    outputs = [session.run({n: x.numpy() for n, x in batch.items()}) for batch in data]
    got = torch.from_numpy(np.concatenate(outputs))
    return 1 - torch.nn.functional.cosine_similarity(got.double(), wanted.double())


def build(model: Model, calibration: list[Batch], python: str | None,
          wanted: Callable[[str], bool]) -> Iterator[tuple[str, str, float]]:  # fmt: skip
    """Write the file of every wanted row: name, runtime and seconds it took."""
    for name, chosen in steps().items():
        if chosen and not wanted(name):
            continue
        start = time.monotonic()
        edited = apply(model, Recipe(chosen), calibration).model if chosen else model
        seconds = time.monotonic() - start
        for runtime, (writer, _) in RUNTIMES.items():
            if edited.outputs and runtime == "onnxruntime":
                continue
            lookup("writers", writer, "write")(edited, place(name, runtime))
            yield name, runtime, seconds
    data = samples(calibration)
    for name, (runtime, script, options) in peers().items():
        interpreter = python if runtime == "openvino" else sys.executable
        if interpreter is None or not wanted(name):
            continue
        source, out = place("float32", runtime), place(name, runtime)
        if runtime == "openvino":
            out.mkdir(exist_ok=True)
            source, out = source / "model.xml", out / "model.xml"
        command = [interpreter, str(HERE / "peers" / script), str(source), str(data), str(out)]
        start = time.monotonic()
        # A peer's own failure is said, and its row left out; the others are still worth having.
        ran = subprocess.run([*command, json.dumps(options)], stdout=subprocess.PIPE, check=False)
        if ran.returncode:
            print(f"{name}: failed, its row is left out", file=sys.stderr, flush=True)
            continue
        print(name, ran.stdout.decode().strip().splitlines()[-1], flush=True)
        yield name, runtime, time.monotonic() - start


def speeds(model: Model, names: list[tuple[str, str]], seconds: float) -> dict[str, list[float]]:
    """Times float32's speed of every file at each of `SHAPES`."""
    found: dict[str, list[float]] = {}
    for runtime in RUNTIMES:
        own = [name for name, where in names if where == runtime]
        files = [Candidate(place(name, runtime), runtime, 0, name) for name in own]
        for batch, length in SHAPES:
            timed = measure_files(
                files, model, batch=batch, length=length, threads=1, seconds=seconds
            )
            base = timed[own.index("float32")]
            for name, one in zip(own, timed, strict=True):
                found.setdefault(f"{name}|{runtime}", []).extend(
                    [one.measurement.latency_ms.median, median_ratio(base, one)]
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--peers")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    model = penjing.load(str(minilm()))
    calibration, data, reference = sentences(model)
    store: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}

    exact = steps().keys() | peers().keys()

    def wanted(name: str) -> bool:
        return not options.rows or any(
            name == word if word in exact else word in name for word in options.rows
        )

    made = []
    for name, runtime, seconds in build(model, calibration, options.peers, wanted):
        off = errors(place(name, runtime), runtime, data, reference)
        half = 1.96 * float(off.std()) / len(off) ** 0.5
        size = stored_size(place(name, runtime))
        row = {"error": float(off.mean()), "half": half, "bytes": size, "seconds": seconds}
        store[f"{name}|{runtime}"] = row
        made.append((name, runtime))
        STORE.write_text(json.dumps(store, indent=1) + "\n")
        table(store)
        print(f"{name:50s} {runtime:12s} {row['error']:.6f} +- {half:.6f}", flush=True)
    if options.seconds:
        for key, found in speeds(model, made, options.seconds).items():
            store[key]["speed"] = found
        STORE.write_text(json.dumps(store, indent=1) + "\n")
        table(store)


def flags() -> str:
    """What this processor has for products of bytes."""
    able = torch.cpu.get_capabilities()
    names = ("avx2", "avx512_f", "avx512_vnni", "avx_vnni", "amx_int8")
    return ", ".join(f"{name} {'yes' if able.get(name) else 'no'}" for name in names)


def table(store: dict[str, Any]) -> None:
    """All rows, runtime by runtime."""
    about = (__doc__ or "").split("\n\n")[2].replace("\n", " ")
    text = ["# MiniLM-L6 in 8-bit weights and activations", "", about, ""]
    kind = "paired" if weight_bits() < 8 else "plain"
    text += [f"Processor: {flags()}. Penjing's weights are {kind} 8 bits.", ""]
    for runtime in RUNTIMES:
        names = [n for n in (*steps(), *peers()) if f"{n}|{runtime}" in store]
        text += [f"## {runtime}", ""]
        if runtime == "openvino" and not any(n.startswith("nncf") for n in names):
            text += ["NNCF was not at hand (`--peers`): its rows are left out.", ""]
        shapes = [f"ms, {b} x {n} | times float32" for b, n in SHAPES]
        text += ["| row | error, 95 % interval | MB | " + " | ".join(shapes) + " | s |"]
        text += ["|---|---|---|" + "---|---|" * len(SHAPES) + "---|"]
        for name in names:
            row = store[f"{name}|{runtime}"]
            speed = row.get("speed", [None] * 2 * len(SHAPES))
            cells = ["" if x is None else f"{x:.2f}" for x in speed]
            error = f"{row['error']:.6f} ± {row['half']:.6f}"
            text.append(
                f"| {name} | {error} | {row['bytes'] / 1e6:.1f} | {' | '.join(cells)} "
                f"| {row['seconds']:.0f} |"
            )
        text.append("")
    STORE.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")


if __name__ == "__main__":
    main()
