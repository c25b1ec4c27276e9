"""Files a reader may open: regular ones, and inside the folder the user named."""

from __future__ import annotations

import stat
from pathlib import Path

from penjing.errors import InputError

__all__ = ["regular"]


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
