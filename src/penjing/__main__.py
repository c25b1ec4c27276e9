"""The command `penjing`, also as `python -m penjing`; Ctrl-C is one line from its first import."""

from __future__ import annotations

import os
import signal

__all__ = ["main"]


def _end(*_: object) -> None:
    """At once: amid an import an exception would come out as another, and nothing is made yet."""
    os.write(2, b"penjing: error: interrupted\n")
    os._exit(130)


def main() -> None:
    """Entry point of the console script."""
    # In the background of a shell Ctrl-C is ignored, and stays so.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _end)
    from penjing.cli import main as command

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command()
    except KeyboardInterrupt:  # before the verb began, or after its end
        _end()


if __name__ == "__main__":
    main()
