"""What happened to a run, job by job, out: RUN/jobs.jsonl, which outlives every job.

Kinds of lines: start, progress (seconds of this job by activity so far), event (something to know of),
end. A job without an end was killed; its last line tells when it was last seen.
"""

import json
import os
import socket
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trainer.activity import Activity
from trainer.exit_status import DONE, PREEMPTED, Diverged, Status, exit_status_of
from trainer.watchdog import is_explained

LEDGER_FILE = "jobs.jsonl"
PROGRESS_SECONDS = 5.0  # between two lines of progress


class Ledger:
    """One job's lines. Only rank 0 writes; for the others every method does nothing."""

    def __init__(self, run_dir: Path, activity: Activity, *, is_main: bool) -> None:
        self.job = uuid.uuid4().hex[:8]
        self.path, self._activity = run_dir / LEDGER_FILE, activity
        self._file = self.path.open("a", encoding="utf-8") if is_main else None
        if self._file and self.path.stat().st_size and not ends_with_newline(self.path):
            self._file.write("\n")  # the last line of a killed job may be cut
        self._progress_at = 0.0
        self.longest_save_seconds = 0.0  # of saves that have ended
        self.status: Status = "failed"  # what an end without an error is: set when it is known

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.end(self.status, PREEMPTED if self.status == "preempted" else DONE)
        elif not is_explained(self.path.parent, self.job):
            status: Status = "diverged" if isinstance(error, Diverged) else "failed"
            self.end(status, exit_status_of(error), str(error))
        if self._file:
            self._file.close()

    def start(self, **facts: Any) -> None:
        """facts: world_size, zero_stage, precision, resumed_step, num_steps."""
        self._write(
            "start", time=self._activity.process_began, host=socket.gethostname(), pid=os.getpid(),
            slurm_job_id=os.environ.get("SLURM_JOB_ID"), **facts,
        )  # fmt: skip

    def progress(self, step: int, *, now: bool = False) -> None:
        """now: even if the last such line is only seconds old."""
        if self._file and (now or time.monotonic() - self._progress_at > PROGRESS_SECONDS):
            self._progress_at = time.monotonic()
            self._write(
                "progress", step=step, seconds=self._activity.accounted(), **self._longest()
            )

    def event(self, what: str, step: int, message: str) -> None:
        """Something a person may want to know later; said aloud too."""
        if self._file:
            print(f"{what.replace('_', ' ')} at step {step}: {message}", flush=True)
        self._write("event", what=what, step=step, message=message)

    def end(self, status: Status, exit_status: int, message: str = "") -> None:
        self._write(
            "end", status=status, step=self._activity.step, exit_status=exit_status,
            message=message, seconds=self._activity.accounted(), **self._longest(),
        )  # fmt: skip

    def _longest(self) -> dict[str, float]:
        """What a stop may take: a step, and a checkpoint."""
        return {
            "longest_step_seconds": self._activity.longest_step_seconds,
            "longest_save_seconds": self.longest_save_seconds,
        }

    def _write(self, kind: str, **values: Any) -> None:
        if self._file is None:
            return
        line = {"kind": kind, "job": self.job, "time": time.time(), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
