"""One line for every error, and an exit status that scripts can rely on.

0 done, 1 bad input, 2 usage, 3 done but over budget, 70 a defect of this program, 130 Ctrl-C,
143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import click

from penjing.errors import PenjingError, printable

__all__ = ["Group"]

DEFECT, INTERRUPTED, TERMINATED = 70, 130, 143


def _debugging() -> bool:
    return os.environ.get("PENJING_DEBUG", "0") not in ("", "0")


def _quiet_libraries() -> None:
    """Keep libraries from writing between our lines, and from calling a model hub."""
    for name, value in (
        ("HF_HUB_OFFLINE", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ):
        os.environ.setdefault(name, value)
    if not _debugging():
        warnings.simplefilter("ignore")


def _terminate(*_: object) -> None:
    """As Ctrl-C: unfinished files are removed on the way out."""
    sys.exit(TERMINATED)


def _fail(text: str, status: int) -> int:
    click.echo(f"penjing: error: {text}", err=True)
    return status


class Group(click.Group):
    """The verbs in the order they were added; errors as one line on standard error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(context_settings={"help_option_names": ["-h", "--help"]}, **options)
        self.params.append(
            click.Option(
                ["--version"],
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=_version,
                help="Show the version.",
            )
        )

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the order of the work, not of the alphabet."""
        return list(self.commands)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a verb and exit with its status."""
        _quiet_libraries()
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, _terminate)
        with warnings.catch_warnings():
            sys.exit(self._status(args, extra))

    def _status(self, args: Sequence[str] | None, extra: dict[str, Any]) -> int:
        try:
            status = super().main(args, prog_name="penjing", standalone_mode=False, **extra)
            return status if isinstance(status, int) else 0
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            return 2
        except click.UsageError as error:
            verb = (
                f"penjing {error.ctx.info_name} " if error.ctx and error.ctx.parent else "penjing "
            )
            message = printable(error.format_message().rstrip("."), 600)
            return _fail(f"{message}; next: {verb}--help", error.exit_code)
        except click.ClickException as error:
            return _fail(printable(error.format_message(), 600), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            return _fail("interrupted", INTERRUPTED)
        except PenjingError as error:
            if _debugging():
                raise
            return _fail(str(error), error.exit_status)
        except MemoryError:
            if _debugging():
                raise
            return _fail("out of memory; next: fewer --samples or a shorter --length", 1)
        except Exception as error:
            if _debugging():
                raise
            text = printable(f"{type(error).__name__}: {error}", 300)
            return _fail(f"a defect of penjing: {text}; next: PENJING_DEBUG=1 shows where", DEFECT)


def _version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        click.echo(f"penjing {metadata.version('penjing')}")
        ctx.exit()
