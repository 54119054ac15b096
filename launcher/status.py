"""`cloze status RUN`: a run's folder in, how the run is doing out; also while it runs.

Only files are read, none is locked or written. What the folder does not tell is not printed.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.settings import read_settings
from launcher.checkpoint_facts import CheckpointFacts, known_checkpoints
from launcher.goodput import Account, account_of
from launcher.jobs import Job, json_lines, read_jobs
from launcher.owner import Owner, owner_of
from launcher.probe_lines import read_probes
from launcher.save_interval import hint
from launcher.status_text import how_it_ended, status_text

SILENT_SECONDS = 120  # a job on another machine that has written nothing for so long may be gone
RECENT_SECONDS = 600  # over which the speed for the ETA is taken
ENDS = {"done": "finished"}  # status of a job's end -> state of the run, where they differ


@dataclass(frozen=True)
class Status:
    """What is not known is None."""

    run: str
    state: (
        str  # running, finished, preempted, killed, failed, diverged, hung, stopped, unknown, new
    )
    owner: Owner
    num_steps: int | None  # of the whole run
    step: int
    train: list[dict[str, Any]]  # lines of metrics.jsonl, oldest first
    heldout: dict[str, Any] | None  # the last evaluation
    eta_seconds: float | None
    jobs: list[Job]
    account: Account | None
    checkpoints: list[CheckpointFacts]
    problems: list[str]  # of checkpoints that cannot be read
    hint: str | None
    probes: list[dict[str, Any]]  # lines of probes.jsonl, oldest first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(options: argparse.Namespace) -> int:
    """ValueError when the folder holds no run."""
    status = read_status(options.run, now=time.time())
    if options.json:
        print(json.dumps(as_json(status), indent=1))
    else:
        encoding = (sys.stdout.encoding or "").lower()
        print(status_text(status, ascii_only=not encoding.startswith("utf")))
    return 0


def read_status(run: Path, *, now: float) -> Status:
    """ValueError when the folder holds no run."""
    config = _config(run / "config.yaml")
    num_steps = config.get("steps")
    owner, jobs = owner_of(run), read_jobs(run)
    train, heldout = _metrics(run / "metrics.jsonl")
    checkpoints, problems = known_checkpoints(run)
    step = max(
        [
            *(line["step"] for line in train[-1:]),
            *(job.last_step for job in jobs[-1:]),
            *(checkpoint.step for checkpoint in checkpoints[-1:]),
        ],
        default=0,
    )
    state = state_of(owner, jobs, step=step, num_steps=num_steps, now=now)
    eta = _seconds_per_step(jobs, train) if state == "running" and num_steps else None
    return Status(
        run=str(run),
        state=state,
        owner=owner,
        num_steps=num_steps,
        step=step,
        train=train,
        heldout=heldout,
        eta_seconds=None if eta is None or not num_steps else eta * (num_steps - step),
        jobs=jobs,
        account=account_of(jobs),
        checkpoints=checkpoints,
        problems=problems,
        hint=hint(jobs, config.get("save_every") or 0),
        probes=read_probes(run),
    )


def _config(path: Path) -> dict[str, Any]:
    """As it stands there: a run of another version has a status too."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is no run: it has no config.yaml")
    values = read_settings(path, "settings")
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings")
    return values


def state_of(owner: Owner, jobs: list[Job], *, step: int, num_steps: int | None, now: float) -> str:
    """One word for where the run stands."""
    if owner.is_held:
        return "running"
    if not jobs:
        if owner.is_held is None:
            return "unknown"
        if num_steps and step >= num_steps:
            return "finished"
        return "stopped" if step or owner.pid else "new"
    end = jobs[-1].end
    if end is not None:
        return ENDS.get(end.status, end.status)
    if owner.is_held is None:
        return "running" if now - jobs[-1].last_time < SILENT_SECONDS else "unknown"
    return "killed"


def _metrics(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    if not path.is_file():
        return [], None
    lines = list(json_lines(path.read_text(encoding="utf-8", errors="replace")))
    train = [line for line in lines if line.get("kind") == "train" and "step" in line]
    heldout = [line for line in lines if line.get("kind") == "heldout" and "step" in line]
    return train, heldout[-1] if heldout else None


def _seconds_per_step(jobs: list[Job], train: list[dict[str, Any]]) -> float | None:
    """Lately, with evaluations and saves where the ledger tells them. None: not known yet."""
    marks = jobs[-1].marks if jobs else []
    recent = [mark for mark in marks if mark.time >= marks[-1].time - RECENT_SECONDS]
    recent = [mark for mark in recent if mark.seconds.get("step")]  # training has begun
    if recent and recent[-1].step > recent[0].step:
        return (recent[-1].time - recent[0].time) / (recent[-1].step - recent[0].step)
    return train[-1].get("step_seconds") if train else None


def as_json(status: Status) -> dict[str, Any]:
    """Everything that is known, for programs."""
    last = status.train[-1] if status.train else {}
    values: dict[str, Any] = {
        "run": status.run,
        "state": status.state,
        "owner": {k: v for k, v in status.owner._asdict().items() if v is not None},
        "step": status.step,
        "num_steps": status.num_steps,
        "train": last,
        "heldout": status.heldout,
        "eta_seconds": status.eta_seconds,
        "goodput": _account_json(status.account),
        "jobs": [_job_json(status, job) for job in status.jobs],
        "checkpoints": [asdict(checkpoint) for checkpoint in status.checkpoints],
        "problems": status.problems,
        "hint": status.hint,
        "probes": status.probes,
    }
    return _known(values)


def _account_json(account: Account | None) -> dict[str, Any] | None:
    return {**asdict(account), "goodput": account.goodput} if account else None


def _job_json(status: Status, job: Job) -> dict[str, Any]:
    values = asdict(job)
    del values["marks"]
    return {
        **values,
        "last_time": job.last_time,
        "last_step": job.last_step,
        "ended": how_it_ended(status, job),
    }


def _known(value: Any) -> Any:
    """Without what is None; and no NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _known(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_known(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
