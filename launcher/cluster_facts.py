"""A machine in, what it is like out: all that `cloze doctor --cluster` can see without the other machines.

A disk that does not answer holds up nothing: what is asked of it is asked in a thread, and given up.
"""

import os
import platform
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import xxhash

from data.files import file_digest
from data.shards import Dataset
from launcher.cluster_gpus import Gpu, read_gpus
from launcher.cluster_group import Member
from launcher.environment import CODE, ROOT, environment_lines
from trainer.config import RunConfig, load_config, to_yaml

DISK_SECONDS = 60.0  # for all that is asked of disks
PROBE_BYTES = 1 << 26
PROBE_SECONDS = 5.0  # of writing, before the fsync
CHUNK_BYTES = 1 << 22
LIMITS = {
    "open files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "locked memory": resource.RLIMIT_MEMLOCK,
    "file size": resource.RLIMIT_FSIZE,
    "address space": resource.RLIMIT_AS,
}
VARIABLES = ("NCCL_", "GLOO_", "TORCH_", "OMP_NUM_THREADS")  # names begin so
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")

Value = TypeVar("Value")


class Disk(NamedTuple):
    """A folder that is to be written to. problem: why it cannot be."""

    folder: str
    problem: str | None = None
    free_bytes: int = 0
    free_files: int | None = None  # None: the file system has no such limit
    write_bytes_per_second: float = 0.0
    made: tuple[str, ...] = ()  # folders that were not there


class Facts(NamedTuple):
    """Of one task's machine. In JSON a dictionary."""

    member: Member
    worker_problem: str | None
    packages: list[str]
    kernel: str
    code: str  # digests
    preset: str
    dataset: str
    preset_problem: str | None
    dataset_problem: str | None
    run: Disk
    temporary: Disk
    shared_memory_bytes: int
    limits: dict[str, int | None]  # soft ones; None: unlimited
    has_infiniband: bool
    variables: dict[str, str]
    interfaces: list[str]
    own_name_problem: str | None
    gpus: list[Gpu]
    gpu_problem: str | None
    num_given_gpus: int | None

    def to_json(self) -> dict[str, Any]:
        return self._asdict()

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Facts":
        """ValueError where another version of this program has told them."""
        if set(told) != set(cls._fields):
            raise ValueError(f"facts have the fields {sorted(set(told) ^ set(cls._fields))} or not")
        known = {
            "member": Member(*told["member"]),
            "run": Disk(*told["run"]),
            "temporary": Disk(*told["temporary"]),
            "gpus": [Gpu(*gpu) for gpu in told["gpus"]],
        }
        return cls(**{**told, **known})


class Asked(Generic[Value]):
    """A question to a disk, under way in a thread of its own."""

    def __init__(self, question: Callable[[], Value]) -> None:
        self._answer: list[Value] = []
        self._error: Exception | None = None
        self._began = time.monotonic()

        def ask() -> None:
            try:
                self._answer.append(question())
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=ask, daemon=True)
        self._thread.start()

    def answer(self, seconds: float) -> Value:
        """What came of it, within that time of the beginning. OSError where nothing did; what was raised."""
        self._thread.join(max(0.0, self._began + seconds - time.monotonic()))
        if self._error is not None:
            raise self._error
        if not self._answer:
            raise OSError(f"no answer within {seconds:.0f} s: the disk, or its server, hangs")
        return self._answer[0]


class Preset(NamedTuple):
    """The settings and their digest, or what is wrong with them, or with reading them."""

    run: RunConfig | None
    digest: str
    problem: str | None

    @classmethod
    def read(cls, path: Path, overrides: list[str]) -> "Preset":
        def read() -> Preset:
            run = load_config(path, overrides)
            written = to_yaml(run).encode() + Path(run.deepspeed).read_bytes()
            return Preset(run, xxhash.xxh3_128_hexdigest(written), None)

        try:
            return Asked(read).answer(DISK_SECONDS)
        except (ValueError, OSError) as error:
            return cls(None, "", str(error))


class Disks(NamedTuple):
    """What is asked of disks. run: of the run's folder, by a file in `probes`, a folder in it."""

    run: Asked[Disk]
    temporary: Asked[Disk]
    dataset: Asked[str]

    @classmethod
    def ask(cls, run: RunConfig | None, probes: Path | None) -> "Disks":
        return cls(
            Asked(lambda: try_disk(probes, PROBE_BYTES) if probes else Disk("", "is not known")),
            Asked(lambda: try_disk(Path(tempfile.gettempdir()), 1)),
            Asked(lambda: Dataset.open(run.data.path, run.data.storage).digest if run else ""),
        )


def collect(member: Member, preset: Preset, worker_problem: str | None, disks: Disks) -> Facts:
    """All that is known of this machine. worker_problem: why it cannot take part in all-reduces."""
    gpus, gpu_problem = [], None
    try:
        gpus = read_gpus()
    except OSError as error:
        gpu_problem = str(error)
    dataset, dataset_problem = "", None
    try:
        dataset = disks.dataset.answer(DISK_SECONDS)
    except (ValueError, OSError) as error:
        dataset_problem = str(error)
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return Facts(
        member=member,
        worker_problem=worker_problem,
        packages=environment_lines(),
        kernel=platform.release(),
        code=code_digest(),
        preset=preset.digest,
        dataset=dataset,
        preset_problem=preset.problem,
        dataset_problem=dataset_problem,
        run=_answered(disks.run, preset.run.dir if preset.run else ""),
        temporary=_answered(disks.temporary, "the temporary folder"),
        shared_memory_bytes=_size(SHARED_MEMORY),
        limits={name: _soft_limit(number) for name, number in LIMITS.items()},
        has_infiniband=INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
        variables={n: v for n, v in sorted(os.environ.items()) if n.startswith(VARIABLES)},
        interfaces=[name for _, name in socket.if_nameindex()],
        own_name_problem=own_name_problem(),
        gpus=gpus,
        gpu_problem=gpu_problem,
        num_given_gpus=int(given) if given.isdigit() else None,
    )


def try_disk(folder: Path, num_bytes: int) -> Disk:
    """Make the folder, write so many bytes there, or a tenth of what is free, and force them to the disk."""
    made: list[str] = []
    try:
        for level in (*reversed(folder.parents), folder):
            if not level.exists():
                with suppress(FileExistsError):  # another task has just made it
                    level.mkdir()
                    made.append(str(level))
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize
        size = min(num_bytes, free // 10)
        chunk = os.urandom(min(CHUNK_BYTES, max(1, size)))
        began, written = time.monotonic(), 0
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            while not written or (written < size and time.monotonic() - began < PROBE_SECONDS):
                written += file.write(chunk)
            os.fsync(file.fileno())
        speed = written / (time.monotonic() - began)
    except OSError as error:
        return Disk(str(folder), error.strerror or str(error), made=tuple(made))
    files = status.f_favail if status.f_files else None
    return Disk(str(folder), None, free, files, speed, tuple(made))


def code_digest() -> str:
    """Of the program's files, wherever they lie."""
    digest = xxhash.xxh3_128()
    for part in CODE:
        for path in sorted((ROOT / part).rglob("*")):
            if path.suffix in (".py", ".json", ".sbatch") and path.is_file():
                digest.update(f"{path.relative_to(ROOT)} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def own_name_problem() -> str | None:
    """Where gloo would listen, were no interface named: at what this machine's own name leads to."""
    name = socket.gethostname()
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    except OSError:
        return f"{name} is not known to itself"
    away = [a for a in addresses if not a.startswith("127.") and a != "::1"]
    return None if away else f"{name} leads to {', '.join(sorted(addresses))}"


def _answered(asked: "Asked[Disk]", folder: str) -> Disk:
    try:
        return asked.answer(DISK_SECONDS)
    except OSError as error:
        return Disk(folder, str(error))


def _size(folder: Path) -> int:
    """Bytes of its file system; 0 where it cannot be written to."""
    if not os.access(folder, os.W_OK):
        return 0
    status = os.statvfs(folder)
    return status.f_blocks * status.f_frsize


def _soft_limit(number: int) -> int | None:
    soft = resource.getrlimit(number)[0]
    return None if soft == resource.RLIM_INFINITY else soft
