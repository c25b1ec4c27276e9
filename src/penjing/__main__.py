"""`python -m penjing` is the command `penjing`."""

from __future__ import annotations

from penjing.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
