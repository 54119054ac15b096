"""Ledgers made by hand, line for line as a job writes them."""

import json
from pathlib import Path
from typing import Any

ACTIVITIES = ("startup", "data", "step", "log", "eval", "save", "rewind")


class Ledger:
    """Lines of jobs.jsonl. The clock moves on by what activities take, and by `wait`."""

    def __init__(self, time: float = 1_000_000.0) -> None:
        self.time = time
        self.lines: list[dict[str, Any]] = []
        self.step, self.num_jobs = 0, 0
        self.seconds: dict[str, float] = {}

    def start(self, resumed_step: int, **more: Any) -> "Ledger":
        self.num_jobs += 1
        self.step = resumed_step
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        line = {
            "kind": "start", "job": f"{self.num_jobs:08x}", "time": self.time, "host": "here", "pid": 7,
            "slurm_job_id": None, "world_size": 2, "zero_stage": 1, "precision": "bf16",
            "resumed_step": resumed_step, "num_steps": 100,
        }  # fmt: skip
        self.lines.append({**line, **more})
        return self

    def progress(self, reached: int | None = None, /, **spent: float) -> "Ledger":
        """spent: activity=seconds since the line before."""
        return self._timed("progress", reached, spent)

    def event(self, what: str, message: str) -> "Ledger":
        self._line("event", step=self.step, what=what, message=message)
        return self

    def end(self, status: str, exit_status: int = 0, message: str = "") -> "Ledger":
        return self._timed("end", None, {}, status=status, exit_status=exit_status, message=message)

    def wait(self, seconds: float) -> "Ledger":
        self.time += seconds
        return self

    def text(self) -> str:
        return "".join(json.dumps(line) + "\n" for line in self.lines)

    def write(self, run: Path) -> None:
        (run / "jobs.jsonl").write_text(self.text(), encoding="utf-8")

    def _timed(self, kind: str, step: int | None, spent: dict[str, float], **more: Any) -> "Ledger":
        for name, value in spent.items():
            self.seconds[name] += value
            self.time += value
        self.step = self.step if step is None else step
        self._line(kind, step=self.step, **more, seconds=dict(self.seconds))
        return self

    def _line(self, kind: str, **more: Any) -> None:
        name = f"{self.num_jobs:08x}"
        self.lines.append({"kind": kind, "job": name, "time": self.time, **more})
