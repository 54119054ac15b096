"""What all tasks tell in, who is measured with whom, then the verdict out: the part of the first task."""

import os
import time
from collections.abc import Sequence
from typing import Any

from data.shards import Dataset
from launcher.cluster_board import Board, get, put
from launcher.cluster_facts import Asked, Facts
from launcher.cluster_group import KILL_SECONDS, Group, Member, Workers
from launcher.cluster_judge import Examined, judge
from launcher.cluster_links import Measured, pair_rounds, pair_speeds, slow_pairs
from launcher.cluster_machine import Needs
from launcher.cluster_meeting import (
    LOOK_SECONDS,
    SEEN_SECONDS,
    Heard,
    Notes,
    gather,
    neighbours,
    unseen,
)
from launcher.cluster_place import Place
from launcher.cluster_slurm import SlurmJob, read_job
from launcher.doctor import report_text
from launcher.doctor_plan import room_for_checkpoints
from trainer.config import RunConfig

RESULT_SECONDS = KILL_SECONDS + 30  # for all machines of a round to tell what came of it
GOODBYE_SECONDS = 10.0
NEEDS_SECONDS = 120.0  # since the beginning: for imports, and a disk
REPEATS, MOST_REPEATS = 2, 8  # of slow pairs, when nothing else is under way; of so many of them
TAKEN = "it is taken by another program"


class First:
    """The first task. Others do what it puts on its board, and wait for its verdict."""

    def __init__(
        self, place: Place, board: Board, facts: Facts, notes: Notes, workers: Workers
    ) -> None:
        self._place, self._board, self._facts = place, board, facts
        self._notes, self._workers = notes, workers
        self._members: dict[int, Member] = {}
        self._rounds = 0
        self._lost: list[int] = []
        self._measured: list[Measured] = []

    def examine(self, target: str, needs: "Asked[Needs | None]", wait_seconds: float) -> int:
        """Print the table. 0, or 1 where something is a PROBLEM; every task is told."""
        status, heard = 1, Heard({}, {})
        try:
            heard = gather(self._place, self._board, self._facts, self._notes, wait_seconds)
            findings = judge(self._examined(heard, needs))
            status = int(any(found.verdict == "PROBLEM" for found in findings))
            print(report_text(target, findings), flush=True)
        finally:
            self._end(heard, status)
        return status

    def _examined(self, heard: Heard, needs: "Asked[Needs | None]") -> Examined:
        """Everything that can be found out, in turn: clocks, what each sees of the others, links."""
        place, facts = self._place, heard.facts
        joined = [rank for rank in sorted(facts) if rank not in heard.not_joined]
        self._members = {rank: facts[rank].member for rank in joined}
        if place.port not in (0, self._board.port):
            heard.not_joined[0] = TAKEN
        self._notes.write("seen-0", {"rank": 0})
        clocks = {0: 0.0, **self._collect("clock", joined[1:], SEEN_SECONDS)}
        noted = [rank for rank in joined if self._writes_notes(facts[rank])]
        put(self._board, "plan", {"members": list(self._members.values()), "noted": noted})
        not_seen = {0: unseen(self._notes, neighbours(noted, 0))} if 0 in noted else {}
        not_seen |= self._collect("unseen", joined[1:], 2 * SEEN_SECONDS)
        self._measure_all(joined)
        put(self._board, f"round/{self._rounds}", None)
        hosts = dict(enumerate(place.names)) | {r: f.member.host for r, f in facts.items()}
        return Examined(
            place, hosts, dict(sorted(facts.items())), heard.not_joined, self._lost, clocks, not_seen,
            self._measured, _answer(needs), _job(),
        )  # fmt: skip

    @staticmethod
    def _writes_notes(facts: Facts) -> bool:
        return not facts.preset_problem and not facts.run.problem

    def _measure_all(self, joined: list[int]) -> None:
        """Every pair; slow ones again, alone; and, if all of them work, all machines at once."""
        num_gpus = [self._members[rank].num_gpus for rank in joined]
        backends = ["nccl", "gloo"] if all(num_gpus) else ["gloo"]
        for number, pairs in enumerate(pair_rounds(joined)):
            self._round([Group(f"{number}-{a}-{b}", (a, b), backends[0]) for a, b in pairs])
        for again in range(REPEATS):
            for a, b in slow_pairs(pair_speeds(self._measured))[:MOST_REPEATS]:
                self._round([Group(f"again-{again}-{a}-{b}", (a, b), backends[0])])
        if self._lost or any(one.speed is None for one in self._measured):
            return
        for backend in backends:
            processes = sum(num_gpus) if backend == "nccl" else len(joined)
            if processes > 1 and (len(joined) != 2 or backend != backends[0]):
                self._round([Group(f"all-{backend}", tuple(joined), backend)])

    def _round(self, groups: list[Group]) -> None:
        """Groups of different machines, at the same time. What is not told in time, never will be."""
        groups = [group for group in groups if not set(group.ranks) & set(self._lost)]
        put(self._board, f"round/{self._rounds}", groups)
        self._rounds += 1
        own: dict[str, Any] = {}
        for group in groups:
            if 0 in group.ranks:
                own[group.name] = self._workers.take_part(group, self._members, 0, self._board)
        deadline = time.monotonic() + RESULT_SECONDS
        for group in groups:
            others = [rank for rank in group.ranks if rank != 0]
            left = deadline - time.monotonic()
            results = self._collect(f"result/{group.name}", others, left)
            if 0 in group.ranks:
                results[0] = own[group.name]
            self._measured.append(Measured(group, results))

    def _collect(self, name: str, ranks: Sequence[int], seconds: float) -> dict[int, Any]:
        """What these tell under that name; who does not, in time, is lost."""
        told: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        for rank in set(ranks) - set(self._lost):
            try:
                told[rank] = get(
                    self._board, f"{name}/{rank}", max(0.0, deadline - time.monotonic())
                )
            except TimeoutError:
                self._lost.append(rank)
        return told

    def _end(self, heard: Heard, status: int) -> None:
        """Tell the verdict, wait until all know it, and leave nothing behind."""
        put(self._board, f"round/{self._rounds}", None)
        put(self._board, "verdict", status)
        self._notes.write("verdict", {"status": status})
        blocked = [rank for rank in heard.facts if rank in heard.not_joined and rank > 0]
        joined = [rank for rank in heard.facts if rank not in heard.not_joined and rank > 0]
        self._collect("goodbye", joined, GOODBYE_SECONDS)
        deadline = time.monotonic() + GOODBYE_SECONDS
        while any(self._notes.read(f"blocked-{rank}") for rank in blocked):
            if time.monotonic() > deadline:
                break
            time.sleep(LOOK_SECONDS / 2)
        self._notes.clear()
        self._notes.leave([path for facts in heard.facts.values() for path in facts.run.made])


def needs_of(run: RunConfig | None) -> Needs | None:
    """What the run asks of machines. ValueError or OSError where the dataset cannot be opened."""
    from launcher.submit import needed_seconds  # imports torch, in seconds

    if run is None:
        return None
    vocab_size = Dataset.open(run.data.path, run.data.storage).vocab_size
    return Needs(run, room_for_checkpoints(run, vocab_size), needed_seconds(run))


def _answer(needs: "Asked[Needs | None]") -> Needs | None:
    """None where there is none: what is wrong with the dataset is another finding."""
    try:
        return needs.answer(NEEDS_SECONDS)
    except (ValueError, OSError):
        return None


def _job() -> SlurmJob | str | None:
    try:
        return read_job(os.environ)
    except OSError as error:
        return str(error)
