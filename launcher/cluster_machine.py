"""What one machine has told in, what is wrong with it by itself out: disks, memory, limits and network."""

from typing import NamedTuple

from data.diagnosis import Verdict
from launcher.cluster_facts import Facts
from launcher.doctor_plan import Room
from launcher.tables import bytes_text
from trainer.config import RunConfig

LEAST_TEMPORARY_BYTES = 5e8
SHARED_BYTES_PER_GPU, SHARED_BYTES_PER_LOADER = 128e6, 64e6  # NCCL's channels; batches on their way
FILES, FILES_PER_RANK = 256, 4  # libraries and shards; connections, of several groups of processes
PROCESSES_PER_RANK = 512  # threads count
LEAST_FREE_FILES = 1000


class Needs(NamedTuple):
    """What the run asks of machines."""

    run: RunConfig
    room: Room
    signal_seconds: int


class Illness(NamedTuple):
    """One line of the table, but for whose it is; machines that have the same one share it."""

    found: str
    advice: str
    verdict: Verdict = "PROBLEM"


def room_text(needs: Needs, free: int) -> str:
    return (
        f"{bytes_text(needs.room.one_bytes)} a checkpoint, {bytes_text(needs.room.needed_bytes)} for "
        f"{needs.run.keep_checkpoints} + 1; {bytes_text(free)} free"
    )


def disk(facts: Facts, needs: Needs | None) -> list[Illness]:
    """Room for checkpoints in the run's folder, as this machine sees it."""
    disk, ill = facts.run, []
    if disk.problem or needs is None:
        return []
    if disk.free_bytes < needs.room.needed_bytes:
        advice = "The run would stop at a checkpoint that does not fit. Free some space, or give another dir=."
        ill.append(Illness(room_text(needs, disk.free_bytes), advice))
    if disk.free_files is not None and disk.free_files < LEAST_FREE_FILES:
        advice = "Of small files there are many in a run. Delete some, or have the quota raised."
        ill.append(Illness(f"{disk.free_files} more files can be made", advice))
    return ill


def temporary_folder(facts: Facts) -> list[Illness]:
    disk, advice = facts.temporary, "torchrun and libraries write there. TMPDIR names another one."
    if disk.problem:
        return [Illness(f"{disk.folder}: {disk.problem}", advice)]
    if disk.free_bytes < LEAST_TEMPORARY_BYTES:
        free = f"{disk.folder}: {bytes_text(disk.free_bytes)} free"
        return [Illness(free, advice, "WARNING")]
    return []


def shared_memory(facts: Facts, needs: Needs | None) -> list[Illness]:
    gpus = facts.member.num_gpus
    loaders = needs.run.data.num_workers * max(1, gpus) if needs else 0
    if facts.shared_memory_bytes >= SHARED_BYTES_PER_GPU * gpus + SHARED_BYTES_PER_LOADER * loaders:
        return []
    size = bytes_text(facts.shared_memory_bytes)
    advice = (
        "Batches of loader workers, and what NCCL sends within a machine, go through it; where it is full they "
        "die of a bus error. Enlarge it: `mount -o remount,size=8G /dev/shm`; of a container, --shm-size."
    )
    verdict: Verdict = "WARNING" if facts.shared_memory_bytes else "PROBLEM"
    return [Illness(f"{size} for {gpus} GPUs and {loaders} loader workers", advice, verdict)]


def ulimits(facts: Facts, needs: Needs | None, num_ranks: int) -> list[Illness]:
    """num_ranks: of the whole run."""
    here, limits, ill = max(1, facts.member.num_gpus), facts.limits, []
    counts = {
        "open files": FILES + FILES_PER_RANK * num_ranks,
        "processes": PROCESSES_PER_RANK * here,
    }
    for name, needed in counts.items():
        if (limit := limits[name]) is not None and limit < needed:
            advice = f"{needed:,} may be needed: `ulimit` in slurm/cluster.env, or of slurmd on the nodes."
            ill.append(Illness(f"{limit:,} {name}", advice, "WARNING"))
    size = limits["file size"]
    if size is not None and needs and size < needs.room.one_bytes:
        advice = (
            "A checkpoint's files may be larger: who writes one is killed. `ulimit -f unlimited`."
        )
        ill.append(Illness(f"files of up to {bytes_text(size)}", advice))
    if (locked := limits["locked memory"]) is not None and facts.has_infiniband:
        advice = "InfiniBand locks what it sends, or fails. `ulimit -l unlimited`, of slurmd on the nodes."
        ill.append(Illness(f"{bytes_text(locked)} of locked memory", advice, "WARNING"))
    if (space := limits["address space"]) is not None:
        advice = (
            "CUDA and mapped files take addresses without memory behind. `ulimit -v unlimited`."
        )
        ill.append(Illness(f"{bytes_text(space)} of addresses", advice, "WARNING"))
    return ill


def network_interface(facts: Facts) -> list[Illness]:
    """Where gloo would listen."""
    chosen = facts.variables.get("GLOO_SOCKET_IFNAME")
    if chosen is None:
        if facts.own_name_problem is None:
            return []
        advice = (
            "gloo listens at what the machine's own name leads to, and is not reached there. Set "
            "GLOO_SOCKET_IFNAME (slurm/cluster.env) to the network between machines: `ip -brief address`."
        )
        return [Illness(facts.own_name_problem, advice)]
    unknown = [name for name in chosen.split(",") if name not in facts.interfaces]
    if not unknown:
        return []
    found = (
        f"GLOO_SOCKET_IFNAME names {', '.join(unknown)}; there are {', '.join(facts.interfaces)}"
    )
    return [Illness(found, "No process could join the others. See `ip -brief address` there.")]
