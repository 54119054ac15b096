"""Groups of machines in, what their all-reduces came to out: a machine's part, by processes that can be killed.

A library may hang where a network is broken, and no timeout of its own is to be relied on.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

from launcher.cluster_board import CONNECT_SECONDS, Address, Board, get, put, why_not_reached

READY_SECONDS = 120.0  # to import torch, perhaps from a slow disk
GROUP_SECONDS = 40.0  # for a group to meet and to be measured: torch's own timeout
KILL_SECONDS = 50.0  # then its processes are killed


class Member(NamedTuple):
    """A machine that takes part. JSON hands it on as a list."""

    rank: int
    host: str
    address: str
    port: int  # of its board
    num_gpus: int


class Group(NamedTuple):
    """name: of no other group of this examination. ranks: of its machines, the first one's store is used."""

    name: str
    ranks: tuple[int, ...]
    backend: str  # gloo: one process on each machine; nccl: one for each GPU


class Worker:
    """One process of launcher.cluster_worker."""

    def __init__(self, gpu: int) -> None:
        self._errors = os.fdopen(os.memfd_create("errors"), "w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launcher.cluster_worker", str(gpu)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, "TORCH_CPP_LOG_LEVEL": "FATAL"},
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.has_ended = False

    def _read(self) -> None:
        for line in self._out:
            self._lines.put(line)
        self._lines.put("")

    def send(self, request: dict[str, Any]) -> None:
        with suppress(BrokenPipeError, ValueError):  # it has ended: receive() will tell
            self._in.write(json.dumps(request) + "\n")
            self._in.flush()

    def receive(self, seconds: float) -> dict[str, Any]:
        """Its next line; {"error": ...} where it has failed, or said nothing in time, and is no more."""
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.end()
            return {"error": f"nothing within {seconds:.0f} s: it hung, and was killed"}
        answer = json.loads(line or "{}")
        if answer and "error" not in answer:
            return answer
        said = self.end()
        return answer or {
            "error": f"its process ended with {self._process.returncode}: {said[:300]}"
        }

    def end(self) -> str:
        """Kill it. The last line that it wrote to stderr."""
        if self.has_ended:
            return ""
        self.has_ended = True
        self._process.kill()
        self._process.wait()
        self._reader.join(timeout=5)
        self._out.close()
        with suppress(BrokenPipeError):
            self._in.close()
        with self._errors as errors:
            errors.seek(0)
            return "".join(errors.read().decode(errors="replace").strip().splitlines()[-1:])


class Workers:
    """This machine's processes: one, and as many more as torch sees GPUs. Ended with the block."""

    def __init__(self) -> None:
        self._workers = [Worker(0)]
        self.num_gpus = 0
        self.problem: str | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.end()

    def wait(self) -> None:
        """Until all can take part; else `problem` says why not."""
        deadline = time.monotonic() + READY_SECONDS
        ready = self._workers[0].receive(READY_SECONDS)
        self.num_gpus = ready.get("cuda_devices", 0)
        self._workers += [Worker(gpu) for gpu in range(1, self.num_gpus)]
        answers = [ready] + [w.receive(deadline - time.monotonic()) for w in self._workers[1:]]
        self.problem = next((answer["error"] for answer in answers if "error" in answer), None)

    def take_part(
        self, group: Group, members: dict[int, Member], own: int, board: Address | Board
    ) -> dict[str, Any]:
        """What came of a group: its speed and what was wrong, or `error`, or why the other was `unreached`.

        own: our rank. board: where the group's first machine tells its store's port.
        """
        if len(group.ranks) == 2:
            try:
                if said := _reach(group, members, own, board):
                    return said
            except OSError as error:
                return {"error": f"the other machine was not heard of: {error}"}
        size, first = 0, 0
        for rank in group.ranks:
            if rank == own:
                first = size
            size += _num_processes(members[rank], group.backend)
        here = self._ready(_num_processes(members[own], group.backend))
        head = members[group.ranks[0]]
        request = {
            "size": size, "backend": group.backend, "host": head.address, "port": 0, "seconds": GROUP_SECONDS,
        }  # fmt: skip
        deadline = time.monotonic() + KILL_SECONDS
        waiting = list(enumerate(here, first))
        if own == head.rank:
            here[0].send({**request, "rank": 0})
            answer = here[0].receive(KILL_SECONDS)
            if "error" in answer:
                return answer
            request["port"] = answer["port"]
            put(board, f"{group.name}/store", answer["port"])
            waiting = waiting[1:]
        else:
            try:
                request["port"] = get(board, f"{group.name}/store", GROUP_SECONDS)
            except OSError as error:
                return {"error": f"{head.host} did not begin: {error}"}
        for rank, worker in waiting:
            worker.send({**request, "rank": rank})
        answers = [worker.receive(deadline - time.monotonic()) for worker in here]
        return next((answer for answer in answers if "error" in answer), answers[0])

    def _ready(self, number: int) -> list[Worker]:
        """The first `number`; others take the place of those that have ended."""
        for gpu, worker in enumerate(self._workers):
            if worker.has_ended:
                self._workers[gpu] = Worker(gpu)
                self._workers[gpu].receive(READY_SECONDS)
        return self._workers[:number]


def _num_processes(member: Member, backend: str) -> int:
    return member.num_gpus if backend == "nccl" else 1


def _reach(
    group: Group, members: dict[int, Member], own: int, board: Address | Board
) -> dict[str, Any] | None:
    """Whether each of two machines can open a connection to the other. Both tell: neither waits in vain."""
    (other,) = (members[rank] for rank in group.ranks if rank != own)
    reason = why_not_reached(Address(other.address, other.port))
    put(board, f"{group.name}/reached/{own}", reason)
    seconds = 2 * CONNECT_SECONDS if reason else KILL_SECONDS
    theirs = get(board, f"{group.name}/reached/{other.rank}", seconds)
    if reason or theirs:
        return {"unreached": reason}
    return None
