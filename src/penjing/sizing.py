"""How many units must go for a share of the parameters or of the multiplications to go.

The same fraction of the units of every group is tried, halved in on until the share is met. Half
of all channels of a CNN are three quarters of its parameters, half of the hidden units of a
transformer's MLPs a third: the fraction is not the share.
"""

from __future__ import annotations

from dataclasses import replace

from penjing.channelmap import channel_map
from penjing.coupling import remove
from penjing.errors import InputError, UsageError
from penjing.meter import cost
from penjing.model import Model
from penjing.steps.shrink import Shrink

__all__ = ["ratio_for"]

_TRIES = 12


def ratio_for(model: Model, step: Shrink, of: str, share: float) -> float:
    """The `ratio` of `step` with which a share of the network goes.

    Args:
        step: whose other options hold.
        of: `parameters` or `macs`.
        share: 0 to 1.

    Raises:
        UsageError: another `of`.
        InputError: more than there is to take.
    """
    if of not in ("parameters", "macs"):
        raise UsageError(f"--of {of} is not there yet", allowed="units, parameters, macs",
                         next="use fit")  # fmt: skip
    whole = cost(model, of)
    groups = channel_map(model).free

    def left(ratio: float) -> float:
        twin = model.copy(shared=True)
        chosen = replace(step, ratio=ratio)
        kept = [chosen.keep(free.group) for free in groups]
        plans = [(f.group, list(range(k))) for f, k in zip(groups, kept, strict=True)]
        remove(twin.module, plans, [s for f, k in zip(groups, kept, strict=True)
                                    for s in f.settings(k)])  # fmt: skip
        return cost(twin, of) / whole

    low, high = 0.0, 0.999
    if left(high) > 1 - share:
        raise InputError(
            f"shrink cannot take {share:.0%} of the {of}", got=f"at most {1 - left(high):.0%}",
            next="quantize or cut what is left",
        )  # fmt: skip
    for _ in range(_TRIES):
        middle = (low + high) / 2
        low, high = (low, middle) if left(middle) <= 1 - share else (middle, high)
    return high
