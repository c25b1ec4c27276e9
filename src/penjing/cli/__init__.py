"""The command line. Importing it imports neither torch nor any other large library."""

from __future__ import annotations

import logging
import os

from penjing.cli.bits import quantize
from penjing.cli.goal import demo, fit
from penjing.cli.group import Group
from penjing.cli.look import evaluate, inspect
from penjing.cli.shape import cut, prune, replay, shrink
from penjing.cli.ship import export, measure, report, verify
from penjing.cli.train import recover
from penjing.cli.transfer import transfer
from penjing.cli.tune import tune

__all__ = ["group", "main"]

group = Group(
    name="penjing",
    help="Takes a trained model and a budget, gives back the smallest, fastest artifact that "
    "still passes your quality bar, with every number measured on the exported file.",
    epilog="Exit status: 0 done, 1 bad input, 2 usage, 3 done but the budget could not be met.",
)
for _command in (
    demo,
    fit,
    inspect,
    evaluate,
    prune,
    shrink,
    cut,
    quantize,
    recover,
    replay,
    tune,
    transfer,
    export,
    measure,
    verify,
    report,
):
    group.add_command(_command)


def main() -> None:
    """What `penjing.__main__` runs."""
    # Before torch is there. Threads that spin while they wait take the cores from the runtimes'
    # own, and beside other work a step of training took nine times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What these say when transformers imports them, where they are installed, is for nobody here.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    group.main()
