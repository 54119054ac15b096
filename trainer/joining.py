"""torchrun's store in, a part of it out that belongs to this start of the processes alone.

torchrun keeps one store through all its restarts (torch 2.13), and in it the addresses of processes that have
ended. One that is early calls such an address: gloo fails at once, or two wait for each other. The count of
restarts tells no starts apart, for a machine that restarts because another does leaves its own count alone.
So the processes agree on a name first. Each leaves a mark of its own, and rank 0 calls the roll of all marks
until every process has answered a roll with its mark in it, which one that has ended cannot do.
"""

import hashlib
import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

LOOK_SECONDS = 0.002  # times the number of processes, which all look at the same store


def store_of_this_start(rank: int, size: int, timeout: timedelta) -> Store | None:
    """For `init_process_group`; None where torch makes a new one anyway, not under torchrun. Collective.

    RuntimeError when the others do not come within `timeout`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    store.set_timeout(timeout)
    return PrefixStore(agree_on_name(PrefixStore("starts", store), rank, size, timeout), store)


def agree_on_name(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """The same on all ranks, and never that of an earlier start with this store. Collective."""
    mark, answered = uuid.uuid4().hex[:16], ""
    store.set(str(rank), mark)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0:
            _call_roll(store, size)
        roll = store.get("roll").decode()
        if answered != _name(roll) and roll.split()[rank : rank + 1] == [mark]:
            answered = _name(roll)
            store.set(str(rank), f"{mark} {answered}")
        if answered and store.check(["agreed"]) and store.get("agreed").decode() == answered:
            return answered
        time.sleep(LOOK_SECONDS * size)
    raise RuntimeError(f"they did not agree within {timeout.total_seconds():.0f} s")


def _call_roll(store: Store, size: int) -> None:
    """What rank 0 does: show all marks, and say so when all have answered to these."""
    said = [words.decode().split() for words in store.multi_get([str(n) for n in range(size)])]
    roll = " ".join(mark for mark, *_ in said)
    store.set("roll", roll)
    if all(answer == [_name(roll)] for _, *answer in said):
        store.set("agreed", _name(roll))


def _name(roll: str) -> str:
    return hashlib.sha256(roll.encode()).hexdigest()[:16]
