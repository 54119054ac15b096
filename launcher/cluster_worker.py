"""Lines of JSON in, lines of JSON out: a process that takes part in all-reduces, checks and times them.

`launcher.cluster_group` starts one for each GPU, or one without GPUs, and ends it when it hangs:

    python -m launcher.cluster_worker GPU
    -> {"cuda_devices": 8}
    <- {"rank": 0, "size": 2, "backend": "gloo", "host": "", "port": 0, "seconds": 30}   rank 0 listens
    -> {"port": 41211}                                                                  the others are told it
    -> {"bytes_per_second": 1.1e9, "num_bytes": 16777216, "num_wrong": 0}               or {"error": "..."}
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LEAST_BYTES = 1 << 16
MOST_BYTES = {"gloo": 1 << 24, "nccl": 1 << 28}
LONG_SECONDS = 0.1  # of one all-reduce: more bytes would not tell more
REPETITIONS = 3
MEASURED_SECONDS, MOST_REPETITIONS = 0.5, 50  # of the largest one
PATTERN = 251  # values repeat after so many: sums of up to 5,000 ranks are exact in fp32


def main(gpu: int) -> None:
    say = _take_stdout()
    say({"cuda_devices": torch.cuda.device_count()})
    for line in sys.stdin:
        try:
            say(take_part(json.loads(line), gpu, say))
        except Exception as error:  # whatever it is: it is what this process is here to find out
            say({"error": _first_line(error)})
            return  # the state of the library is not known: another process will take our place


def take_part(group: dict[str, Any], gpu: int, say: Callable[[dict], None]) -> dict[str, Any]:
    """One group's all-reduces; every rank of it returns the same speed. Raises what torch raises."""
    rank, size, timeout = group["rank"], group["size"], timedelta(seconds=group["seconds"])
    host = "127.0.0.1" if rank == 0 else group["host"]
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        host, group["port"], is_master=rank == 0, timeout=timeout, wait_for_workers=False
    )
    if rank == 0:
        say({"port": store.port})
    device = torch.device("cpu")
    if group["backend"] == "nccl":
        device = torch.device("cuda", gpu)
        torch.cuda.set_device(device)
    dist.init_process_group(
        group["backend"], store=store, rank=rank, world_size=size, timeout=timeout
    )
    try:
        return measure(rank, size, device, MOST_BYTES[group["backend"]])
    finally:
        dist.destroy_process_group()


def measure(rank: int, size: int, device: torch.device, most_bytes: int) -> dict[str, Any]:
    """Time all-reduces of growing size until one takes long enough, and that one for a while. Collective.

    bytes_per_second: that each rank sends and receives, 2 (size - 1) / size of the bytes reduced, as in NCCL's
    tests; of the fastest one, for whatever else happens on the machines only slows it down.
    num_wrong: values, of all, that were not the sum.
    """
    num_bytes, num_wrong = LEAST_BYTES, 0
    while True:
        fastest, wrong = _repeated(REPETITIONS, rank, size, num_bytes, device)
        num_wrong += wrong
        if fastest > LONG_SECONDS or num_bytes >= most_bytes:
            break
        num_bytes *= 4
    more = min(MOST_REPETITIONS, math.ceil(MEASURED_SECONDS / fastest))
    again, wrong = _repeated(more, rank, size, num_bytes, device)
    speed = 2 * (size - 1) / size * num_bytes / min(fastest, again)
    return {"bytes_per_second": speed, "num_bytes": num_bytes, "num_wrong": num_wrong + wrong}


def _repeated(
    times: int, rank: int, size: int, num_bytes: int, device: torch.device
) -> tuple[float, int]:
    """(seconds of the fastest, wrong values), the same on every rank: so all go on, or none. Collective."""
    base = torch.arange(num_bytes // 4, device=device, dtype=torch.float32) % PATTERN
    wanted = size * base + size * (size - 1) / 2
    fastest, num_wrong = float("inf"), 0
    for _ in range(times):
        values = base + rank
        fastest = min(fastest, _timed(values, device))
        num_wrong += int(torch.count_nonzero(values != wanted))
    told = torch.tensor([fastest, num_wrong], dtype=torch.float64, device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    fastest, most_wrong = told.tolist()
    return fastest, int(most_wrong)


def _timed(values: torch.Tensor, device: torch.device) -> float:
    """Seconds of one all-reduce of `values`, in place."""
    _settle(device)
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(values)
    _settle(device)
    return time.perf_counter() - began


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _take_stdout() -> Callable[[dict], None]:
    """Keep the way out for our lines: NCCL and others print what they like to stdout."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    return say


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


if __name__ == "__main__":
    main(int(sys.argv[1]))
