"""What libraries say that is for nobody, kept off the terminal; what fails is still told."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

__all__ = ["hushed", "unheard"]


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Drop the warnings, log lines and prints of Python code in the body."""
    was = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(was)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Hold back what native code writes to standard error in the body, which must be short.

    A body that fails lets it out: it may be the only reason there is.
    """
    try:
        own = os.dup(2)
    except OSError:  # no standard error
        yield
        return
    failed = False
    with tempfile.TemporaryFile() as held:
        _flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            failed = True
            raise
        finally:
            _flush()
            os.dup2(own, 2)
            os.close(own)
            if failed:
                held.seek(0)
                os.write(2, held.read())


def _flush() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()
