"""`cloze doctor --cluster PRESET`: one task on each machine of a job in, one table and one verdict out.

    salloc --nodes=2 --gpus-per-node=8 cloze doctor --cluster PRESET [key=value ...]
    srun --nodes=2 --ntasks-per-node=1 cloze doctor --cluster PRESET [key=value ...]
    torchrun --nnodes 2 --nproc-per-node 1 ... -m launcher.cli doctor --cluster PRESET [key=value ...]

Each task looks at its own machine, and tells the first one, which says who is measured with whom, and judges.
Every wait has an end: a machine that is down, a port that is blocked, a disk that hangs are named, no more.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

from launcher.cluster_board import Board, clock_offset, get, own_address, put
from launcher.cluster_env import site_environment
from launcher.cluster_facts import Asked, Disks, Facts, Preset, collect
from launcher.cluster_first import RESULT_SECONDS, First, needs_of
from launcher.cluster_group import READY_SECONDS, Group, Member, Workers
from launcher.cluster_meeting import Notes, join, neighbours, unseen, wait_for_verdict
from launcher.cluster_place import Place, host_name, read_place, srun_command
from launcher.target import is_preset
from trainer.checkpoint_files import SLURM_FOLDER

ROUND_SECONDS = READY_SECONDS + RESULT_SECONDS  # for the next round to be told
VERDICT_SECONDS = 600.0  # for a machine that cannot take part to wait for those that can


def run(options: argparse.Namespace) -> int:
    """Print what was found, on the first machine. 0, or 1 where something is a PROBLEM, on all of them.

    ValueError where this is no preset, or not one task on a machine.
    """
    if not is_preset(options.target):
        raise ValueError(
            f"--cluster examines machines for a run: {options.target} is no preset (.yaml)"
        )
    again = [sys.executable, "-m", "launcher.cli", *sys.argv[1:]]
    if command := srun_command(os.environ, again):
        os.execvpe(command[0], command, site_environment())
    place = read_place(os.environ)
    preset = Preset.read(Path(options.target), options.overrides)
    if preset.problem and place.size == 1:
        raise ValueError(preset.problem)
    folder = None
    if preset.run:
        folder = Path(preset.run.dir).absolute() / SLURM_FOLDER / f"doctor-{place.job}"
    with Workers() as workers, _open_board(place) as board:
        notes = Notes(folder)
        if place.rank == 0:
            notes.clear()
        disks = Disks.ask(preset.run, folder)
        needs = Asked(lambda: needs_of(preset.run) if place.rank == 0 else None)
        workers.wait()
        member = Member(
            place.rank, host_name(os.environ), _address(place), board.port, workers.num_gpus
        )
        facts = collect(member, preset, workers.problem, disks)
        notes.is_usable = facts.run.problem is None
        try:
            if place.rank > 0:
                return _follow(place, facts, notes, workers, options.wait_seconds)
            first = First(place, board, facts, notes, workers)
            return first.examine(options.target, needs, options.wait_seconds)
        finally:
            notes.leave(facts.run.made)


def _open_board(place: Place) -> Board:
    """On the first machine at the port where the run's processes would meet; where it is taken, at another."""
    try:
        return Board(place.port if place.rank == 0 else 0)
    except OSError:
        return Board(0)


def _address(place: Place) -> str:
    """Where others reach this machine."""
    if place.rank == 0:
        return place.first_host
    try:
        return own_address(place.first_host)
    except OSError:  # its name is not known: join() will say so
        return place.first_host


def _follow(place: Place, facts: Facts, notes: Notes, workers: Workers, wait_seconds: float) -> int:
    """The part of every task but the first: do what that one says, until it has judged."""
    board = join(place, facts, notes, wait_seconds)
    if isinstance(board, str):
        where = f"{place.first_host}:{place.port}"
        _say(f"{facts.member.host} cannot reach {where}: {board}")
        if not wait_for_verdict(notes, VERDICT_SECONDS if notes.read("first") else 0.0):
            _say(f"{facts.member.host} has no verdict: the first machine is not there")
        notes.remove(f"blocked-{place.rank}")
        return 1
    try:
        notes.write(f"seen-{place.rank}", {"rank": place.rank})
        put(board, f"clock/{place.rank}", clock_offset(board))
        plan = get(board, "plan", ROUND_SECONDS + wait_seconds)
        members = {told[0]: Member(*told) for told in plan["members"]}
        others = neighbours(plan["noted"], place.rank) if place.rank in plan["noted"] else []
        put(board, f"unseen/{place.rank}", unseen(notes, others))
        for number in itertools.count():
            groups = get(board, f"round/{number}", ROUND_SECONDS)
            if groups is None:
                break
            for group in (Group(name, tuple(ranks), backend) for name, ranks, backend in groups):
                if place.rank in group.ranks:
                    result = workers.take_part(group, members, place.rank, board)
                    put(board, f"result/{group.name}/{place.rank}", result)
        status = get(board, "verdict", ROUND_SECONDS)
        notes.remove(f"seen-{place.rank}")
        put(board, f"goodbye/{place.rank}", True)
        return status
    except OSError as error:
        _say(f"{facts.member.host} has no verdict: the first machine is gone: {error}")
        return 1


def _say(message: str) -> None:
    print(f"cloze: {message}", file=sys.stderr, flush=True)
