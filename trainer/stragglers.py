"""Every rank's own time of a step in, the rank that the others wait for out.

All ranks' steps take equally long, for they wait for each other in every step. What tells them apart is
the time in which nobody is waited for: the batch's, and the forward pass's (at ZeRO 3 that one waits too,
so a slow rank is seen there by its data alone). On a GPU it is the host's time that is compared.
"""

import socket
import statistics

from trainer.activity import Activity
from trainer.world import World

RATIO = 1.4  # over the median of the other ranks
SHARE = 0.1  # of a step that must be lost by it
IN_A_ROW = 2  # windows of steps
LEAST_STEPS = 10  # of a window: a single step says little


class Stragglers:
    def __init__(self, activity: Activity, world: World, zero_stage: int) -> None:
        self._activity, self._world = activity, world
        self._names = ("data", "forward") if zero_stage < 3 else ("data",)
        self._before, self._step_before = self._own(), activity.step
        self._suspect: int | None = None
        self._times = 0

    def look(self, step_seconds: float) -> str | None:
        """Who is slow, if the same rank was so in two windows in a row. Collective, when one is over."""
        if self._activity.step - self._step_before < LEAST_STEPS:
            return None
        now, steps = self._own(), max(1, self._activity.step - self._step_before)
        mine = ((now - self._before) / steps, socket.gethostname())
        self._before, self._step_before = now, self._activity.step
        every = self._world.gather(mine)
        suspect = slowest([seconds for seconds, _ in every], step_seconds)
        self._times = self._times + 1 if suspect is not None and suspect == self._suspect else 1
        self._suspect = suspect
        if suspect is None or self._times != IN_A_ROW:
            return None
        others = statistics.median(t for rank, (t, _) in enumerate(every) if rank != suspect)
        return (
            f"rank {suspect} ({every[suspect][1]}) takes {every[suspect][0]:.3f} s of its own per step, the "
            f"others {others:.3f} s: they wait for it"
        )

    def _own(self) -> float:
        return sum(self._activity.seconds[name] for name in self._names)


def slowest(seconds: list[float], step_seconds: float) -> int | None:
    """The rank that takes much longer than the others, by enough to matter; None where none does."""
    if len(seconds) < 2:
        return None
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median(t for other, t in enumerate(seconds) if other != rank)
    lost = seconds[rank] - others
    return rank if seconds[rank] > RATIO * others and lost > SHARE * step_seconds else None
