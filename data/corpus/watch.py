"""Nothing in, an end out: a worker whose parent was killed would otherwise wait for tasks for ever."""

import os
import threading
from functools import cache
from multiprocessing import connection
from typing import Any

import multiprocess


@cache
def end_with_parent() -> None:
    """Watch the parent of a datatrove worker from now on. Does nothing elsewhere."""
    parent: Any = multiprocess.parent_process()  # pyright: ignore[reportAttributeAccessIssue]
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
