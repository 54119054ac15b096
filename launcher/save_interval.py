"""Measured costs of saving and of starting again in, how often to save out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.jobs import Job


@dataclass(frozen=True)
class Costs:
    """What was measured of a run. Seconds."""

    step: float  # of a step, with its wait for data
    stall: float  # training stands still for a save
    mtti: float  # mean time to interrupt: training time over the number of faults
    write: float = 0.0  # a save goes on in the background, and counts when it is done
    restart: float = 0.0  # from the fault to the next step: detection, start-up, load


def daly_seconds(stall: float, mtti: float) -> float:
    """Training time between two saves that loses least time (Daly 2006, equation 37).

    sqrt(2 stall mtti) (Young 1974) with terms for faults that are not rare.
    """
    if stall >= 2 * mtti:
        return mtti
    ratio = math.sqrt(stall / (2 * mtti))
    return math.sqrt(2 * stall * mtti) * (1 + ratio / 3 + ratio * ratio / 9) - stall


def proposed_save_every(costs: Costs) -> int:
    """Steps between two saves. Never so few that one save would wait for the one before it."""
    seconds = max(daly_seconds(costs.stall, costs.mtti), costs.write)
    return max(1, round(seconds / costs.step))


def expected_goodput(save_every: int, costs: Costs) -> float:
    """Share of the wall time in steps that count, where faults come at random (a Poisson process).

    Between two faults e^(-restart / mtti) of all jobs get to train; each save then is reached, and counts,
    with probability e^(-t / mtti), t its time since the job's first step: a geometric series.
    """
    work = save_every * costs.step
    cycle = work + costs.stall + max(0.0, costs.write - work)
    decay = math.exp(-cycle / costs.mtti)
    reached = math.exp(-(costs.restart + costs.write) / costs.mtti)
    return work * reached * decay / (-math.expm1(-cycle / costs.mtti)) / costs.mtti


def measured_costs(jobs: Sequence[Job]) -> Costs | None:
    """What a ledger tells of them; None without a fault, a step or a save that it knows the time of.

    How long a save goes on in the background no ledger tells.
    """
    num_faults = sum(job.end is None or job.end.status in ("failed", "hung") for job in jobs[:-1])
    num_faults += bool(jobs and jobs[-1].end and jobs[-1].end.status in ("failed", "hung"))
    steps = step_seconds = save_seconds = lived = starting = 0.0
    num_saves = num_starts = 0
    for job in jobs:
        lived += job.last_time - job.time
        saved, step = 0.0, job.resumed_step
        for mark in job.marks:
            num_saves += mark.seconds.get("save", 0.0) > saved
            saved = mark.seconds.get("save", 0.0)
            steps += max(0, mark.step - step)
            step = mark.step
        if job.marks:
            last = job.marks[-1].seconds
            step_seconds += last.get("step", 0.0) + last.get("data", 0.0)
            save_seconds += last.get("save", 0.0)
            starting += last.get("startup", 0.0)
            num_starts += 1
    if not (num_faults and num_saves and steps and step_seconds):
        return None
    return Costs(
        step=step_seconds / steps,
        stall=save_seconds / num_saves,
        mtti=lived / num_faults,
        restart=starting / num_starts,
    )


def hint(jobs: Sequence[Job], save_every: int, *, at_least: float = 0.005) -> str | None:
    """A sentence, where another `save_every` would win at least this share of the wall time."""
    costs = measured_costs(jobs)
    if costs is None or save_every < 1:
        return None
    better = proposed_save_every(costs)
    now, then = (expected_goodput(every, costs) for every in (save_every, better))
    if then - now < at_least:
        return None
    return (
        f"a fault every {costs.mtti:,.0f} s, saves that stall for {costs.stall:.2g} s, steps of "
        f"{costs.step:.2g} s: save_every={better} would lose least (about {then:.1%} goodput; {now:.1%} at "
        f"{save_every})"
    )
