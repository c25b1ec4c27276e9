"""Files a reader may open: regular ones, and inside the folder the user named."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path

from penjing.errors import InputError
from penjing.files import sha256

__all__ = ["fingerprint", "regular"]


def regular(path: Path, root: Path | None = None) -> Path:
    """`path` when it is a regular file that, links followed, lies in `root`.

    The one way out of `root` that is accepted is the hub cache's own layout, where
    `snapshots/<revision>/file` links to `blobs/<hash>` of the same repository.

    Raises:
        InputError: missing, a device, a pipe or a folder, or a link out of `root`.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise InputError("no such file", got=path, next="check the path") from error
    if not stat.S_ISREG(mode):
        raise InputError("not a regular file", got=path, allowed="files, no pipes or devices")
    if root is not None:
        home, target = root.resolve(), path.resolve()
        allowed = [home]
        if home.parent.name == "snapshots":
            allowed.append(home.parent.parent / "blobs")
        if not any(target.is_relative_to(folder) for folder in allowed):
            raise InputError(
                f"{path.name} is a link that leaves its folder", got=target, allowed=f"in {home}"
            )
    return path


def fingerprint(paths: Iterable[Path]) -> str:
    """SHA-256 over the SHA-256 of each file, in order; names do not count."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()
