"""SmolLM2-135M in 4, 3 and 2 bits, beside HQQ, GPTQModel, llm-compressor and AutoRound.

    python bench/smollm2.py [--missing] [ROW ...]

All linear layers of the blocks (106.2 M weights); tables and the output layer stay as they are.
The network left its package's 4-bit grid before (bench/smollm2_fixture.py). Calibration: 64
windows of 256 tokens, half of State of the Union speeches, half of BBC News, the same for all.
Evaluation: 208 windows of 128 tokens of other speeches (dealt out by seed, whole). Increase: mean
negative log-likelihood of the next token above the float network's, in nats, with the 95 %
interval of a bootstrap over the windows; every row's weights are run in float32 in this process.
Stored bits count codes, scales in 16 bits and zero points as each stores them. One thread.

A row is made in a process of its own: Penjing's in this environment, a peer's in one that is made
for it (with `python -m venv`) in the cache folder. Seconds are those of quantizing alone: elapsed,
and of processors, which a busy machine does not change much.

All rows are kept in bench/results/smollm2.json and the table beside it is written from all of
them; with ROW only the row of that name is made, or those whose names
contain it, with --missing only new ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fits import CACHE, HERE
from safetensors.torch import load_file
from smollm2_fixture import PACKAGE, WINDOWS, base, fixture, linears, losses
from transformers import AutoModelForCausalLM

from penjing.statistics import paired_bootstrap

STORE = HERE / "results" / "smollm2.json"
TORCH = "torch==2.13.0"
# What is installed for a peer, one call of pip a line; its script is bench/peers/NAME_floats.py.
PEERS = {
    "hqq": ["hqq==0.2.8.post1 transformers==5.24.0"],
    "gptqmodel": [
        "accelerate==1.15.0 datasets==5.2.0 defuser==0.0.28 device-smi==0.5.7 dill==0.4.1 "
        "jinja2==3.1.6 logbar==0.4.15 ninja==1.13.2 numpy==2.4.6 packaging==26.4 pillow==13.0.0 "
        "protobuf==7.36.2 pypcre==0.6.4 requests==2.34.2 threadpoolctl==3.8.0 tokenicer==0.0.14 "
        "torchao==0.18.0 transformers==5.24.0",
        "--no-deps gptqmodel==7.7.0",  # it asks for a newer torch, and runs with this one
    ],
    "llmcompressor": ["llmcompressor==0.14.0.1 transformers==5.17.0"],
    "autoround": ["auto-round==0.16.1 transformers==5.24.0"],
}


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """Tool and options by name."""
    made: dict[str, tuple[str, dict[str, Any]]] = {}
    for bits in (4, 3, 2):
        same = {"bits": bits, "group": 64}
        made[f"{bits} bits, penjing gptq"] = "penjing", same
        made[f"{bits} bits, penjing gptq, refined"] = "penjing", same | {"refine": 64}
        made[f"{bits} bits, penjing gptq, rotated"] = "penjing", same | {"rotate": True}
        if bits == 2:
            lattice = {"bits": 2, "group": 0, "codes": "e8", "rotate": True}
            made["2 bits, penjing e8 a row, rotated"] = "penjing", lattice
        if bits < 4:
            walk = {"bits": bits, "group": 0, "codes": "trellis", "rotate": True}
            made[f"{bits} bits, penjing trellis a row, rotated"] = "penjing", walk
            refined = walk | {"refine": 64}
            made[f"{bits} bits, penjing trellis a row, rotated, refined"] = "penjing", refined
        for axis in (1, 0):
            made[f"{bits} bits, hqq, axis {axis}"] = "hqq", same | {"axis": axis}
        for observer in ("memoryless_minmax", "memoryless_mse"):
            options = same | {"symmetric": False, "observer": observer}
            name = observer.removeprefix("memoryless_")
            made[f"{bits} bits, llm-compressor gptq, {name}"] = "llmcompressor", options
        for mse in (0.0, 2.0):
            options = same | {"symmetric": False, "mse": mse}
            made[f"{bits} bits, gptqmodel gptq, {'mse' if mse else 'minmax'}"] = (
                "gptqmodel",
                options,
            )
        light = same | {"symmetric": False, "iters": 50, "lr": 5e-3, "batch": 8}
        made[f"{bits} bits, autoround, 50 iterations"] = "autoround", light
        whole = light | {"iters": 200, "lr": None}
        made[f"{bits} bits, autoround, 200 iterations"] = "autoround", whole
    return made


def interpreter(tool: str) -> str:
    """The Python of a tool; a peer's environment is made at its first use."""
    if tool == "penjing":
        return sys.executable
    folder = CACHE / "peers" / tool
    python = folder / "bin" / "python"
    if not (folder / "whole").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # torch first, and held: a peer's own choice of it may come with CUDA.
        for wanted in ("", *PEERS[tool]):
            command = [str(python), "-m", "pip", "install", "-q", TORCH, *wanted.split()]
            subprocess.run(command, check=True)
        (folder / "whole").touch()
    return str(python)


def make(tool: str, options: dict[str, Any], folder: Path, out: Path) -> dict[str, Any] | None:
    """Write a row's weights; what it cost, or None where the tool failed, with its last words."""
    script = HERE / "peers" / f"{tool}_floats.py"
    command = [interpreter(tool), str(script), str(folder), str(WINDOWS / "calibration.npy")]
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if tool != "penjing":
        own["PYTHONPATH"] = ""
    ran = subprocess.run(
        [*command, str(out), json.dumps(options)], env=os.environ | own, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        print(f"{tool} {options}: failed\n{ran.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--missing", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, _ = fixture()
    ids = np.load(WINDOWS / "evaluation.npy")
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    floats = {name: own.detach().clone() for name, own in module.named_parameters()}
    for name, (tool, chosen) in rows().items():
        store = kept()
        if options.rows and not any(
            name == word if word in rows() else word in name for word in options.rows
        ):
            continue
        if options.missing and name in store:
            continue
        out = CACHE / f"smollm2-{os.getpid()}.safetensors"
        found = make(tool, chosen, folder, out)
        if found is None:
            continue
        weights = load_file(out)
        out.unlink()
        if any(f"{path}.weight" not in weights for path in linears(module)):
            print(f"{name}: not all layers were quantized", file=sys.stderr)
            continue
        with torch.no_grad():
            for path, before in floats.items():
                module.get_parameter(path).copy_(weights.get(path, before))
        found["losses"] = [round(float(x), 5) for x in losses(module, ids)]
        store = kept() | {name: found}  # two runs may each make some of the rows
        beside = STORE.with_suffix(f".{os.getpid()}")
        beside.write_text(
            "{\n"
            + ",\n".join(f"{json.dumps(n)}: {json.dumps(r)}" for n, r in store.items())
            + "\n}\n"
        )
        beside.replace(STORE)
        table(store)
        print(name, *said(found), sep="  ", flush=True)


def kept() -> dict[str, Any]:
    """All rows that were made."""
    found: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    return found


def increase(pairs: np.ndarray) -> float:
    """Mean increase of rows [row's loss, float network's loss]."""
    return float((pairs[:, 0] - pairs[:, 1]).mean())


def pairs(row: dict[str, Any]) -> np.ndarray:
    return np.stack([np.array(row["losses"]), base()], 1)


def said(row: dict[str, Any]) -> list[str]:
    """Stored bits, increase, perplexity, seconds, processors' seconds and memory."""
    mine = pairs(row)
    nothing = np.stack([mine[:, 1]] * 2, 1)
    value, low, high = paired_bootstrap(
        nothing, mine, increase, relative=False, higher_is_better=False
    )
    return [
        f"{row['bits']:.2f}", f"{value:.4f} [{low:.4f}, {high:.4f}]",
        f"{np.exp(mine[:, 0].mean()):.2f}", f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}",
        f"{row['peak_mb']:.0f}",
    ]  # fmt: skip


def share(row: dict[str, Any], other: dict[str, Any]) -> str:
    """A row's increase over another's, with its interval."""
    value, low, high = (
        1 + x
        for x in paired_bootstrap(
            pairs(other), pairs(row), increase, relative=True, higher_is_better=False
        )
    )
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def table(store: dict[str, Any]) -> None:
    """All rows, in the order of `rows`."""
    parts = (__doc__ or "").split("\n\n")
    about = fixture()[1]
    before, after = (float(np.exp(base(f).mean())) for f in (PACKAGE, fixture()[0]))
    text = ["# SmolLM2-135M in 4, 3 and 2 bits", "", parts[2].replace("\n", " "), ""]
    text += [parts[3].replace("\n", " "), ""]
    text += [
        f"Off the grid: rounding to the package's kind of grid has a relative error of "
        f"{about['round trip before']:.4f} before, {about['round trip after']:.4f} after, and "
        f"{about['round trip of a Gaussian']:.4f} on a Gaussian matrix; perplexity of the "
        f"evaluation text {before:.2f} before, {after:.2f} after.", "",
    ]  # fmt: skip
    versions = {f"{rows()[n][0]} {r['version']} (torch {r['torch']})"
                for n, r in store.items() if n in rows()}  # fmt: skip
    text += ["; ".join(sorted(versions)) + ".", ""]
    text += [
        "| row | stored bits | increase | perplexity | of penjing gptq's increase "
        "| s | s of processors | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in rows() if name in store):
        own = store.get(f"{name[:6]}, penjing gptq")
        cells = said(store[name])
        cells.insert(3, share(store[name], own) if own else "")
        text.append(f"| {name} | {' | '.join(cells)} |")
    STORE.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
