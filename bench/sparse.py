"""Where sparse weights run faster on this processor, and how small their files are.

    python bench/sparse.py [kernels] [networks] [sizes]

Kernels: one linear layer of MiniLM-L6 with random weights on 1, 128 and 4,096 rows of inputs. The
same runtime with dense weights is 1.00; a number is the median over interleaved rounds of the dense
time over the row's, one thread; in brackets against onnxruntime's dense float32 product instead.
CSR and BSR are torch's compressed rows and square blocks (its products go to MKL, which has no
others); inputs are given to them as columns, which is the faster way. OpenVINO runs with
CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE at 0.4: weights with more zeros may be stored compressed.

Networks: all linear layers of MiniLM-L6 (10.6 M of 22.6 M weights) pruned by magnitude, 1 x 128
tokens, against the dense network in the same runtime and run. int8 is `quantize --activations 8`.

Sizes: MB of the same networks' weights, and of the pruned layers alone. `artifact`: `weights/` as
penjing writes it, all else in float32; `dense`: the same with every zero stored. `deflate` (level
6) and `zstd` (level 3): the dense file packed by a general tool. `float16`: what bits and values of
half-precision weights would take; artifacts hold float32. Rows with bits: `quantize --method rtn`
after it, 4 bits in groups of 32.

All parts are kept in bench/results/sparse.json and the tables beside it are written from them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pyarrow
import torch
from fits import HERE
from onnx import helper, numpy_helper
from quantization import ENCODER
from safetensors.numpy import load_file
from torch import Tensor, nn

import penjing
from penjing import bitmask
from penjing.apply import apply
from penjing.demo import minilm
from penjing.masks import Pattern
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.registry import lookup
from penjing.steps.prune import Prune
from penjing.steps.quantize import Quantize
from penjing.writers.artifact import save

STORE = HERE / "results" / "sparse.json"
LAYERS = ((1536, 384), (384, 1536))  # out, in
ROWS = {1: 60, 128: 40, 4096: 12}  # rows of inputs: rounds
PATTERNS = {
    "50 %": Pattern(0.5), "70 %": Pattern(0.7), "90 %": Pattern(0.9), "2:4": Pattern(0.5, 2, 4),
    "50 % 1x4": Pattern(0.5, block=(1, 4)), "50 % 4x4": Pattern(0.5, block=(4, 4)),
    "70 % 4x4": Pattern(0.7, block=(4, 4)), "90 % 4x4": Pattern(0.9, block=(4, 4)),
    "50 % 16x16": Pattern(0.5, block=(16, 16)), "70 % 16x16": Pattern(0.7, block=(16, 16)),
    "90 % 16x16": Pattern(0.9, block=(16, 16)),
}  # fmt: skip
FILES = ("50 %", "70 %", "90 %", "2:4", "50 % 1x4")  # of PATTERNS, for runtimes' own files
OPENVINO = {
    "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1,
}  # fmt: skip
SPARSE = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": "0.4"}
Runs = dict[str, Callable[[], Any]]


def interleaved(runs: Runs, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, all in every round in another order; the first rounds warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    random = np.random.default_rng(0)
    with torch.inference_mode():
        for number in range(rounds + 3):
            for name in random.permutation(list(runs)):
                run = runs[name]
                start = time.perf_counter()
                run()
                if number >= 3:
                    found[name].append(time.perf_counter() - start)
    return found


def ratio(before: list[float], after: list[float]) -> float:
    return float(np.median(np.array(before) / np.array(after)))


# --- kernels ----------------------------------------------------------------------------------


def onnx_product(weight: Tensor) -> onnxruntime.InferenceSession:
    out, inputs = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, inputs])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, out])],
        [numpy_helper.from_array(weight.T.contiguous().numpy(), "w")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return session(proto.SerializeToString())


def onnx_bytes(weight: Tensor) -> onnxruntime.InferenceSession:
    """The same in 8 bits, of the inputs as they come."""
    out, inputs = weight.shape
    scale = weight.abs().amax(1) / 127  # [out]
    codes = (weight / scale[:, None]).round().to(torch.int8)
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")],
        "layer", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, inputs])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, out])],
        [numpy_helper.from_array(codes.T.contiguous().numpy(), "w"),
         numpy_helper.from_array(scale.numpy(), "s")],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    made = session(helper.make_model(graph, opset_imports=sets, ir_version=11).SerializeToString())
    x = torch.randn(4, inputs)
    got = torch.from_numpy(made.run(None, {"x": x.numpy()})[0])
    assert float((got - x @ weight.T).norm() / got.norm()) < 0.05
    return made


def session(source: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def openvino_product(weight: Tensor, options: dict[str, Any]) -> openvino.InferRequest:
    from openvino import opset13 as ops

    x = ops.parameter([-1, weight.shape[1]], np.float32)
    y = ops.matmul(x, ops.constant(weight.numpy()), False, True)
    model = openvino.Model([y], [x])
    return openvino.Core().compile_model(model, "CPU", options).create_infer_request()


def products(weight: Tensor, rows: int) -> Runs:
    """Every way to multiply `rows` inputs by a weight, by `runtime|pattern`."""
    torch.manual_seed(1)
    x = torch.randn(rows, weight.shape[1])
    columns, array = x.T.contiguous(), x.numpy()
    runs: Runs = {}

    def add(name: str, sparse: Tensor) -> None:
        one, two = onnx_product(sparse), openvino_product(sparse, {**OPENVINO, **SPARSE})
        runs[f"onnxruntime|{name}"] = lambda: one.run(None, {"x": array})
        runs[f"openvino|{name}"] = lambda: two.infer({0: array}, share_inputs=True)

    add("dense", weight)
    eight = onnx_bytes(weight)
    runs["onnxruntime|dense in 8 bits"] = lambda: eight.run(None, {"x": array})
    runs["torch|dense"] = lambda: nn.functional.linear(x, weight)
    for name, pattern in PATTERNS.items():
        sparse = weight * pattern.mask(weight.abs())
        if name in FILES:
            add(name, sparse)
        if pattern.block == (1, 1):
            rows_of = sparse.to_sparse_csr()
            runs[f"torch CSR|{name}"] = lambda w=rows_of: w @ columns
        elif pattern.block[0] == pattern.block[1]:
            blocks = sparse.to_sparse_bsr(pattern.block)
            runs[f"torch BSR|{name}"] = lambda w=blocks: w @ columns
            torch.testing.assert_close((blocks @ columns).T, x @ sparse.T, rtol=1e-3, atol=1e-2)
    return runs


def kernels() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for out, inputs in LAYERS:
        torch.manual_seed(0)
        weight = torch.randn(out, inputs)
        for rows, rounds in ROWS.items():
            times = interleaved(products(weight, rows), rounds)
            for name, own in times.items():
                runtime, case = name.split("|")[0].split()[0], f"{rows} x {inputs} x {out}"
                dense = (times[f"{one}|dense"] for one in (runtime, "onnxruntime"))
                cell = [ratio(before, own) for before in dense]
                found.setdefault(name, {})[case] = cell
                print(f"{case} {name:28s} {cell[0]:.2f} {cell[1]:.2f}", flush=True)
    return found


# --- networks ---------------------------------------------------------------------------------


def pruned(model: Model, name: str) -> Model:
    pattern = PATTERNS[name]
    text = "x".join(map(str, pattern.block)) if not pattern.of else str(pattern)
    step = Prune(pattern.sparsity, "magnitude", text, targets=ENCODER)
    return apply(model, Recipe((step,))).model


class Blocks(nn.Module):
    """A linear layer whose weight torch holds in blocks."""

    def __init__(self, layer: nn.Linear, block: tuple[int, int]) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.detach().to_sparse_bsr(block), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = (self.weight @ x.reshape(-1, x.shape[-1]).T.contiguous()).T  # [rows, out]
        return (flat + self.bias).reshape(*x.shape[:-1], -1)


def in_blocks(model: Model, block: tuple[int, int]) -> Model:
    for name in model.masks:
        path, _, last = name.rpartition(".weight")[0].rpartition(".")
        setattr(model.module.get_submodule(path), last,
                Blocks(model.module.get_submodule(f"{path}.{last}"), block))  # fmt: skip
    return model


def networks() -> dict[str, Any]:
    model = penjing.load(str(minilm()))
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(1000, 30000, (1, 128)),
             "attention_mask": torch.ones(1, 128, dtype=torch.long)}  # fmt: skip
    batch |= {n: torch.zeros(1, 128, dtype=torch.long) for n in model.example if n not in batch}
    arrays = {name: x.numpy() for name, x in batch.items()}
    runs: Runs = {}
    with tempfile.TemporaryDirectory() as work:
        for name in ("dense", *FILES):
            made = model if name == "dense" else pruned(model, name)
            place = Path(work) / name.replace(" ", "").replace(":", "-")
            for kind in ("float32", "int8"):
                folder = place.with_name(f"{place.name}-{kind}")
                folder.mkdir()
                if kind == "int8":
                    step = Quantize(8, 0, "rtn", True, activations=8, dynamic=True)
                    made = apply(made, Recipe((step,))).model
                for writer, target in (("onnx", "model.onnx"), ("openvino", "openvino")):
                    lookup("writers", writer, "write")(made, folder / target)
                one = session(str(folder / "model.onnx"))
                path = folder / "openvino" / "model.xml"
                compiled = openvino.Core().compile_model(path, "CPU", {**OPENVINO, **SPARSE})
                two = compiled.create_infer_request()
                given = {p.name: arrays[p.name] for p in one.get_inputs()}
                runs[f"onnxruntime {kind}|{name}"] = lambda s=one, g=given: s.run(None, g)
                runs[f"openvino {kind}|{name}"] = lambda r=two: r.infer(arrays, share_inputs=True)
        runs["torch float32|dense"] = lambda: model.run(batch)
        for name in (n for n in PATTERNS if PATTERNS[n].block[0] > 1):
            twin = in_blocks(pruned(model, name), PATTERNS[name].block)
            runs[f"torch float32|{name}"] = lambda m=twin: m.run(batch)
        times = interleaved(runs, 40)
    found: dict[str, Any] = {}
    for name, own in times.items():
        dense = (times[f"{one}|dense"] for one in (name.split("|")[0], "onnxruntime float32"))
        found[name] = [1e3 * float(np.median(own)), *(ratio(before, own) for before in dense)]
        print(f"{name:34s}", " ".join(f"{x:.2f}" for x in found[name]), flush=True)
    return found


# --- sizes ------------------------------------------------------------------------------------


def sizes() -> dict[str, Any]:
    model = penjing.load(str(minilm()))
    made = {name: pruned(model, name) for name in (*FILES, "90 % 4x4")}
    for name in ("50 %", "70 %"):
        for bits in (8, 4):
            step = Quantize(bits, 0 if bits == 8 else 32, "rtn", targets=ENCODER)
            made[f"{name}, {bits} bits"] = apply(made[name], Recipe((step,))).model
    found = {}
    for name, one in made.items():
        masks = dict(one.masks)
        own, layers = stored(one, masks)
        one.masks.clear()
        data, numbers = stored(one, masks)
        row = {"dense": len(data), "artifact": len(own), "layers": len(numbers)}
        row["bits and values"] = len(layers)
        for kind, content in (("", data), ("layers ", numbers)):
            row[f"{kind}deflate"] = len(zlib.compress(content, 6))
            row[f"{kind}zstd"] = len(pyarrow.Codec("zstd", 3).compress(content))
        if not one.planes:
            halves = (one.module.get_parameter(n).detach().half() for n in masks)
            row["float16"] = sum(bitmask.stored_bytes(weight) for weight in halves)
        found[name] = row
        print(name, row, flush=True)
    return found


def stored(model: Model, names: Iterable[str]) -> tuple[bytes, bytes]:
    """The files of an artifact's weights, and the numbers in them of `names`."""
    with tempfile.TemporaryDirectory() as work:
        save(model, Path(work) / "out")
        paths = sorted((Path(work) / "out" / "weights").iterdir())
        data = b"".join(path.read_bytes() for path in paths)
        own = (pair for path in paths for pair in sorted(load_file(path).items()))
        chosen = [t.tobytes() for name, t in own if name.partition("::")[0] in names]
    return data, b"".join(chosen)


# --- tables -----------------------------------------------------------------------------------


def table(store: dict[str, Any]) -> None:
    parts = [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")]
    able = torch.cpu.get_capabilities()
    flags = [f"{n} {'yes' if able.get(n) else 'no'}" for n in ("avx2", "avx512_vnni", "amx_int8")]
    loads = [f"{load:.1f} ({name})" for name, load in store["load"].items() if name != "sizes"]
    text = ["# Sparse weights", "", f"Processor: {', '.join(flags)}; {os.cpu_count()} cores, which "
            f"other work shared: average load {', '.join(loads)}.", ""]  # fmt: skip
    if found := store.get("kernels"):
        cases = list(next(iter(found.values())))
        text += ["## Kernels", "", parts[2], "", "| | " + " | ".join(cases) + " |"]
        text += ["|---" * (len(cases) + 1) + "|"]
        for name, row in found.items():
            cells = [f"{row[c][0]:.2f}" for c in cases]
            if name.startswith("torch"):
                cells = [f"{row[c][0]:.2f} ({row[c][1]:.2f})" for c in cases]
            text.append(f"| {name.replace('|', ', ')} | {' | '.join(cells)} |")
        text.append("")
    if found := store.get("networks"):
        text += ["## Networks", "", parts[3], ""]
        text += ["| | ms | of dense | of onnxruntime's float32, dense |", "|---|---|---|---|"]
        for name, (ms, dense, best) in found.items():
            text.append(f"| {name.replace('|', ', ')} | {ms:.2f} | {dense:.2f} | {best:.2f} |")
        text.append("")
    if found := store.get("sizes"):
        text += ["## Sizes", "", parts[4]]
        keys = ("dense", "artifact", "deflate", "zstd", "layers", "bits and values",
                "layers deflate", "layers zstd", "float16")  # fmt: skip
        text += ["", f"| | {' | '.join(keys)} |", "|---" * 10 + "|"]
        for name, row in found.items():
            cells = [f"{row[k] / 1e6:.1f}" if k in row else "" for k in keys]
            text.append(f"| {name} | {' | '.join(cells)} |")
        text.append("")
    STORE.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")


def main() -> None:
    warnings.simplefilter("ignore")  # torch's sparse layouts are in beta
    torch.set_num_threads(1)
    store: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    for part in (kernels, networks, sizes):
        if part.__name__ in (sys.argv[1:] or ["kernels", "networks", "sizes"]):
            store[part.__name__] = part()
            store.setdefault("load", {})[part.__name__] = os.getloadavg()[0]
            STORE.write_text(json.dumps(store, indent=1) + "\n")
            table(store)


if __name__ == "__main__":
    main()
