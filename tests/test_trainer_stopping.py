"""Runs that are asked to stop: a checkpoint of the step they are at, a status that says so, no step lost."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from support import (
    FAULTY,
    FAULTY_CLI,
    ROOT,
    environment,
    free_port,
    launch,
    read_metrics,
    tiny_preset,
    train_command,
)

from launcher.supervise import descendants
from trainer.checkpoint_files import list_checkpoints, problems_of, step_of
from trainer.stopping import StopRequest

STEPS = 40


@pytest.fixture(scope="module")
def unbroken(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("unbroken")
    preset = tiny_preset(folder, tiny_dataset, steps=STEPS, save_every=0)
    assert launch(preset, processes=2).returncode == 0
    return curve(folder / "run")


def curve(run: Path) -> list[tuple]:
    return [(m["step"], m["loss"], m["grad_norm"], m["rows_digest"]) for m in read_metrics(run)]


def ledger(run: Path, kind: str) -> list[dict]:
    lines = (run / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.mark.parametrize(
    ("number", "at", "rank"),
    [
        ("term", "forward", 1),
        ("usr1", "data", 0),
        ("int", "backward", 0),
        ("term", "save", 1),
        ("usr1", "eval", 0),
        ("term", "startup", 1),
    ],
)
def test_a_signal_in_any_phase_costs_no_step(
    number: str, at: str, rank: int, unbroken: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    changes = {"steps": STEPS, "save_every": 8, "eval_every": 8, "eval_rows": 8}
    preset = tiny_preset(tmp_path, tiny_dataset, **changes)
    run = tmp_path / "run"
    step = 0 if at == "startup" else 8 if at in ("save", "eval") else 11
    plan = [{"rank": rank, "step": step, "at": at, "do": number}]
    stopped = launch(preset, processes=2, script=FAULTY, FAULT_PLAN=json.dumps(plan))
    assert stopped.returncode == 1, stopped.stderr  # torchrun's word for every failure
    reached = {"startup": 0, "save": 8, "eval": 8, "data": 11}.get(at, 12)
    assert [m["step"] for m in read_metrics(run)] == list(range(1, reached + 1))
    assert [step_of(c) for c in list_checkpoints(run)][-1:] == ([reached] if reached else [])
    (end,) = ledger(run, "end")
    assert (end["status"], end["exit_status"], end["step"]) == ("preempted", 75, reached)
    (event,) = ledger(run, "event")
    assert f"SIG{number.upper()} (rank {rank})" in event["message"]
    again = launch(preset, processes=2)
    assert again.returncode == 0, again.stderr
    assert curve(run) == unbroken


def test_cloze_train_passes_a_signal_on_and_tells_the_status(
    unbroken: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS, data={"num_workers": 2})
    hold = [{"rank": 0, "step": STEPS - 1, "at": "data", "do": "hold"}]  # it does not end unasked
    process = subprocess.Popen(
        [*train_command(1, FAULTY_CLI), str(preset), "--processes", "2"],
        cwd=ROOT,
        env={**environment(), "FAULT_PLAN": json.dumps(hold)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 75, stderr
    assert newest_step(tmp_path / "run") == len(read_metrics(tmp_path / "run"))
    assert launch(preset, processes=2).returncode == 0
    assert curve(tmp_path / "run") == unbroken


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_every_process_of_a_job_costs_no_step(
    number: signal.Signals, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Ctrl-C, torchrun, DeepSpeed's launcher and Slurm send it to the processes that make micro-batches too."""
    process, others = start_with_loaders(tiny_dataset, tmp_path)
    for pid in (process.pid, *others):
        os.kill(pid, number)
    assert process.wait(timeout=60) == 75
    assert newest_step(tmp_path / "run") == len(read_metrics(tmp_path / "run"))
    wait_until_gone(others)


def test_loaders_do_not_outlive_a_rank_that_is_killed(tiny_dataset: Path, tmp_path: Path) -> None:
    process, others = start_with_loaders(tiny_dataset, tmp_path)
    process.kill()
    process.wait()
    wait_until_gone(others)


def start_with_loaders(dataset: Path, folder: Path) -> tuple[subprocess.Popen[bytes], set[int]]:
    """A run that does not end, and the processes that it has started."""
    data = {"num_workers": 2}
    preset = tiny_preset(folder, dataset, steps=100_000, save_every=0, data=data)
    process = subprocess.Popen([*train_command(1), str(preset)], cwd=ROOT, env=environment())
    wait_for_step(folder / "run", 3)
    others = descendants(process.pid)
    assert len(others) >= 4  # a watchdog, a fork server and two loaders
    return process, others


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if is_alive(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{left} are left")
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty where it has ended
    except OSError:
        return False


def newest_step(run: Path) -> int:
    return step_of(list_checkpoints(run)[-1])


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len(read_metrics(run)) >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached")


def wait_for_files(*paths: Path) -> None:
    deadline = time.monotonic() + 100
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} are not all there"
        time.sleep(0.02)


def test_a_second_signal_ends_it_at_once(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS, save_every=0)
    asleep = tmp_path / "asleep"
    fault = {"rank": 0, "step": 5, "at": "forward", "do": "sleep", "seconds": 100}
    plan = [{**fault, "once": str(asleep)}]
    process = subprocess.Popen(
        [*train_command(1, FAULTY), str(preset)],
        cwd=ROOT,
        env={**environment(), "FAULT_PLAN": json.dumps(plan)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_files(asleep)
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)  # sooner than a second later it is taken for the same wish
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert "SIGINT again: ending now" in stderr
    assert not list_checkpoints(tmp_path / "run")


def test_a_time_limit_is_kept(tiny_dataset: Path, tmp_path: Path) -> None:
    """It saves and ends before, unless its start alone has taken longer."""
    preset = tiny_preset(tmp_path, tiny_dataset, steps=1_000_000, time_limit_minutes=0.3)
    result = launch(preset)
    assert result.returncode == 75, result.stderr
    assert "time_limit_minutes 0.3 is" in result.stdout
    run = tmp_path / "run"
    (began,), (end,) = ledger(run, "start"), ledger(run, "end")
    assert end["time"] - began["time"] < 60  # 18, and what a busy machine takes
    assert [step_of(c) for c in list_checkpoints(run)][-1:] in ([end["step"]], [])


def test_the_end_of_a_slurm_job_is_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    stop.set_time_limit(time.time(), minutes=None)
    stop.look(Path("nowhere"), step_seconds=1, save_seconds=1)
    assert stop.reason is None
    stop.look(Path("nowhere"), step_seconds=1, save_seconds=60)
    assert stop.reason is not None and "the end of the Slurm job" in stop.reason


def test_a_stop_file(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=100_000, save_every=0)
    process = subprocess.Popen([*train_command(1), str(preset)], cwd=ROOT, env=environment())
    wait_for_step(tmp_path / "run", 3)
    (tmp_path / "run" / "STOP").touch()
    assert process.wait(timeout=60) == 75
    assert not (tmp_path / "run" / "STOP").exists()
    (newest,) = list_checkpoints(tmp_path / "run")
    assert problems_of(newest) == []


@pytest.mark.parametrize("early", [True, False])
def test_a_rank_that_waits_for_the_others_leaves_at_once(
    early: bool, tiny_dataset: Path, tmp_path: Path
) -> None:
    """There is nothing to save; and the others may never come. early: the signal is there before it waits."""
    preset = tiny_preset(tmp_path, tiny_dataset)
    port = free_port()
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    plan = [{"rank": 0, "step": 0, "at": "join", "do": "term"}] if early else []
    process = subprocess.Popen(
        [*train_command(1, FAULTY), str(preset)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**environment(), **place, "MASTER_PORT": str(port), "FAULT_PLAN": json.dumps(plan)},
    )  # fmt: skip
    if not early:
        while not is_listened_to(port):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "asked to stop before the first step" in stderr


def is_listened_to(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("launcher", ["cloze train", "torchrun"])
def test_nobody_is_left_when_the_launcher_is_killed(
    launcher: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Its processes are told by the kernel; they save, and leave."""
    preset = tiny_preset(tmp_path, tiny_dataset, steps=100_000, save_every=0)
    command = [*train_command(2), str(preset)]
    if launcher == "cloze train":
        cloze = train_command(1, ["-m", "launcher.cli", "train"])
        command = [*cloze, str(preset), "--processes", "2"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment())
    wait_for_step(tmp_path / "run", 3)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while (left := processes_of(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert list_checkpoints(tmp_path / "run")


def processes_of(word: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if word in command and "pytest" not in command.split(word)[0]:
                found.append(command)
    return found


def test_a_grace_that_is_too_short_costs_no_more_than_a_kill(
    unbroken: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    """SIGTERM, and SIGKILL before the step is over: the checkpoint before is gone on from."""
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS, save_every=8)
    saved = str(tmp_path / "run" / "checkpoints" / "step-00000008")
    plan = [
        {"rank": 0, "step": 11, "at": "data", "do": "hold", "until": saved},
        {"rank": 0, "step": 11, "at": "forward", "do": "term"},
        {"rank": 0, "step": 11, "at": "backward", "do": "kill"},
    ]
    killed = launch(preset, processes=2, script=FAULTY, FAULT_PLAN=json.dumps(plan))
    assert killed.returncode == 1
    assert [step_of(c) for c in list_checkpoints(tmp_path / "run")] == [8]
    assert launch(preset, processes=2).returncode == 0
    assert curve(tmp_path / "run") == unbroken
