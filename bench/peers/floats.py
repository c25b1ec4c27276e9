"""What the scripts of bench/smollm2.py have in common: a network in, float weights out.

    python SCRIPT FOLDER IDS.npy OUT.safetensors '{"bits": 4, "group": 64, ...}'

FOLDER is a Hugging Face folder, IDS the calibration tokens [windows, length]. OUT gets the linear
layers of the blocks as they are after quantization, in float32. The last line printed is JSON:
version, stored bits a weight, seconds of quantizing (elapsed and of processors) and the
process's peak memory in MB.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# Weights by path, and stored bits of each.
Made = tuple[dict[str, Tensor], float]


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by path."""
    found = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and ".layers." in path:
            found[path] = layer
    return found


def network(folder: str) -> nn.Module:
    """The network, float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run(tool: str, load: Callable[[str], Any],
        quantize: Callable[[Any, Tensor, dict[str, Any]], Made]) -> None:  # fmt: skip
    """Load, quantize, write, and print what it cost."""
    folder, ids, out, options = sys.argv[1:]
    model = load(folder)
    tokens = torch.from_numpy(np.load(ids))
    start, before = time.monotonic(), time.process_time()
    weights, bits = quantize(model, tokens, json.loads(options))
    seconds, spent = time.monotonic() - start, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {n: w.detach().float().contiguous() for n, w in weights.items()}
    save_file(found, Path(out))
    print(json.dumps({
        "version": version(tool), "torch": torch.__version__, "bits": bits, "seconds": seconds,
        "cpu_seconds": spent, "peak_mb": peak,
    }))  # fmt: skip
