"""Processes that torchrun starts again meet each other, and none that have ended."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import pytest
from support import launch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from trainer.joining import agree_on_name

PATIENCE = timedelta(seconds=60)


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, timeout=PATIENCE)


def agree(server: TCPStore, delays_seconds: Sequence[float]) -> list[str]:
    """The names that as many ranks agree on, each of which comes so late."""
    names = [""] * len(delays_seconds)

    def come(rank: int) -> None:
        time.sleep(delays_seconds[rank])
        store = TCPStore("127.0.0.1", server.port, is_master=False, timeout=PATIENCE)
        names[rank] = agree_on_name(store, rank, len(names), PATIENCE)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_every_start_has_a_name_of_its_own_whoever_comes_first(server: TCPStore) -> None:
    starts = [agree(server, delays) for delays in ([0, 0, 0], [0.3, 0, 0], [0, 0.3, 0.6], [0, 0.3])]
    for names in starts:
        assert len(set(names)) == 1 and names[0]
    assert len({names[0] for names in starts}) == len(starts)


def test_one_that_gave_up_before_the_others_came_is_not_waited_for(server: TCPStore) -> None:
    a_second = timedelta(seconds=1)
    alone = TCPStore("127.0.0.1", server.port, is_master=False, timeout=a_second)
    with pytest.raises(RuntimeError):
        agree_on_name(alone, 1, 2, a_second)
    first, second = agree(server, [0, 0.3])
    assert first == second


def test_torchrun_starts_again_in_a_part_of_its_store_that_is_new() -> None:
    result = launch(processes=2, script=["--max-restarts=1", "tests/joining_worker.py"])
    assert result.returncode == 0, result.stderr[-3000:]
    addresses = [key for key in result.stdout.split() if "//cpu//" in key]
    assert sorted(Counter(key.split("/")[0] for key in addresses).values()) == [2, 2], addresses
