"""What runs on a device: its kernels timed, and the worker that times files there.

It imports numpy and onnxruntime alone, for it is copied to the device as one file, a `.pyz`
that Python runs as it is (`penjing.runtimes._kit`):

    python3 kit.pyz pi.json [--threads 1,4] [--seconds 20]     a profile
    python3 kit.pyz worker                                     `penjing.runtimes._worker`
    python3 kit.pyz cores                                      how many there are

A profile says what the machine is, how many bytes a second it copies, and what a linear layer
[in] -> [out] takes in each number format on some numbers of rows with some numbers of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import InputError, PenjingError, UsageError
from penjing.runtimes import _worker

__all__ = ["FORMAT", "cores", "free_memory", "main", "processor", "profile"]

FORMAT = 1
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp")
_COPIED = 1 << 26  # bytes, more than a cache holds


def processor() -> tuple[str, tuple[str, ...]]:
    """Its name, and those of its flags that low-bit arithmetic depends on."""
    found: dict[str, str] = {}
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    flags = set(found.get("flags", found.get("Features", "")).split())
    name = found.get("model name") or found.get("Model") or platform.processor()
    return name or platform.machine(), tuple(flag for flag in _FLAGS if flag in flags)


def cores() -> int:
    """Physical cores that this process may use, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1 << 16
    pairs = {
        (_text(place / "physical_package_id"), _text(place / "core_id"))
        for place in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology")
    }
    return max(1, min(len(pairs) or os.cpu_count() or 1, allowed))


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else path.parent.name


def free_memory() -> int:
    """Bytes free for new allocations; 0 where the system does not say."""
    information = Path("/proc/meminfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _bandwidth() -> float:
    """Bytes read and written a second by one thread, the best of five copies."""
    source = np.ones(_COPIED // 8)
    target = np.zeros_like(source)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2 * _COPIED / min(seconds)


def profile(folder: Path, threads: Sequence[int], *, seconds: float = 20.0) -> dict[str, Any]:
    """Time the kernels of a kit.

    Args:
        folder: holds `kernels.json` and the files that it names.
        threads: numbers of threads to time each with.
        seconds: about how long it may take; every kernel is run three times at least.

    Returns:
        JSON-ready; `penjing.fit.device` reads it.
    """
    from penjing.runtimes import onnxruntime

    index = folder / "kernels.json"
    if not index.is_file():
        raise InputError("no kernels in the kit", next="penjing measure --kit kit.pyz writes one")
    kit = json.loads(index.read_text("utf-8"))
    chains: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for kernel in kit["kernels"]:
        chains.setdefault((kernel["inputs"], kernel["outputs"]), {})[kernel["format"]] = kernel
    name, flags = processor()
    table = []
    share = seconds / max(1, len(chains) * len(threads) * len(kit["tokens"]))
    for count in threads:
        for (inputs, outputs), formats in chains.items():
            sessions = {
                form: onnxruntime.open(folder / kernel["file"], threads=count)
                for form, kernel in formats.items()
            }
            for tokens in kit["tokens"]:
                x = np.random.default_rng(0).standard_normal((tokens, inputs), np.float32)
                taken = _interleaved(sessions, {"x": x}, share)
                table += [
                    {
                        "format": form, "tokens": tokens, "inputs": inputs, "outputs": outputs,
                        "threads": count, "microseconds": 1e6 * median / formats[form]["layers"],
                    }
                    for form, median in taken.items()
                ]  # fmt: skip
    return {
        "format": FORMAT, "runtime": "onnxruntime", "processor": name, "flags": list(flags),
        "cores": cores(), "memory_bytes": free_memory(), "bytes_per_second": _bandwidth(),
        "kernels": table,
    }  # fmt: skip


def _interleaved(
    sessions: dict[str, Any], batch: dict[str, np.ndarray], seconds: float
) -> dict[str, float]:
    """Median seconds of a call by name; the calls alternate, so that all see one weather."""
    calls: dict[str, list[float]] = {name: [] for name in sessions}
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 3 or (time.monotonic() < end and rounds < 100):
        for name, session in sessions.items():
            session.run(batch)
            start = time.perf_counter()
            session.run(batch)
            calls[name].append(time.perf_counter() - start)
            _worker.settle()
        rounds += 1
    return {name: float(np.median(own)) for name, own in calls.items()}


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: 1 or more, as in 1,4")
    return found


def _to_profile(kit: Path, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Times this machine's kernels.")
    parser.add_argument("output", type=Path, help="the profile, e.g. pi.json")
    parser.add_argument("--threads", type=_numbers, help="default: 1 and one for each core")
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args(arguments)
    if not zipfile.is_zipfile(kit):
        raise InputError("no kit", got=kit, next="penjing measure --kit kit.pyz writes one")
    if not given.output.parent.is_dir():
        raise UsageError("no such folder", got=given.output.parent)
    with tempfile.TemporaryDirectory() as work:
        with zipfile.ZipFile(kit) as archive:
            archive.extractall(work, [n for n in archive.namelist() if n.startswith("kernels")])
        threads = given.threads or sorted({1, cores()})
        found = profile(Path(work) / "kernels", threads, seconds=given.seconds)
    # Written beside and renamed: a file that is there is whole.
    part = given.output.with_name(f".{given.output.name}.{os.getpid()}")
    part.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    part.replace(given.output)


def main(kit: Path) -> None:
    """The command line of a `.pyz`."""
    arguments = sys.argv[1:]
    if arguments == ["worker"]:
        _worker.main()
    elif arguments == ["cores"]:
        sys.stdout.write(f"{cores()}\n")
    else:
        try:
            _to_profile(kit, arguments)
        except PenjingError as error:
            sys.exit(f"kit: {error}")
