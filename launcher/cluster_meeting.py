"""Tasks that may not reach each other in, what each has to say out: over TCP, else by notes in a shared folder.

FOLDER/first.json       the first task listens
FOLDER/seen-3.json      task 3 was here: others look whether they see it
FOLDER/blocked-3.json   task 3 cannot reach the first one: why, and its facts
FOLDER/verdict.json     the exit status, for those that wait for it there
"""

import json
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from launcher.cluster_board import Address, Board, put, reason_of
from launcher.cluster_facts import Asked, Facts
from launcher.cluster_links import MOST_ROUNDS
from launcher.cluster_place import Place

NOTE_SECONDS = 20.0  # for a note to be written or read
LOOK_SECONDS = 1.0
BLOCKED_SECONDS = 4.0  # to go on trying when the first task is seen to be there
SEEN_SECONDS = 15.0  # for what another machine wrote to be seen: NFS remembers what was not there


class Notes:
    """The folder; where it cannot be used nothing is written, and nothing found."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.is_usable = True

    def clear(self) -> None:
        """Remove what an examination left that was killed."""
        for path in self._ask(lambda folder: list(folder.glob("*.json"))) or []:
            self.remove(path.stem)

    def write(self, name: str, value: Any) -> None:
        def publish(folder: Path) -> None:
            temporary = folder / f"{name}.{os.getpid()}"
            try:
                temporary.write_text(json.dumps(value), encoding="utf-8")
                temporary.rename(folder / f"{name}.json")
            finally:
                temporary.unlink(missing_ok=True)

        self._ask(publish)

    def read(self, name: str) -> Any:
        """None where it is not there, or cannot be read."""
        return self._ask(lambda folder: json.loads((folder / f"{name}.json").read_bytes()))

    def remove(self, name: str) -> None:
        self._ask(lambda folder: (folder / f"{name}.json").unlink())

    def leave(self, made: Collection[str]) -> None:
        """Remove the folder and those above it that were `made` for this, as far as they are empty."""
        for path in (self._folder, *self._folder.parents) if self._folder else ():
            if str(path) in made:
                with suppress(OSError):
                    Asked(path.rmdir).answer(NOTE_SECONDS)

    def _ask(self, do: Callable[[Path], Any]) -> Any:
        folder = self._folder
        if folder is None or not self.is_usable:
            return None
        with suppress(OSError, ValueError):
            return Asked(lambda: do(folder)).answer(NOTE_SECONDS)


class Heard(NamedTuple):
    """What the first task has heard. not_joined: rank -> why; some of them have left their facts in a note."""

    facts: dict[int, Facts]
    not_joined: dict[int, str]


def join(place: Place, facts: Facts, notes: Notes, seconds: float) -> Address | str:
    """Tell the first task our facts. Its board, or why it was not reached in time: it finds that in a note."""
    deadline, first, board = time.monotonic() + seconds, None, Address(place.first_host, place.port)
    while True:
        try:
            put(board, f"facts/{place.rank}", facts.to_json(), 0)
            return board
        except OSError as error:
            reason = reason_of(error)
        if first is None and (first := notes.read("first")):
            board = Address(place.first_host, first["port"])  # another where the right one is taken
            deadline = min(deadline, time.monotonic() + BLOCKED_SECONDS)
        if time.monotonic() > deadline:
            break
        time.sleep(LOOK_SECONDS)
    notes.write(f"blocked-{place.rank}", {"reason": reason, "facts": facts.to_json()})
    return reason


def gather(place: Place, board: Board, facts: Facts, notes: Notes, seconds: float) -> Heard:
    """Wait until all tasks were heard of, in one way or the other, but not longer."""
    heard = Heard({0: facts}, {})
    notes.write("first", {"port": board.port})
    deadline = time.monotonic() + seconds
    missing = set(range(1, place.size))
    while missing:
        for rank in sorted(missing):
            told, reason = board.values.wait(f"facts/{rank}", 0)[1], None
            if told is None and (note := notes.read(f"blocked-{rank}")):
                told, reason = note["facts"], note["reason"]
            if told is None:
                continue
            missing.discard(rank)
            try:
                heard.facts[rank] = Facts.from_json(told)
            except (ValueError, TypeError, KeyError):
                reason = "it runs another version of this program"
            if reason:
                heard.not_joined[rank] = reason
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(LOOK_SECONDS / 2)
    for rank in sorted(missing):
        heard.not_joined[rank] = f"was not heard of within {seconds:.0f} s"
    return heard


def unseen(notes: Notes, ranks: list[int]) -> list[int]:
    """Those of `ranks` whose notes cannot be seen here."""
    deadline = time.monotonic() + SEEN_SECONDS
    left = list(ranks)
    while True:
        left = [rank for rank in left if notes.read(f"seen-{rank}") != {"rank": rank}]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(LOOK_SECONDS / 2)


def neighbours(ranks: list[int], own: int) -> list[int]:
    """The others; of more than can be paired, those that follow in the circle."""
    at = ranks.index(own)
    return (ranks[at + 1 :] + ranks[:at])[:MOST_ROUNDS]


def wait_for_verdict(notes: Notes, seconds: float) -> bool:
    """Whether the first task has ended its examination; our own note tells it, when gone, that we know."""
    deadline = time.monotonic() + seconds
    while notes.read("verdict") is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True
