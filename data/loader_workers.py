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


def heed_rank_only(rank_pid: int, worker: int) -> None:
    """In a loader process, where signals are blocked: a SIGTERM of its rank ends it all the same."""
    del worker

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank_pid:
            pass
        os._exit(0)

    Thread(target=listen, name="signals", daemon=True).start()
