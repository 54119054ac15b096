"""A piece of work in, the memory that its tensors took out: what is there at rest, and the peak.

On GPUs torch's allocator counts. On CPUs nothing does, so torch's profiler tells of every allocation of one
piece of work, and what was there before is counted tensor by tensor.
"""

import gc
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Allocation(NamedTuple):
    """Memory taken from torch's allocator on a CPU, or given back."""

    time: int  # nanoseconds
    num_bytes: int  # negative: given back


def live_bytes() -> int:
    """Bytes of all tensors in the CPU memory of this process, each storage once. Takes about a second."""
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if type(found) not in (torch.Tensor, torch.nn.Parameter):
            continue
        for tensor in (found, found.grad if found.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def allocations(profiler: profile) -> list[Allocation]:
    """In the order of time. profiler: with profile_memory, and stopped."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    found = [
        # torch declares no nbytes
        Allocation(event.start_ns(), event.nbytes())  # pyright: ignore[reportAttributeAccessIssue]
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return sorted(found, key=lambda allocation: allocation.time)


def peak_of(found: Iterable[Allocation]) -> int:
    """The most bytes that were held at once, over what was held before."""
    held = most = 0
    for allocation in found:
        held += allocation.num_bytes
        most = max(most, held)
    return most


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes of CPU tensors while `work` runs, with those that were there before."""
    before = live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    return before + peak_of(allocations(profiler))
