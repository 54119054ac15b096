"""A run's jobs.jsonl in, its jobs out: when each began, how far it came, where its time went, how it ended.

The file is only ever appended to, by the job that owns the run; a job that is killed can leave a cut line.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.ledger import LEDGER_FILE


@dataclass(frozen=True)
class Mark:
    """Where a job stood at one moment."""

    time: float  # unix seconds
    step: int  # completed, of the run
    seconds: Mapping[str, float]  # of this job so far, by activity


@dataclass(frozen=True)
class Event:
    time: float
    step: int | None
    what: str
    message: str


@dataclass(frozen=True)
class End:
    time: float
    status: str  # done, preempted, failed, diverged, hung
    exit_status: int | None
    message: str


@dataclass
class Job:
    """One start of the training program. What its line did not say is None."""

    name: str
    time: float  # when its process began
    resumed_step: int
    host: str | None = None
    pid: int | None = None
    slurm_job_id: str | None = None
    world_size: int | None = None
    zero_stage: int | None = None
    precision: str | None = None
    num_steps: int | None = None
    longest_step_seconds: float = 0.0
    longest_save_seconds: float = 0.0  # of a checkpoint, from its beginning until it was published
    marks: list[Mark] = field(default_factory=list)  # in the order of time
    events: list[Event] = field(default_factory=list)
    end: End | None = None  # None: it runs, or it was killed

    @property
    def last_time(self) -> float:
        """The last moment at which it is known to have lived."""
        times = [
            self.time,
            *(mark.time for mark in self.marks[-1:]),
            *(event.time for event in self.events[-1:]),
        ]
        return max([*times, self.end.time] if self.end else times)

    @property
    def last_step(self) -> int:
        return self.marks[-1].step if self.marks else self.resumed_step


def read_jobs(run: Path) -> list[Job]:
    """Jobs of a run, oldest first; none where the run has no ledger."""
    path = run / LEDGER_FILE
    if not path.is_file():
        return []
    return jobs_of(json_lines(path.read_text(encoding="utf-8", errors="replace")))


def json_lines(text: str) -> Iterator[dict[str, Any]]:
    """Each object of a JSON-lines text; a line that a kill has cut is left out, not what is right behind it."""
    for line in text.splitlines():
        for start in dict.fromkeys((0, line.rfind('{"kind"'))):
            try:
                value = json.loads(line[start:]) if start >= 0 else None
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value
                break


def jobs_of(lines: Iterable[Mapping[str, Any]]) -> list[Job]:
    """Jobs in the order of their first lines. Lines of kinds that are unknown here are passed over."""
    jobs: dict[str, Job] = {}
    for line in lines:
        kind, name = line.get("kind"), line.get("job")
        if not isinstance(name, str) or not isinstance(line.get("time"), int | float):
            continue
        if kind == "start" and name not in jobs:
            jobs[name] = _started(name, line)
        elif name in jobs:
            _add(jobs[name], line)
    return list(jobs.values())


def _started(name: str, line: Mapping[str, Any]) -> Job:
    known = ("host", "pid", "slurm_job_id", "world_size", "zero_stage", "precision", "num_steps")
    told: dict[str, Any] = {key: line.get(key) for key in known}
    return Job(name, line["time"], line.get("resumed_step") or 0, **told)


def _add(job: Job, line: Mapping[str, Any]) -> None:
    time, step = line["time"], line.get("step")
    if line["kind"] in ("progress", "end") and "seconds" in line and step is not None:
        job.marks.append(Mark(time, step, line["seconds"]))
        job.longest_step_seconds = line.get("longest_step_seconds") or 0.0
        job.longest_save_seconds = line.get("longest_save_seconds") or 0.0
    if line["kind"] == "event":
        what, message = str(line.get("what", "event")), str(line.get("message", ""))
        job.events.append(Event(time, step, what, message))
    elif line["kind"] == "end":
        job.end = End(
            time,
            str(line.get("status", "ended")),
            line.get("exit_status"),
            str(line.get("message") or ""),
        )
