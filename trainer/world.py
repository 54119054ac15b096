"""The launcher's environment in, this process's place among the ranks out, with a few collectives."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class AgreedError(ValueError):
    """A problem that every rank raises, in the same words: one of them has to say it."""

    is_of_all_ranks = True


class AgreedStorageError(OSError):
    """The same of a disk or server that failed."""

    is_of_all_ranks = True


@dataclass(frozen=True)
class World:
    """Who this process is. All methods that talk to other ranks must be called by every rank."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    host_group: Any = None  # what is no tensor of the model is agreed on without the GPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[int]) -> list[int]:
        """Elementwise sum over ranks, exact, modulo 2^64. Collective."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.host_group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Collective; for small objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank. Collective; for small objects."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def fail_together(self, problem: str | None, *, is_storage: bool = False) -> None:
        """Raise the same error on every rank when any of them has a problem. Collective.

        is_storage: of a disk or server, not of what was asked for. AgreedError where any problem is none of
        storage, else AgreedStorageError.
        """
        problems = [
            (told, of_storage) for told, of_storage in self.gather((problem, is_storage)) if told
        ]
        if problems:
            kind = AgreedStorageError if all(of for _, of in problems) else AgreedError
            raise kind("\n".join(dict.fromkeys(told for told, _ in problems)))


def read_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's or deepspeed's variables; (0, 1, 0) without."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in os.environ]
    if not given:
        return 0, 1, 0
    if len(given) < len(names):
        missing = [name for name in names if name not in given]
        raise ValueError(
            f"the environment has {given} but not {missing}: start with torchrun or deepspeed"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def device_of(local_rank: int) -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


LEAST_COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def collective_timeout(hang_timeout_seconds: float) -> timedelta:
    """After which a collective fails that a peer does not take part in. The watchdog speaks first."""
    return max(LEAST_COLLECTIVE_TIMEOUT, 3 * timedelta(seconds=hang_timeout_seconds))
