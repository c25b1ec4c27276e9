"""The fresh process that opens one exported file, times it and answers batches.

Started as `python -m penjing.runtimes._worker`; it imports neither torch nor transformers,
so its peak memory is the runtime's own. A message is

    4 bytes  length of the header, big endian
    header   JSON: {"do": ..., "arrays": [[name, dtype, shape], ...], ...}
    arrays   raw bytes, one after the other

on standard input and output. Nothing in it is a pickle. End of input ends the process.
"""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from penjing.errors import InputError, PenjingError

__all__ = ["main", "peak_memory", "receive", "send", "settle"]

_HEADER_LIMIT = 1 << 24


def send(pipe: IO[bytes], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write one message."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    table = [[name, array.dtype.str, list(np.shape(arrays[name]))] for name, array in whole.items()]
    text = json.dumps({**header, "arrays": table}).encode()
    pipe.write(struct.pack(">I", len(text)) + text)
    for array in whole.values():
        pipe.write(array.tobytes())
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read one message.

    Raises:
        EOFError: the other side is gone.
        InputError: this is no message.
    """
    (size,) = struct.unpack(">I", _exactly(pipe, 4))
    if size > _HEADER_LIMIT:
        raise InputError("a message with too long a header", got=size, allowed=_HEADER_LIMIT)
    header: dict[str, Any] = json.loads(_exactly(pipe, size))
    arrays = {}
    for name, kind, shape in header.pop("arrays"):
        dtype = np.dtype(kind)
        if dtype.hasobject:
            raise InputError("an array of objects in a message", got=name)
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(_exactly(pipe, count * dtype.itemsize), dtype).reshape(shape)
    return header, arrays


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data


def peak_memory() -> int:
    """Peak resident bytes of this process; VmHWM where there is one, for it starts at exec."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def settle(seconds: float = 0.5) -> None:
    """Wait until this process's threads are asleep, `seconds` at the most.

    A runtime's threads spin for work after a call, far longer than a call may take, and on a
    small machine they would take the next process's cores: it would be timed twice as slow.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = time.process_time()
        time.sleep(0.004)
        if time.process_time() - before < 0.001:
            return


def _answer(
    state: dict[str, Any], header: dict[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One request's answer; `state` holds the session and the benchmark's inputs."""
    verb = header["do"]
    if verb == "open":
        runtime = importlib.import_module(f"penjing.runtimes.{header['runtime']}")
        state["session"] = runtime.open(Path(header["path"]), threads=header["threads"])
        return {}, {}
    if verb == "run":
        return {}, {"output": state["session"].run(arrays)}
    if verb == "inputs":
        state["inputs"] = arrays
        return {}, {}
    if verb == "bench":
        seconds = []
        for _ in range(header["runs"]):
            start = time.perf_counter()
            state["session"].run(state["inputs"])
            seconds.append(time.perf_counter() - start)
        settle()
        return {"seconds": seconds}, {}
    if verb == "memory":
        return {"peak": peak_memory()}, {}
    if verb == "describe":
        shapes = getattr(state["session"], "inputs", {})
        return {"inputs": {name: list(shape) for name, shape in shapes.items()}}, {}
    if verb == "modules":
        return {"modules": sorted({name.partition(".")[0] for name in sys.modules})}, {}
    raise InputError("unknown request", got=verb)


def main() -> None:
    """Answer requests until the input ends."""
    # Libraries that print must not write into the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    state: dict[str, Any] = {}
    while True:
        try:
            header, arrays = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply, outputs = _answer(state, header, arrays)
        except PenjingError as error:
            parts = {name: getattr(error, name) for name in ("what", "got", "allowed", "next")}
            plain = {k: None if v is None else str(v) for k, v in parts.items()}
            reply, outputs = {"error": type(error).__name__, **plain}, {}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            what = f"the runtime failed to {header['do']}"
            reply = {"error": "ExportError", "what": what, "next": None, "allowed": None}
            reply["got"] = f"{type(error).__name__}: {lines[-1]}"
            outputs = {}
        send(answers, reply, outputs)


if __name__ == "__main__":
    main()
