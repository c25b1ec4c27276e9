"""What tune costs by itself, and what it finds on MiniLM-L6; writes bench/results/tune.md.

    python bench/tune.py [overhead] [minilm] [--within 8m]

overhead: 200 trials of a cost that does nothing, in three dimensions, with the journal synced after
each; by one and by two objectives. minilm: how the step `quantize` is best set without its costly
methods, by fidelity to the original and size, on sentences of the calibration kinds (speeches,
news, glosses); figures are on those that no trial saw.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fits import HERE
from quantization import drawn, glosses, news, speeches

import penjing
from penjing.demo import minilm
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize
from penjing.tune.records import Journal, Outcome, Record
from penjing.tune.search import search
from penjing.tune.space import parse
from penjing.units import parse_time

STORE = HERE / "results" / "tune.json"
TRIALS = 200
RECIPE = Recipe((Quantize(4, 64, "rtn"),))
SEARCH = ["quantize.bits=3..8:int", "quantize.group=32|64|128", "quantize.method=rtn|clip|hqq"]


def overhead(objectives: int) -> dict[str, float]:
    """Milliseconds from the end of one trial's work to the begin of the next one's."""
    space = parse(RECIPE, ["quantize.alpha=0..1", "quantize.migrate=0..1",
                           "quantize.group=16|32|64"])  # fmt: skip
    ends: list[float] = []

    def nothing(recipe: Recipe, _: Sequence[Record]) -> Outcome:
        ends.append(time.perf_counter())
        (step,) = recipe.steps
        return Outcome("complete", (step.alpha, step.migrate)[:objectives])

    with tempfile.TemporaryDirectory() as folder:
        search(space, nothing, Journal(Path(folder) / "trials.jsonl", {}), trials=TRIALS,
               objectives=objectives)  # fmt: skip
    gaps = 1e3 * np.diff(ends)
    return {"objectives": objectives, "trials": TRIALS, "mean": float(gaps.mean()),
            "median": float(np.median(gaps)), "p95": float(np.percentile(gaps, 95))}  # fmt: skip


def found(within: float) -> dict[str, object]:
    """The search on MiniLM."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [t for seed, kind in enumerate((speeches, news, glosses))
                 for t in drawn(kind(), 120, seed)]  # fmt: skip
        data = folder / "sentences.jsonl"
        data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        began = time.monotonic()
        tuned = penjing.tune(
            minilm(), RECIPE, SEARCH, folder / "tuned", data=data, task="fidelity",
            objective=("quality", "size"), trials=24, within=within, samples=32, length=64,
        )  # fmt: skip
        seconds = time.monotonic() - began
        result = tuned.result
        assert result is not None
        assert result.drop is not None
        return {
            "seconds": seconds, "texts": len(texts), "chosen": tuned.params,
            "drop": [result.drop.value, result.drop.low, result.drop.high, result.drop.samples],
            "size": result.after.size_bytes, "importances": tuned.importances,
            "front": [{**r.params, **r.outcome.figures} for r in tuned.front],
            "trials": [r.to_json() for r in tuned.trials],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["overhead", "minilm"])
    parser.add_argument("--within", default="8m")
    given = parser.parse_args()
    kept = json.loads(STORE.read_text()) if STORE.exists() else {}
    if "overhead" in given.parts:
        kept["overhead"] = [overhead(1), overhead(2)]
    if "minilm" in given.parts:
        kept["minilm"] = found(parse_time(given.within))
    STORE.write_text(json.dumps(kept, indent=1) + "\n")
    STORE.with_suffix(".md").write_text(page(kept))


def page(kept: dict[str, object]) -> str:
    """The tables."""
    lines = ["# tune", "", "Made by `python bench/tune.py`."]
    if rows := kept.get("overhead"):
        lines += ["", f"Milliseconds a trial of {TRIALS} that do nothing, 3 parameters, one run:"]
        lines += ["", "| objectives | mean | median | 95th percentile |", "|---|---|---|---|"]
        lines += [f"| {r['objectives']} | {r['mean']:.1f} | {r['median']:.1f} | {r['p95']:.1f} |"
                  for r in rows]  # type: ignore[attr-defined]  # fmt: skip
    if run := kept.get("minilm"):
        lines += _found(run)  # type: ignore[arg-type]
    return "\n".join(lines) + "\n"


def _found(run: dict) -> list[str]:  # type: ignore[type-arg]
    names = [line.split("=")[0] for line in SEARCH]
    own = [r for r in run["trials"] if r["same"] is None]
    value, low, high, samples = run["drop"]
    lines = ["", f"MiniLM-L6, fidelity (cosine), {run['texts']} sentences, {len(own)} trials in "
             f"{run['seconds'] / 60:.1f} minutes; drop and size of the exported file, on the "
             "samples of the search. The front:", ""]  # fmt: skip
    lines += [f"| {' | '.join(names)} | drop | size, MB |", f"|{'---|' * (len(names) + 2)}"]
    front = sorted(run["front"], key=lambda r: r["size_bytes"])
    lines += [f"| {' | '.join(str(r[n]) for n in names)} | {r['drop']:.4f} | "
              f"{r['size_bytes'] / 1e6:.2f} |" for r in front]  # fmt: skip
    first = own[0]
    lines += ["", f"The recipe as it was: drop {first['figures']['drop']:.4f}, "
              f"{first['figures']['size_bytes'] / 1e6:.2f} MB. Chosen: "
              + ", ".join(f"{n} = {run['chosen'][n]}" for n in names)
              + f"; on {samples} samples that no trial saw its drop is {value:.4f} "
              f"({low:.4f} to {high:.4f}), {run['size'] / 1e6:.2f} MB."]  # fmt: skip
    for name, shares in run["importances"].items():
        told = ", ".join(f"{n} {share:.0%}" for n, share in shares.items())
        lines += ["", f"What mattered to {name}: {told}."]
    return lines


if __name__ == "__main__":
    main()
