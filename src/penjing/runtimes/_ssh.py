"""A device reached over SSH: files are copied there, and the worker runs there.

`ssh` itself does the work, so keys, ports, jump hosts and known hosts are those of its own
configuration; it never asks for a password. The device needs Python 3.11 with numpy and
onnxruntime: `python3`, or what the address names: ssh://user@host:22?python=/opt/venv/bin/python
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

from penjing.errors import InputError, UsageError
from penjing.runtimes._kit import pack

__all__ = ["Host"]


class Host:
    """A folder on a device, there as long as the `with` block; it goes with all that is in it.

    Args:
        address: `ssh://[user@]host[:port]`.

    Raises:
        UsageError: no such address, or no `ssh` here.
        InputError: the device cannot be reached, or lacks what it needs.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        options = parse_qs(parts.query)
        # A name that begins with a hyphen would be an option of ssh.
        bad = not parts.hostname or parts.hostname.startswith("-") or parts.path not in ("", "/")
        if parts.scheme != "ssh" or bad or (parts.username or "").startswith("-"):
            raise UsageError(
                "address of a device", got=address, allowed="ssh://user@host or ssh://user@host:22"
            )
        if shutil.which("ssh") is None:
            raise UsageError("no ssh on this machine", next="install an SSH client")
        self.address = address
        self._python = options.get("python", ["python3"])[0]
        user = [] if parts.username is None else ["-l", parts.username]
        port = [] if parts.port is None else ["-p", str(parts.port)]
        self._ssh = ["ssh", "-o", "BatchMode=yes", *port, *user, str(parts.hostname)]
        self._sent: dict[tuple[str, int], str] = {}
        self.folder = ""

    def __enter__(self) -> Host:
        self.folder = self._ask("mktemp -d").strip()
        try:
            with tempfile.TemporaryDirectory() as work:
                pack(Path(work) / "kit.pyz")
                self._kit = self.put(Path(work) / "kit.pyz")
            self.cores = int(self._ask(f"{self._python} {shlex.quote(self._kit)} cores"))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.folder:
            # The device may be gone; what is left lies in its folder of temporary files.
            with contextlib.suppress(InputError):
                self._ask(f"rm -rf -- {shlex.quote(self.folder)}")
            self.folder = ""

    def put(self, path: Path) -> str:
        """Copy a file or a folder there, once; its place on the device."""
        path = path.absolute()
        key = str(path), path.stat().st_mtime_ns
        if key not in self._sent:
            place = f"{self.folder}/{len(self._sent)}"
            self._ask(f"mkdir {shlex.quote(place)}")
            tar = subprocess.Popen(
                ["tar", "-cf", "-", "-C", str(path.parent), path.name], stdout=subprocess.PIPE
            )
            try:
                self._ask(f"tar -xf - -C {shlex.quote(place)}", stdin=tar.stdout)
            finally:
                assert tar.stdout is not None
                tar.stdout.close()
                tar.wait()
            self._sent[key] = f"{place}/{path.name}"
        return self._sent[key]

    def profile(self, kit: Path, arguments: list[str]) -> str:
        """What a kit with kernels finds there, JSON."""
        target = f"{self.folder}/profile.json"
        words = [self.put(kit), target, *arguments]
        self._ask(f"{self._python} {shlex.join(words)}")
        return self._ask(f"cat {shlex.quote(target)}")

    def worker(self) -> list[str]:
        """The command that runs the worker there, its pipes here."""
        return [*self._ssh, f"{self._python} {shlex.quote(self._kit)} worker"]

    def _ask(self, command: str, stdin: object = subprocess.DEVNULL) -> str:
        done = subprocess.run(
            [*self._ssh, command], stdin=stdin, capture_output=True, text=True, errors="replace",
            check=False,
        )  # type: ignore[call-overload]  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise InputError(
                f"the device {self.address} refuses", got=lines[-1],
                next="try `ssh` with the same address; see docs/edge.md for what it needs",
            )  # fmt: skip
        return str(done.stdout)
