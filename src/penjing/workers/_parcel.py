"""A folder that workers of this machine read where it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Here"]


@dataclass(frozen=True)
class Here:
    """It is there already."""

    folder: Path

    def open(self, _: Path) -> Path:
        """The folder."""
        return self.folder
