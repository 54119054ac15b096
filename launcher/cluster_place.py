"""A launcher's environment in, this task's place among the machines that `cloze doctor --cluster` examines out.

One task per machine: of a Slurm step, of torchrun, or started by hand with RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. Without any of these it is alone.
"""

import itertools
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

FIRST_SPECIAL_STEP = 0xFFFFFFF0  # ids of batch scripts and of interactive shells: no step of srun


class Place(NamedTuple):
    """Task `rank` of `size`; the first one listens at `first_host`, `port`."""

    rank: int
    size: int
    names: tuple[str, ...]  # of the tasks' machines, as the launcher calls them
    first_host: str
    port: int  # 0: any
    job: str  # the same for all tasks of this examination, and of no other that runs now
    launcher: str  # "slurm", "torchrun", "hand" or "none"


def read_place(environment: Mapping[str, str]) -> Place:
    """Who this task is. ValueError where there is more than one on a machine, or half of the variables."""
    if "RANK" in environment:
        return _of_variables(environment)
    if in_step(environment):
        return _of_slurm(environment)
    return Place(0, 1, ("this machine",), "127.0.0.1", 0, "alone", "none")


def in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < FIRST_SPECIAL_STEP


def srun_command(environment: Mapping[str, str], command: list[str]) -> list[str] | None:
    """`command` as one task on each node of the allocation that we are in; None where there is no need.

    In an allocation, but not in a step of it: in the shell of salloc, or in a batch script.
    """
    if "SLURM_JOB_ID" not in environment or in_step(environment) or "RANK" in environment:
        return None
    nodes = environment["SLURM_JOB_NUM_NODES"]
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):  # which srun does not take from there
        options.append(f"--cpus-per-task={cpus}")
    return ["srun", *options, "--kill-on-bad-exit=0", "--wait=0", *command]


def host_name(environment: Mapping[str, str]) -> str:
    """Of this machine, as Slurm calls it, or as it calls itself."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def rendezvous_port(job_id: int) -> int:
    """Of a job's processes, on its first node: the same as in slurm/train.sbatch."""
    return 20000 + job_id % 40000


def _of_slurm(environment: Mapping[str, str]) -> Place:
    names = tuple(host_names(environment["SLURM_STEP_NODELIST"]))
    size = int(environment["SLURM_STEP_NUM_TASKS"])
    if size != len(names):
        raise ValueError(
            f"{size} tasks on {len(names)} nodes: --cluster takes one on each: srun --nodes={len(names)} "
            f"--ntasks={len(names)} --ntasks-per-node=1 cloze doctor --cluster ..."
        )
    job = environment["SLURM_JOB_ID"]
    return Place(
        int(environment["SLURM_PROCID"]),
        size,
        names,
        names[0],
        rendezvous_port(int(job)),
        f"{job}-{environment['SLURM_STEP_ID']}",
        "slurm",
    )


def _of_variables(environment: Mapping[str, str]) -> Place:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in environment]:
        raise ValueError(f"the environment has RANK but not {', '.join(missing)}")
    rank, size, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if (here := int(environment.get("LOCAL_WORLD_SIZE", "1"))) != 1:
        raise ValueError(
            f"{here} tasks on this machine: --cluster takes one: torchrun --nproc-per-node 1"
        )
    if not 0 <= rank < size:
        raise ValueError(f"RANK {rank} is not below WORLD_SIZE {size}")
    # torchrun listens at MASTER_PORT itself
    by_torchrun = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(
        rank,
        size,
        tuple(f"task {number}" for number in range(size)),
        environment["MASTER_ADDR"],
        port + by_torchrun,
        f"{environment.get('TORCHELASTIC_RUN_ID', 'hand')}-{port}",
        "torchrun" if by_torchrun else "hand",
    )


def host_names(node_list: str) -> list[str]:
    """Slurm's short form in full: gpu[1-3,07],login -> gpu1 gpu2 gpu3 gpu07 login."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        pieces = [
            _numbers(piece[1:-1]) if piece.startswith("[") else [piece]
            for piece in re.findall(r"\[[^\]]*\]|[^\[]+", part)
        ]
        names += ["".join(words) for words in itertools.product(*pieces)]
    return names


def _numbers(ranges: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [
            f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)
        ]
    return numbers
