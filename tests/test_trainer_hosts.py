"""Two machines: the curve of one; a network that parts, a machine that does not come, a taken port."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import Hosts, hosts
from support import FAULTY, ROOT, environment, free_port, launch, tiny_preset
from test_trainer_stopping import curve, processes_of, wait_for_step

from trainer.checkpoint_files import list_checkpoints, step_of

STEPS = 60


@pytest.fixture(scope="module")
def one_host(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("one_host")
    preset = tiny_preset(folder, tiny_dataset, steps=STEPS, save_every=0)
    assert launch(preset, processes=2).returncode == 0
    return curve(folder / "run")


def start_on(machines: Hosts, number: int, preset: Path, clock_skew: int) -> subprocess.Popen[str]:
    """torchrun on one of two hosts. clock_skew: seconds that the second one's clock is ahead."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={number}",
        f"--master-addr={machines.address(0)}", "--master-port=29500", "--nproc-per-node=1",
        *FAULTY, str(preset),
    ]  # fmt: skip
    return subprocess.Popen(
        machines.command(number, command),
        cwd=ROOT,
        env={**environment(), "CLOCK_SKEW": str(number * clock_skew)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("cut", "clock_skew"), [("unplug", -3600), ("deafen", 3600)])
def test_a_network_that_parts_in_the_middle_of_a_step(
    cut: str, clock_skew: int, one_host: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    """Both ends stop and say why; when it is whole again the same commands go on. Clocks do not matter."""
    run = tmp_path / "run"
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS, save_every=10, hang_timeout_seconds=4)
    with hosts(2) as machines:
        parted = [start_on(machines, number, preset, clock_skew) for number in range(2)]
        wait_for_step(run, 12)
        getattr(machines, cut)(1)
        said = [process.communicate(timeout=100)[1] for process in parted]
        assert [process.returncode for process in parted] == [1, 1]
        for text in said:
            assert "the run hangs: rank 0 (host0, pid" in text and "rank 1 (host1, pid" in text
            assert "the network, or a shared disk?" in text
        assert processes_of(str(preset)) == []
        reached = step_of(list_checkpoints(run)[-1])
        assert 10 <= reached < STEPS
        machines.mend(1)
        again = [start_on(machines, number, preset, clock_skew) for number in range(2)]
        said = [process.communicate(timeout=200)[1] for process in again]
        assert [process.returncode for process in again] == [0, 0], said
    assert curve(run) == one_host


def one_of_two(rank: int, port: str, preset: Path) -> subprocess.CompletedProcess[str]:
    return launch(
        preset, script=FAULTY, JOIN_SECONDS="3", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_does_not_come(rank: int, tiny_dataset: Path, tmp_path: Path) -> None:
    """Nobody trains with fewer processes than were asked for."""
    port = str(free_port())
    result = one_of_two(rank, port, tiny_preset(tmp_path, tiny_dataset, hang_timeout_seconds=1))
    assert result.returncode == 69, result.stderr
    (told,) = [line for line in result.stderr.splitlines() if line.startswith("cloze: ")]
    assert f"rank {rank} of 2 could not join the others at 127.0.0.1, port {port}" in told
    assert ("1/2 clients joined" in told) == (rank == 0)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken(tiny_dataset: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        result = one_of_two(0, port, tiny_preset(tmp_path, tiny_dataset))
    assert result.returncode == 69, result.stderr
    assert f"port {port}: The server socket has failed" in result.stderr
    assert "EADDRINUSE" in result.stderr
