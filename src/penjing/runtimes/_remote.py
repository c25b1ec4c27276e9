"""A session in a fresh process of its own, reached through a pipe.

The process holds the runtime and nothing else, so what is measured there (latency, peak
memory) is what a user of the exported file would have.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from penjing import errors
from penjing.errors import ExportError
from penjing.runtimes._ssh import Host
from penjing.runtimes._worker import receive, send

__all__ = ["Remote"]


class Remote:
    """A session in a fresh process; the process ends with the `with` block.

    Args:
        path: the exported file.
        runtime: name in `penjing.runtimes`.
        threads: of the runtime.
        host: a device that the process runs on in place of this machine.

    Raises:
        InputError, UsageError: as the runtime's `open` raises them.
        ExportError: the runtime failed, or its process died.
    """

    def __init__(self, path: Path, runtime: str, *, threads: int, host: Host | None = None) -> None:
        file = str(path.absolute()) if host is None else host.put(path)
        here = [sys.executable, "-P", "-m", "penjing.runtimes._worker"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in `close`
        place = str(Path(__file__).parents[2])
        paths = [place, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            here if host is None else host.worker(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            self._ask(
                "open",
                runtime=runtime.replace("-", "_"),
                path=file,
                threads=threads,
            )
        except BaseException:
            self.close()
            raise

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The exported file's one output."""
        return self._ask("run", batch)[1]["output"]

    def prepare(self, batch: Mapping[str, np.ndarray]) -> None:
        """Send the inputs that `bench` runs on."""
        self._ask("inputs", batch)

    def bench(self, runs: int) -> list[float]:
        """Seconds of each of `runs` calls, timed inside the process."""
        seconds: list[float] = self._ask("bench", runs=runs)[0]["seconds"]
        return seconds

    def peak_memory(self) -> int:
        """Peak resident bytes of the process so far."""
        return int(self._ask("memory")[0]["peak"])

    def inputs(self) -> dict[str, tuple[int | None, ...]]:
        """Shape of each input by name, None for a free size; a decoder's cache included."""
        found = self._ask("describe")[0]["inputs"]
        return {name: tuple(shape) for name, shape in found.items()}

    def modules(self) -> list[str]:
        """Top-level modules the process has imported."""
        return list(self._ask("modules")[0]["modules"])

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # The process may have died with an unread message in the pipe.
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.kill()
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(
        self, verb: str, arrays: Mapping[str, np.ndarray] | None = None, **options: Any
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            send(self._process.stdin, {"do": verb, **options}, arrays or {})
            reply, outputs = receive(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise ExportError(
                f"the runtime's process died at {verb}", got=self._last_words()
            ) from error
        if "error" in reply:
            kind = getattr(errors, reply["error"])
            raise kind(
                reply["what"], got=reply["got"], allowed=reply["allowed"], next=reply["next"]
            )
        return reply, outputs

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        reason = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"{reason}; {lines[-1]}" if lines else reason
