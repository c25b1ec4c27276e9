"""Ever smaller forms of a network, and the first that costs no more than a share of the whole.

Half of all channels of a CNN are three quarters of its parameters, half of the hidden units of a
transformer's MLPs a third: how much goes is counted on the network without the units, rung by rung.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from penjing.channelmap import Free
from penjing.coupling import remove
from penjing.errors import InputError
from penjing.meter import metered, sized_batch
from penjing.model import Model

__all__ = ["COSTS", "Forms", "Ladder"]

Kept = Mapping[str, int]


def _macs(model: Model) -> float:
    return float(sum(metered(model, sized_batch(model, batch=1)).macs.values()))


COSTS: dict[str, Callable[[Model], float]] = {
    "parameters": lambda model: float(model.parameter_count),
    "macs": _macs,
}
"""What a share can be of; MACs are those of one sample, of a text of 128 tokens."""


@dataclass(frozen=True, eq=False)
class Forms:
    """A network with fewer units, for counting and timing.

    Attributes:
        model: the whole network; stays as it is.
        groups: whose units go.
    """

    model: Model
    groups: Sequence[Free]
    _whole: dict[str, float] = field(default_factory=dict)

    def form(self, kept: Kept) -> Model:
        """The network with so many units, any of them, of the groups named; others are whole."""
        twin = self.model.copy(shared=True)
        counts = [(free, kept.get(free.group.name, free.group.count)) for free in self.groups]
        remove(
            twin.module, [(free.group, range(count)) for free, count in counts],
            [one for free, count in counts for one in free.settings(count)],
        )  # fmt: skip
        return twin

    def share(self, kept: Kept, of: str) -> float:
        """What it costs then, of the whole one: `of` is a name of `COSTS`."""
        if of not in self._whole:
            self._whole[of] = COSTS[of](self.model)
        return COSTS[of](self.form(kept)) / self._whole[of]


@dataclass(frozen=True, eq=False)
class Ladder:
    """Rungs 0 to `length`, each with no more units than the one before.

    Attributes:
        forms: of the network.
        rungs: by number, units of each group that stay.
        length: number of the last.
    """

    forms: Forms
    rungs: Callable[[int], Kept]
    length: int

    def first(self, of: str, share: float) -> int:
        """The first rung that costs no more than a share of the whole network, 0 to 1.

        Raises:
            InputError: there is none.
        """
        least = self.forms.share(self.rungs(self.length), of)
        if least > share:
            raise InputError(
                f"shrink cannot take {1 - share:.0%} of the {of}", got=f"at most {1 - least:.0%}",
                next="quantize or cut what is left",
            )  # fmt: skip
        low, high = -1, self.length
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (low, middle)
                if self.forms.share(self.rungs(middle), of) <= share
                else (middle, high)
            )
        return high
