"""Signals, a time limit and a STOP file in, one wish to stop out, which all ranks agree on at the next step.

A handler only notes the signal: whatever is under way (a step, an evaluation, a checkpoint) is finished.
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import FrameType

from data.loader_workers import STOP_SIGNALS
from trainer.exit_status import PREEMPTED

PLANNED = STOP_SIGNALS
STOP_FILE = "STOP"
POLL_SECONDS = 5.0  # between looks for the file: it may be on a shared disk
SAFETY = 1.5  # on the time that a step and a checkpoint took so far
SPARE_SECONDS = 5.0


class StopRequest:
    """The first reason to stop that this process has heard of, or None."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._heard: dict[int, float] = {}  # signal -> when it came first
        self._polled_at = 0.0
        self._deadline: float | None = None  # time.time()
        self._limit = ""

    def listen(self) -> None:
        """From now on signals are noted. The same one a second time, a second later, ends the process."""
        for number in PLANNED:
            signal.signal(number, self._note)

    @contextmanager
    def leaving_at_once(self, leave: Callable[[int], object]) -> Iterator[None]:
        """Within the block nothing is there to be saved: a signal, also one before it, calls leave(PREEMPTED).

        From a thread: what this process waits for meanwhile, the other ranks, does not let handlers run.
        """
        heard, told = socket.socketpair()
        told.setblocking(False)

        def listen() -> None:
            while self.reason is None:
                number = heard.recv(1)
                if not number:
                    return
                if number[0] in PLANNED:
                    break
            os.write(2, b"cloze: asked to stop before the first step\n")
            leave(PREEMPTED)

        thread = Thread(target=listen, name="stop", daemon=True)
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            told.close()  # the thread reads nothing, and ends
            thread.join()
            heard.close()

    def set_time_limit(self, began: float, minutes: float | None) -> None:
        """Of this job. began: time.time() of its start. Slurm's own end of the job counts too."""
        ends = []
        if minutes is not None:
            ends.append((began + 60 * minutes, f"time_limit_minutes {minutes:g}"))
        slurm = os.environ.get("SLURM_JOB_END_TIME", "")
        if slurm.isdigit():
            ends.append((float(slurm), "the end of the Slurm job"))
        if ends:
            self._deadline, self._limit = min(ends)

    def look(self, run_dir: Path, step_seconds: float, save_seconds: float) -> None:
        """Whether the time is up, or somebody has put a STOP file into the run's folder. For rank 0."""
        if self.reason is not None:
            return
        needed = SAFETY * (step_seconds + save_seconds) + SPARE_SECONDS
        if self._deadline is not None and time.time() + needed > self._deadline:
            left = max(0.0, self._deadline - time.time())
            self.reason = f"{self._limit} is {left:.0f} s away; a step and a checkpoint may take {needed:.0f} s"
        if time.monotonic() - self._polled_at > POLL_SECONDS:
            self._polled_at = time.monotonic()
            if (run_dir / STOP_FILE).exists():
                (run_dir / STOP_FILE).unlink()
                self.reason = f"{run_dir / STOP_FILE} was found (and removed)"

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        name, now = signal.Signals(number).name, time.monotonic()
        first = self._heard.setdefault(number, now)
        if self.reason is None:
            self.reason = name
            say = (
                f"cloze: {name}: stopping after this step; once more ends it without a checkpoint\n"
            )
            os.write(2, say.encode())
        elif now - first > 1 and number in (signal.SIGINT, signal.SIGTERM):
            os.write(2, f"cloze: {name} again: ending now, without a checkpoint\n".encode())
            os._exit(128 + number)
