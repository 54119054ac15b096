"""Loader processes in, deaf to what asks a training process to stop: it still needs their rows to end well.

Ctrl-C, torchrun, DeepSpeed's launcher and Slurm send a signal to every process of a job, those that make
micro-batches too. A loader process ends with its rank: when that is done with it, ends it, or is gone.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from threading import Thread

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LOOK_SECONDS = 1.0  # between looks for the rank


def start_fork_server() -> None:
    """Start the process that forks loader processes, with the signals blocked, which they inherit."""
    with _blocked():
        resource_tracker.ensure_running()
    with _blocked():  # again: starting the tracker has unblocked some
        forkserver.ensure_running()


@contextmanager
def _blocked() -> Iterator[None]:
    """What comes meanwhile is heard afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_rank(rank_pid: int, worker: int) -> None:
    """In a loader process, where signals are blocked: end when the rank sends a SIGTERM, or is gone.

    Of that nobody else tells it: the fork server, whose child it is, lives for as long as its children do.
    """
    del worker

    def listen() -> None:
        told = None
        while _exists(rank_pid) and (told is None or told.si_pid != rank_pid):
            told = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECONDS)
        os._exit(0)

    Thread(target=listen, name="rank", daemon=True).start()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
