"""A run's folder in, whether a job has it now out: looked up, without touching the lock.

Trying to take the lock, be it for a moment, could turn away a job that starts at that moment.
"""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Owner(NamedTuple):
    """is_held: None where the last owner is on another machine, whose locks cannot be seen from here."""

    is_held: bool | None
    host: str | None = None
    pid: int | None = None


def owner_of(run: Path) -> Owner:
    """Who has the run's lock, or had it last."""
    last = _read(run / "owner.json")
    host, pid = last.get("host"), last.get("pid")
    holders = lock_holders(run / "lock")
    if holders:
        return Owner(True, socket.gethostname(), pid if pid in holders else min(holders))
    if host not in (None, socket.gethostname()):
        return Owner(None, host, pid)
    return Owner(False, host, pid)


def lock_holders(lock: Path) -> set[int]:
    """Processes of this machine that have `lock` open and locked, as the kernel tells."""
    try:
        wanted = lock.stat()
    except OSError:
        return set()
    return {pid for pid, descriptor in _open_as(lock.name) if _locks(pid, descriptor, wanted)}


def _open_as(name: str) -> Iterator[tuple[int, str]]:
    """(process, descriptor) of every open file of that name that this user may see."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            for descriptor in os.listdir(process / "fd"):
                if os.readlink(process / "fd" / descriptor).endswith(f"/{name}"):
                    yield int(process.name), descriptor
        except OSError:  # it has ended, closed the file, or belongs to somebody else
            continue


def _locks(pid: int, descriptor: str, wanted: os.stat_result) -> bool:
    try:
        found = os.stat(f"/proc/{pid}/fd/{descriptor}")
        told = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text(encoding="utf-8")
    except OSError:
        return False
    return os.path.samestat(found, wanted) and "FLOCK" in told


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
