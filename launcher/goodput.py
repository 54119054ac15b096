"""The jobs of a run in, an account of all its time out: what of it moved the model on, and what did not.

Goodput is useful step time over wall time. The parts are those of Google's ML Goodput: every second
from the start of the first job to the last sign of the last one belongs to exactly one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launcher.jobs import Job, Mark

# Part of the account -> what a person reads. The order is that of tables.
PARTS = {
    "useful": "steps that count",
    "repeated": "steps done again later",
    "data": "waiting for data",
    "startup": "start-up",
    "save": "checkpoint stall",
    "eval": "evaluation",
    "log": "logging",
    "rewind": "going back",
    "other": "other activities",  # that a later version may log
    "unknown": "inside jobs, not accounted for",
    "down": "no job was running",
}
OF_STEPS = ("step", "data")  # what a step that is done again has cost


@dataclass(frozen=True)
class Account:
    """Seconds by part; together they are the wall time."""

    wall_seconds: float
    seconds: dict[str, float]  # of every part in PARTS
    num_jobs: int
    num_unplanned: int  # jobs that did not end by their own decision; the last one may still run
    num_steps: int  # completed and kept
    num_repeated: int  # completed, lost, done again

    @property
    def goodput(self) -> float:
        return self.seconds["useful"] / self.wall_seconds if self.wall_seconds > 0 else 0.0


class _Piece(NamedTuple):
    """What a job did between two of its marks."""

    first: int  # steps completed before it
    last: int  # and after it; below `first` where the job went back
    seconds: dict[str, float]


def account_of(jobs: Sequence[Job]) -> Account | None:
    """None where there is no job, or nothing is known of the time after its start."""
    if not jobs or jobs[-1].last_time <= jobs[0].time:
        return None
    seconds = dict.fromkeys(PARTS, 0.0)
    pieces = [_pieces(job) for job in jobs]
    num_repeated = _steps(jobs, pieces, seconds)
    until = jobs[0].time  # all before is accounted for
    for job, parts in zip(jobs, pieces, strict=True):
        seconds["down"] += max(0.0, job.time - until)
        overlap = max(0.0, until - job.time)  # it began while the one before was ending
        known = 0.0
        for piece in parts:
            known += sum(piece.seconds.values())
            for name, value in piece.seconds.items():
                if name not in OF_STEPS:
                    seconds[name if name in PARTS else "other"] += value
        seconds["startup"] -= overlap
        seconds["unknown"] += job.last_time - job.time - known
        until = max(until, job.last_time)
    completed = sum(max(0, piece.last - piece.first) for parts in pieces for piece in parts)
    return Account(
        wall_seconds=until - jobs[0].time,
        seconds=seconds,
        num_jobs=len(jobs),
        num_unplanned=sum(_is_unplanned(job) for job in jobs),
        num_steps=round(completed - num_repeated),
        num_repeated=round(num_repeated),
    )


def _is_unplanned(job: Job) -> bool:
    return job.end is None or job.end.status not in ("done", "preempted")


def _pieces(job: Job) -> list[_Piece]:
    """The job's time between marks. Time in a step that is under way goes to the piece that completes it."""
    pieces = []
    before = Mark(job.time, job.resumed_step, {})
    held: dict[str, float] = {}
    for mark in job.marks:
        names = mark.seconds.keys() | before.seconds.keys()
        spent = {n: mark.seconds.get(n, 0.0) - before.seconds.get(n, 0.0) for n in names}
        if mark.step == before.step:
            held = {name: held.get(name, 0.0) + spent.pop(name, 0.0) for name in OF_STEPS}
        else:
            spent |= {name: spent.get(name, 0.0) + held.get(name, 0.0) for name in OF_STEPS}
            held = {}
        pieces.append(_Piece(before.step, mark.step, spent))
        before = mark
    return [*pieces, _Piece(before.step, before.step, held)]


def _steps(
    jobs: Sequence[Job], pieces: Sequence[Sequence[_Piece]], seconds: dict[str, float]
) -> float:
    """Add the time of steps to its parts. Returns how many were done again.

    From the last piece to the first: a step is lost when anything later began at or before it.
    """
    begins_again = float("inf")  # the least step at which anything later began
    num_repeated = 0.0
    for job, parts in zip(reversed(jobs), reversed(pieces), strict=True):
        for piece in reversed(parts):
            num_steps = piece.last - piece.first
            kept = min(piece.last, begins_again) - piece.first
            # a step begun and never completed, and one from which the job went back, count for nothing
            share = min(1.0, max(0.0, kept / num_steps)) if num_steps > 0 else 0.0
            num_repeated += max(0, num_steps) * (1 - share)
            spent = [piece.seconds.get(name, 0.0) for name in OF_STEPS]
            seconds["useful"] += spent[0] * share
            seconds["data"] += spent[1] * share
            seconds["repeated"] += sum(spent) * (1 - share)
            if num_steps < 0:
                begins_again = min(begins_again, piece.last)
        begins_again = min(begins_again, job.resumed_step)
    return num_repeated
