"""`cloze doctor --cluster` on machines without Slurm: what is wrong with one of them is named, no more."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hosts import Hosts, hosts, ip
from people_support import command as command_line
from support import ROOT, environment, tiny_preset

from launcher import doctor

PORT = 29500
WAIT_SECONDS = 20
DOCTOR = ["-m", "launcher.cli", "doctor", "--cluster"]
AHEAD = """
import sys, time
true_time = time.time
time.time = lambda: true_time() + 61
from launcher.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(
    machines: Hosts, number: int, preset: Path, how: list[str] = DOCTOR
) -> subprocess.Popen[str]:
    """The task of one host, started by hand."""
    variables = {
        "RANK": str(number), "WORLD_SIZE": str(len(machines.spaces)), "MASTER_ADDR": machines.address(0),
        "MASTER_PORT": str(PORT),
    }  # fmt: skip
    command = [sys.executable, *how, str(preset), f"--wait-seconds={WAIT_SECONDS}"]
    return subprocess.Popen(
        machines.command(number, command), cwd=ROOT, env={**environment(), **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(tasks: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Statuses, and what was printed and said."""
    said = [task.communicate(timeout=150) for task in tasks]
    return [task.returncode for task in tasks], [out for out, _ in said], [err for _, err in said]


def ill(table: str) -> dict[tuple[str, str], str]:
    """(check, of) -> verdict, of all that is not well."""
    rows = re.findall(r"^(WARNING|PROBLEM)  +(\S.*?)  +(\S.*?)  +\S", table, re.MULTILINE)
    return {(check, of): verdict for verdict, check, of in rows}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_torchrun_starts_it_on_healthy_machines(tiny_dataset: Path, tmp_path: Path) -> None:
    """The same command on every machine, as for training; nothing is left in the run's folder."""
    preset = tiny_preset(tmp_path, tiny_dataset)
    with hosts(2) as machines:
        how = [
            "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={machines.address(0)}:{PORT}", "--rdzv-id=doctor", *DOCTOR,
        ]  # fmt: skip
        command = [sys.executable, *how, str(preset)]
        tasks = [
            subprocess.Popen(
                machines.command(number, command), cwd=ROOT, env=environment(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for number in range(2)
        ]  # fmt: skip
        statuses, tables, said = ended(tasks)
    assert statuses == [0, 0], (tables, said)
    (table,) = filter(None, tables)  # one of them prints it
    assert "0 PROBLEM, 0 WARNING" in table and "host0 to host1" in table
    assert not (tmp_path / "run").exists()


def test_a_blocked_port_an_absent_machine_a_wrong_clock_and_a_small_disk(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """host2's packets to the port where all meet are lost: it is heard of by the run's folder. host3 is off."""
    preset = tiny_preset(tmp_path, tiny_dataset)
    run = tmp_path / "run"
    run.mkdir()
    with hosts(4) as machines, small_disk(run, "600k"):
        first = machines.spaces[0]
        # the rules of routing see ports: what comes in for this one is dropped before it is for us
        ip("-n", first, "rule", "add", "pref", "50", "lookup", "local")
        ip("-n", first, "rule", "del", "pref", "0")
        ip("-n", first, "rule", "add", "pref", "10", "from", machines.address(2), "ipproto", "tcp",
           "dport", str(PORT), "blackhole")  # fmt: skip
        ahead = ["-c", AHEAD, "doctor", "--cluster"]
        tasks = [
            start(machines, number, preset, ahead if number == 1 else DOCTOR) for number in range(3)
        ]
        statuses, tables, said = ended(tasks)
        assert not list(run.iterdir())
    assert statuses == [1, 1, 1], said
    assert ill(tables[0]) == {
        ("meeting", "host2"): "PROBLEM",
        ("meeting", "task 3"): "PROBLEM",
        ("clocks", "host1"): "PROBLEM",
        ("disk", "3 machines"): "PROBLEM",
    }, tables[0]
    assert f"cannot reach {machines.address(0)}:{PORT}: no answer (a firewall" in tables[0]
    assert f"was not heard of within {WAIT_SECONDS} s" in tables[0]
    assert "4 PROBLEM, 0 WARNING" in tables[0] and not any(tables[1:])


def test_a_machine_that_dies_in_the_middle_and_a_port_that_is_taken(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The second task finds the other port, and is killed then; the first, in this process, is not held up."""
    preset = tiny_preset(tmp_path, tiny_dataset)
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "launcher.cli", "doctor", "--cluster", str(preset)]
    second = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment(), **variables, "RANK": "1"},
        stderr=subprocess.DEVNULL,
    )
    seen = tmp_path / "run" / "slurm" / f"doctor-hand-{port}" / "seen-1.json"

    def kill_when_seen() -> None:
        while second.poll() is None and not seen.exists():
            time.sleep(0.01)
        second.kill()

    threading.Thread(target=kill_when_seen, daemon=True).start()
    for name, value in {**variables, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in (
        "cluster_first.RESULT_SECONDS",
        "cluster_first.SEEN_SECONDS",
        "cluster_first.GOODBYE_SECONDS",
    ):
        monkeypatch.setattr(f"launcher.{name}", 2.0)
    with taken:
        assert command_line(doctor, "--cluster", preset) == 1
    assert second.wait() == -signal.SIGKILL
    table = capsys.readouterr().out
    assert re.search(r"^PROBLEM +meeting +\S+ +left in the middle of this", table, re.MULTILINE)
    assert f"port {port}: it is taken by another program" in table
    assert not (tmp_path / "run").exists()


WRONG = [["datasets/x"], ["none.yaml"], ["configs/tiny.yaml", "stpes=3"]]


@pytest.mark.parametrize("arguments", WRONG)
def test_what_cannot_be_examined_is_refused(arguments: list[str]) -> None:
    task = subprocess.run(
        [sys.executable, *DOCTOR, *arguments], cwd=ROOT, env=environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert task.returncode == 78, task.stderr
    assert arguments[-1].partition("=")[0] in task.stderr
