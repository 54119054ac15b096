"""Every step's loss and gradient norm in, what to do about it out: nothing, say so, or go back.

The gradient of a NaN never reaches the weights: DeepSpeed passes over such a step, and where it does not
(stage 0 in fp32) `trainer.engine.step` does. What is decided here is what comes after.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["fine", "skipped", "alarm", "rewind"]


@dataclass(frozen=True)
class GuardConfig:
    """What is taken for a spike, and what is done then. Chowdhery et al. 2022 (PaLM, 5.1) went back
    by about 100 steps and passed over the rows of 200 to 500."""

    window: int = 100  # steps that a loss is compared with; none is judged before so many
    alarm_sigmas: float = (
        8.0  # above the window's median, in robust standard deviations: said aloud
    )
    rewind_sigmas: float = 20.0  # so far above for `patience` steps in a row: back to a checkpoint
    patience: int = 5  # steps in a row that are skipped (NaN), or spikes, before the run goes back
    max_rewinds: int = 2  # of a run at one checkpoint; then it ends

    def __post_init__(self) -> None:
        problems = [
            f"guard.{name} {getattr(self, name)} is below {least}"
            for name, least in (
                ("window", 10),
                ("patience", 1),
                ("max_rewinds", 0),
                ("alarm_sigmas", 1),
            )
            if getattr(self, name) < least
        ]
        if self.rewind_sigmas < self.alarm_sigmas:
            problems.append(
                f"guard.rewind_sigmas {self.rewind_sigmas} is below alarm_sigmas {self.alarm_sigmas}"
            )
        if problems:
            raise ValueError("; ".join(problems))


class Guard:
    """Equal on every rank, as all see the same losses. Its memory is short, and is not saved."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.forget()

    def forget(self) -> None:
        """A new stretch of the curve begins: other rows, or another place."""
        self._losses: deque[float] = deque(maxlen=self.config.window)
        self._skipped_in_a_row = self._spikes_in_a_row = 0
        self.first_bad_step: int | None = None  # of what led to the last verdict

    def judge(self, step: int, loss: float, grad_norm: float) -> tuple[Verdict, str]:
        """step: the one just made, counted from 1. The message is empty when all is fine."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._judge_skipped(step, loss, grad_norm)
        self._skipped_in_a_row = 0
        sigmas = self._sigmas(loss)
        if sigmas <= self.config.alarm_sigmas:
            self._losses.append(loss)  # a spike is no measure of what is usual
            self._spikes_in_a_row, self.first_bad_step = 0, None
            return "fine", ""
        median = statistics.median(self._losses)
        message = (
            f"loss {loss:.4f} is {sigmas:.1f} standard deviations above {median:.4f}, the usual"
        )
        if sigmas <= self.config.rewind_sigmas:
            self._spikes_in_a_row = 0
            return "alarm", message
        self._note_bad(step)
        self._spikes_in_a_row += 1
        if self._spikes_in_a_row < self.config.patience:
            return "alarm", message
        return "rewind", f"{message}, as for {self._spikes_in_a_row} steps now"

    def _judge_skipped(self, step: int, loss: float, grad_norm: float) -> tuple[Verdict, str]:
        self._note_bad(step)
        self._skipped_in_a_row += 1
        message = f"loss {loss}, gradient norm {grad_norm}: the weights stay as they were"
        if self._skipped_in_a_row < self.config.patience:
            return "skipped", message
        return "rewind", f"{message}, for {self._skipped_in_a_row} steps now"

    def _note_bad(self, step: int) -> None:
        if self.first_bad_step is None:
            self.first_bad_step = step

    def _sigmas(self, loss: float) -> float:
        """How far above the window's median, by the median absolute deviation (outliers do not move it)."""
        if len(self._losses) < self.config.window:
            return 0.0
        median = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(value - median) for value in self._losses)
        return (loss - median) / max(spread, 1e-3 * abs(median), 1e-9)
