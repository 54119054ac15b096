"""What a job's exit status says: whether to start it again, and why not. As in sysexits.h, where it has one."""

from typing import Literal

Status = Literal["done", "preempted", "failed", "diverged", "hung"]
DONE = 0
UNAVAILABLE = 69  # other processes of the job, or the way to them, were not there
BUG = 70  # an error that is none of the others
STORAGE = 74  # a disk: full, read-only, broken
PREEMPTED = 75  # asked to stop, and saved: the same command goes on
CONFIG = 78  # what was asked for cannot be done; nothing is mended by trying again
DIVERGED = 79  # the loss is lost, also from earlier checkpoints
HUNG = 124  # as of timeout(1)
NOT_TO_REPEAT = (DONE, STORAGE, PREEMPTED, CONFIG, DIVERGED)


class Diverged(ValueError):
    """The loss cannot be brought back: another learning rate, or other data, is needed."""


class NotJoined(RuntimeError):
    """The processes of a job have not found each other."""


def exit_status_of(error: BaseException) -> int:
    if isinstance(error, Diverged):
        return DIVERGED
    if isinstance(error, NotJoined):
        return UNAVAILABLE
    if isinstance(error, OSError):
        return STORAGE
    return CONFIG if isinstance(error, ValueError) else BUG
