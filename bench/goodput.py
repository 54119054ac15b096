"""Goodput under random faults: costs that were measured in, the share of time in steps that count out.

    python -m bench.goodput --step 0.4 --stall 0.1 --write 3 --restart 12 --mtti 3600

Faults come as a Poisson process, also while a job starts. A save stalls training, then goes on in the
background; it counts when it is done, and the next one waits for it. A fault costs its detection, a
restart, and the steps since the last save that counted. The table compares intervals between saves; the
one proposed (Daly 2006) is compared with the best of all.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from launcher.save_interval import Costs, expected_goodput, proposed_save_every

NUM_FAULTS = 20_000  # of a simulation: its goodput is then certain to about 0.2 %
NUM_SETTINGS = 50
NUM_INTERVALS = 60  # tried for the best one
HOUR = 3600.0


@dataclass(frozen=True)
class Simulated:
    goodput: float
    steps_lost: float  # a fault's mean
    longest_loss: int


def simulate(
    save_every: int, costs: Costs, *, num_faults: int = NUM_FAULTS, seed: int = 1
) -> Simulated:
    """Play faults one after the other; the same ones for every interval, so that intervals compare."""
    lived = np.random.default_rng(seed).exponential(costs.mtti, num_faults)
    work = save_every * costs.step
    cycle = (
        work + costs.stall + max(0.0, costs.write - work)
    )  # one save waits for the one before it
    trained = np.maximum(0.0, lived - costs.restart)
    counted = np.floor(np.maximum(0.0, trained - costs.write) / cycle)
    cycles, rest = np.divmod(trained, cycle)
    steps = cycles * save_every + np.floor(np.minimum(rest, work) / costs.step)
    lost = steps - counted * save_every
    useful = float(counted.sum()) * work
    return Simulated(useful / float(lived.sum()), float(lost.mean()), int(lost.max()))


def intervals(costs: Costs, number: int = NUM_INTERVALS) -> list[int]:
    """Steps between saves to try: from every step to one save in five mean times between faults."""
    longest = max(2.0, 5 * costs.mtti / costs.step)
    return sorted({max(1, round(every)) for every in np.geomspace(1, longest, number)})


def best_interval(costs: Costs) -> tuple[int, float]:
    """The interval that does best in simulation, and its goodput."""
    tried = {every: simulate(every, costs).goodput for every in intervals(costs)}
    best = max(tried, key=lambda every: tried[every])
    return best, tried[best]


def settings(number: int = NUM_SETTINGS, seed: int = 1) -> Iterator[Costs]:
    """Runs of all kinds: from a laptop's, with a fault every minute, to a cluster's with one a day."""
    draw = random.Random(seed)

    def between(low: float, high: float) -> float:
        return low * (high / low) ** draw.random()

    for _ in range(number):
        mtti = between(60, 86_400)
        yield Costs(
            step=between(0.02, 5),
            stall=between(0.01, 30),
            mtti=mtti,
            write=between(0.1, 120),
            restart=min(between(5, 300), mtti / 2),
        )


def proposal_against_best(costs: Costs) -> tuple[int, float, int, float]:
    """(proposed interval, its goodput, best interval, its goodput)."""
    proposed = proposed_save_every(costs)
    return proposed, simulate(proposed, costs).goodput, *best_interval(costs)


def table(costs: Costs) -> list[str]:
    """A line for the proposed interval, for others around it, and for the best."""
    proposed = proposed_save_every(costs)
    best, _ = best_interval(costs)
    tried = {max(1, round(proposed * factor)) for factor in (0.1, 0.3, 1, 3, 10)} | {best}
    lines = [
        "| save_every | goodput, simulated | by formula | steps lost a fault, mean | longest |  |",
        "|---|---|---|---|---|---|",
    ]
    for every in sorted(tried):
        found = simulate(every, costs)
        notes = [*(["proposed"] if every == proposed else []), *(["best"] if every == best else [])]
        lines.append(
            f"| {every:,} | {found.goodput:.2%} | {expected_goodput(every, costs):.2%} | "
            f"{found.steps_lost:,.1f} | {found.longest_loss:,} | {', '.join(notes)} |"
        )
    return lines


def comparison(number: int) -> list[str]:
    """How the proposal does over many settings."""
    rows = [proposal_against_best(costs) for costs in settings(number)]
    ratios = [goodput / best if best else 1.0 for _, goodput, _, best in rows]
    near = sum(ratio >= 0.95 for ratio in ratios)
    return [
        f"proposed against best goodput in {number} settings: worst {min(ratios):.2%}, "
        f"median {float(np.median(ratios)):.2%}; {near} of {number} within 5 %"
    ]


def by_mtti(costs: Costs, times: Sequence[float]) -> list[str]:
    lines = ["| a fault every | save_every, proposed | goodput |", "|---|---|---|"]
    for mtti in times:
        now = replace(costs, mtti=mtti)
        every = proposed_save_every(now)
        lines.append(f"| {mtti:,.0f} s | {every:,} | {simulate(every, now).goodput:.2%} |")
    return lines


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="goodput under random faults, by simulation")
    add = parser.add_argument
    add("--step", type=float, default=0.4, help="seconds of a step (default: %(default)s)")
    add("--stall", type=float, default=0.1, help="training waits for a save (default: %(default)s)")
    add("--write", type=float, default=3.0, help="of a save in the background (%(default)s)")
    add("--restart", type=float, default=12.0, help="from start to first step (%(default)s)")
    add("--detection", type=float, default=2.0, help="of a fault (default: %(default)s)")
    add("--mtti", type=float, default=HOUR, help="mean time to interrupt (default: %(default)s)")
    add("--settings", type=int, default=NUM_SETTINGS, help="to compare over (%(default)s)")
    options = parser.parse_args(arguments)
    down = options.restart + options.detection
    costs = Costs(options.step, options.stall, options.mtti, options.write, down)
    print("\n".join([*table(costs), ""]))
    print("\n".join([*by_mtti(costs, (120, 300, 1200, HOUR, 3 * HOUR, 24 * HOUR)), ""]))
    print("\n".join(comparison(options.settings)))


if __name__ == "__main__":
    main(sys.argv[1:])
