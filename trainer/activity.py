"""What this process is doing, in and out: seconds by activity for the ledger, and a heartbeat to watch.

The heartbeat is a small piece of shared memory: the watchdog reads it from another process, so it tells of
a process that is stopped, or whose interpreter is stuck, as well as of one that waits.
"""

import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Name = Literal[
    "startup", "data", "counts", "forward", "backward", "optimizer", "log", "eval", "save", "rewind"
]
NAMES: tuple[Name, ...] = get_args(Name)  # within a step in this order: see trainer.watchdog
OF_A_STEP = ("counts", "forward", "backward", "optimizer")
HEARTBEAT = struct.Struct("=qqdd16s")  # as Heartbeat


@dataclass(frozen=True)
class Heartbeat:
    step: int  # completed ones
    activity: Name
    since: float  # time.monotonic(), which all processes of a machine share
    longest_step_seconds: float
    job: str  # the ledger's name of this job; empty until all ranks know it


class Activity:
    """One per process, from its beginning. `enter` costs about a microsecond."""

    def __init__(self) -> None:
        self.seconds: dict[Name, float] = dict.fromkeys(NAMES, 0.0)
        self.descriptor = os.memfd_create("cloze-heartbeat")
        os.ftruncate(self.descriptor, HEARTBEAT.size)
        self._memory = mmap.mmap(self.descriptor, HEARTBEAT.size)
        self.step, self.longest_step_seconds, self.job = 0, 0.0, ""
        self.current: Name = "startup"
        age = _age_of_this_process()
        self.process_began = time.time() - age
        self._since = self._step_began = time.monotonic()
        self.seconds["startup"] = age
        self._beat()

    def enter(self, name: Name) -> None:
        """Leave what was being done until now, and do `name` from now on."""
        now = time.monotonic()
        self.seconds[self.current] += now - self._since
        self.current, self._since = name, now
        self._beat()

    @contextmanager
    def during(self, name: Name) -> Iterator[None]:
        """Do `name`, then what was done before."""
        before = self.current
        self.enter(name)
        yield
        self.enter(before)

    def step_done(self, step: int) -> None:
        """`step` steps are completed now."""
        now = time.monotonic()
        self.longest_step_seconds = max(self.longest_step_seconds, now - self._step_began)
        self.step = step
        self._beat()

    def step_begins(self, step: int) -> None:
        """The step after `step` completed ones: its data is waited for from now on."""
        self.step, self._step_began = step, time.monotonic()
        self.enter("data")

    def accounted(self) -> dict[str, float]:
        """Seconds by activity since the process began; what a step consists of is one. They add up."""
        self.enter(self.current)
        seconds = {name: self.seconds[name] for name in NAMES if name not in OF_A_STEP}
        return {**seconds, "step": sum(self.seconds[name] for name in OF_A_STEP)}

    def _beat(self) -> None:
        HEARTBEAT.pack_into(
            self._memory, 0, self.step, NAMES.index(self.current), self._since,
            self.longest_step_seconds, self.job.encode(),
        )  # fmt: skip


def read_heartbeat(memory: mmap.mmap) -> Heartbeat:
    step, activity, since, longest, job = HEARTBEAT.unpack_from(memory, 0)
    return Heartbeat(step, NAMES[activity], since, longest, job.rstrip(b"\0").decode())


def _age_of_this_process() -> float:
    """Seconds since it was started: what Python and its imports took so far counts too."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
