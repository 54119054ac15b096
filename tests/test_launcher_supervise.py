"""What `cloze train` makes of how its processes end: shell scripts here, so that a start takes no time."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer

import pytest

from launcher import supervise
from trainer.stopping import PLANNED

Supervised = Callable[..., tuple[int, int]]
TOO_MANY = 20  # starts: no test needs so many


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervised]:
    """Supervise a script; returns the status and how often it was started. Handlers are put back at the end.

    checkpoints: so many of the starts make a new one.
    """
    handlers = {number: signal.getsignal(number) for number in PLANNED}
    monkeypatch.setattr(supervise, "LOOK_SECONDS", 0.02)

    def run(
        script: str, *, processes: int = 1, restarts: int = 3, checkpoints: int = 0
    ) -> tuple[int, int]:
        num_starts = 0

        def command(arguments: list[str], number: int) -> list[str]:
            nonlocal num_starts
            num_starts += 1
            assert num_starts < TOO_MANY, "it is started again and again"
            made = f"mkdir -p {tmp_path}/run/checkpoints/step-{num_starts:08d}; "
            return ["sh", "-c", (made if num_starts <= checkpoints else "") + script]

        monkeypatch.setattr(supervise, "launch_command", command)
        status = supervise.supervise([], processes, tmp_path / "run", restarts)
        return status, num_starts

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def leaves(*words: str | int) -> str:
    """Commands by which each rank leaves its word for the supervisor."""
    return "; ".join(
        f"printf '{word}' > $CLOZE_STATUS_FILE-{rank}" for rank, word in enumerate(words)
    )


def test_starts_without_a_new_checkpoint_are_bounded(
    supervised: Supervised, capsys: pytest.CaptureFixture[str]
) -> None:
    assert supervised(f"{leaves(70)}; exit 1") == (70, 4)
    assert "no new checkpoint in 4 starts: giving up (status 70)" in capsys.readouterr().err


def test_a_new_checkpoint_makes_up_for_failures_before_it(supervised: Supervised) -> None:
    assert supervised(f"{leaves(124)}; exit 1", checkpoints=6) == (124, 10)


@pytest.mark.parametrize("status", [74, 75, 78, 79])
def test_what_another_start_does_not_mend_is_not_started_again(
    status: int, supervised: Supervised
) -> None:
    assert supervised(f"{leaves(status)}; exit 1") == (status, 1)


def test_only_the_word_of_all_ranks_is_success(supervised: Supervised) -> None:
    assert supervised(f"{leaves(0, 0)}; exit 0", processes=2) == (0, 1)
    one_left_early = f"{leaves(0, 'pid 1')}; exit 0"
    assert supervised(one_left_early, processes=2, restarts=0) == (70, 1)
    assert supervised("exit 0", restarts=0) == (70, 1)


def test_the_worst_of_all_ranks_is_told(supervised: Supervised) -> None:
    assert supervised(f"{leaves(70, 79, 124)}; exit 1", processes=3, restarts=0) == (79, 1)
    assert supervised("kill -9 $$", restarts=0) == (128 + signal.SIGKILL, 1)


def test_after_a_signal_nothing_is_started_again(supervised: Supervised, tmp_path: Path) -> None:
    """Not even where no process had yet begun to listen, and died of it: nothing is lost by that."""
    Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert supervised("sleep 5") == (75, 1)


def test_a_rank_that_dies_of_the_signal_is_not_taken_for_saved(supervised: Supervised) -> None:
    Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert supervised(leaves(f"pid {os.getpid()}") + "; exec sleep 5") == (128 + signal.SIGTERM, 1)


def test_a_start_in_which_a_rank_died_was_not_asked_to_stop(supervised: Supervised) -> None:
    """The other ones were, by torchrun, and say so."""
    assert supervised(f"{leaves('pid 1', 75)}; exit 1", processes=2) == (1, 4)


def test_nothing_is_left_of_a_start_that_failed(supervised: Supervised, tmp_path: Path) -> None:
    """A rank that does not end with its launcher, in a session of its own."""
    pid = tmp_path / "pid"
    stays = f"setsid sh -c 'echo $$ > {pid}; exec sleep 10' & sleep 0.7; exit 1"
    assert supervised(stays, restarts=0) == (1, 1)
    deadline = time.monotonic() + 5  # a killed process takes a moment to go
    while (left := supervise._is_alive(int(pid.read_text()))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def test_ranks_that_do_not_notice_that_one_is_gone_are_ended(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "ALONE_SECONDS", 0.3)
    gone = 1 << 30  # no process has such a number
    assert supervised(f"{leaves(f'pid {gone}')}; sleep 10", restarts=0) == (137, 1)
