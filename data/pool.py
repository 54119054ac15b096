"""A function and its tasks in, results as they come out: in this process, or in several others."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from types import ModuleType
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result], tasks: list[Task], num_processes: int
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, result) in the order of completion. The first error stops the rest and is raised.

    ChildProcessError: a worker was killed.

    Workers are forked from a clean server process, never from this one, whose threads would not survive
    it; and they end with this process, even if it is killed.
    """
    if num_processes == 1 or len(tasks) <= 1:
        for task in tasks:
            yield task, function(task)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    workers = min(num_processes, len(tasks))
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        with _main_left_out():
            futures = {pool.submit(function, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a worker process died at once, as when memory runs out ({workers} processes are at work). "
                "Run again, with fewer processes: what is finished is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _main_left_out() -> Iterator[None]:
    """Workers would import the program that this is, torch and all, of which their tasks need nothing."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_with_parent() -> None:
    """A worker waits for tasks for ever, also when nobody is left to give it any: so watch the parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
