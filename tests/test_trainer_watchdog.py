"""Ranks that hang, die and leave: who it was is said, nobody stays behind, and the run goes on by itself."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import (
    FAULTY,
    FAULTY_CLI,
    ROOT,
    environment,
    launch,
    read_metrics,
    tiny_preset,
    train_command,
)
from test_trainer_stopping import curve, ledger, processes_of, wait_for_files

from launcher.supervise import descendants
from trainer.stragglers import slowest
from trainer.watchdog import allowed_seconds, explain, process_state

STEPS = 14
SECONDS = 6.0  # hang_timeout_seconds of these tests


@pytest.fixture(scope="module")
def unbroken(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert launch(tiny_preset(folder, tiny_dataset, steps=STEPS), processes=2).returncode == 0
    return curve(folder / "run")


def faulty_command(preset: Path) -> list[str]:
    return [*train_command(1, FAULTY_CLI), str(preset), "--processes", "2"]


def cloze_train(
    preset: Path, faults: list[dict], **variables: str
) -> subprocess.CompletedProcess[str]:
    """`cloze train` on two processes, with faults."""
    return subprocess.run(
        faulty_command(preset),
        cwd=ROOT,
        env={**environment(), "FAULT_PLAN": json.dumps(faults), **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    ("do", "at", "said"),
    [
        ("stop", "data", "in 'data' of step 6 for"),
        ("gil", "forward", "in 'forward' of step 6 for"),
        ("sleep", "backward", "rank 1 ("),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_run_goes_on(
    do: str, at: str, said: str, unbroken: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS, hang_timeout_seconds=SECONDS)
    once = str(tmp_path / "once")
    fault = {"rank": 1, "step": 5, "at": at, "do": do, "seconds": 999, "once": once}
    result = cloze_train(preset, [fault])
    assert result.returncode == 0, result.stderr[-3000:]
    (explained,) = [line for line in result.stderr.splitlines() if "the run hangs:" in line]
    assert said in explained and "rank 1 (" in explained
    assert ("stopped by a signal" in explained) == (do == "stop")
    assert "Current thread" in result.stderr or do == "stop"  # the stacks, of those that can
    assert "ended with status 124; starting again" in result.stderr
    hung, done = ledger(tmp_path / "run", "end")
    assert (hung["status"], hung["exit_status"], done["status"]) == ("hung", 124, "done")
    assert curve(tmp_path / "run") == unbroken
    assert not any((tmp_path / "run").glob("stalls/*/*"))


def test_a_rank_that_is_stopped_before_it_has_joined(tiny_dataset: Path, tmp_path: Path) -> None:
    """And the launcher is killed: its processes end all the same, by themselves."""
    # a rank that starts is given ten times as long: more than the deadline below
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS, hang_timeout_seconds=12)
    plan = json.dumps([{"rank": 1, "step": 0, "at": "join", "do": "stop"}])
    process = subprocess.Popen(
        faulty_command(preset), cwd=ROOT, env={**environment(), "FAULT_PLAN": plan}
    )
    deadline = time.monotonic() + 100
    while not (stopped := [p for p in descendants(process.pid) if process_state(p) == "T"]):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while (left := processes_of(str(preset))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == [] and len(stopped) == 1


def test_a_job_that_was_suspended_is_no_hang(
    unbroken: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    """As by `scontrol suspend`: all of its processes, for longer than a hang may last, in something long."""
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS, hang_timeout_seconds=SECONDS)
    at_it, go_on = [tmp_path / "at-0", tmp_path / "at-1"], tmp_path / "go on"
    hold = {"step": 5, "at": "data", "do": "hold", "until": str(go_on)}
    plan = [{**hold, "rank": rank, "once": str(at_it[rank])} for rank in range(2)]
    process = subprocess.Popen(
        faulty_command(preset), cwd=ROOT, env={**environment(), "FAULT_PLAN": json.dumps(plan)}
    )
    wait_for_files(*at_it)
    family = [process.pid, *descendants(process.pid)]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * SECONDS)
    for pid in family:
        os.kill(pid, signal.SIGCONT)
    go_on.touch()
    assert process.wait(timeout=200) == 0
    assert len(ledger(tmp_path / "run", "start")) == 1
    assert curve(tmp_path / "run") == unbroken


@pytest.mark.parametrize("do", ["kill", "kill loader", "segv", "exit0", "raise"])
def test_a_rank_that_dies_is_no_success_and_the_run_goes_on(
    do: str, unbroken: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    """So with a process that reads its data."""
    loaders = {"num_workers": int(do == "kill loader")}
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS, data=loaders)
    fault = {"rank": 1, "step": 8, "at": "backward", "do": do, "once": str(tmp_path / "once")}
    result = cloze_train(preset, [fault])
    assert result.returncode == 0, result.stderr[-3000:]
    assert "starting again" in result.stderr
    assert curve(tmp_path / "run") == unbroken
    first, second = [line["resumed_step"] for line in ledger(tmp_path / "run", "start")]
    # usually 6; 3 where its saving was not over; 9 where a loader had read ahead that far
    assert first == 0 and second in ((3, 6, 9) if do == "kill loader" else (3, 6))


def test_a_rank_that_dies_before_all_have_joined(
    unbroken: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    """torchrun asks the other one to stop, which is at once what that one does: no reason to end the run."""
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS)
    fault = {"rank": 1, "step": 0, "at": "join", "do": "kill", "once": str(tmp_path / "once")}
    result = cloze_train(preset, [fault])
    assert result.returncode == 0, result.stderr[-3000:]
    assert "starting again" in result.stderr
    assert curve(tmp_path / "run") == unbroken


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group whose processes may take 32 MB more."""
    root = Path("/sys/fs/cgroup/memory")  # the first version's; else the second's
    old = root.is_dir()
    group = (root if old else root.parent) / f"cloze-test-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if old else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(32 << 20))
    except OSError as error:
        pytest.skip(f"a control group that limits memory cannot be made here: {error}")
    yield group
    while (group / "cgroup.procs").read_text():
        time.sleep(0.1)
    group.rmdir()


def test_memory_that_runs_out_is_said_and_the_run_goes_on(
    small_memory: Path, unbroken: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS)
    fault = {"rank": 1, "step": 8, "at": "backward", "do": "oom", "once": str(tmp_path / "once")}
    result = cloze_train(preset, [fault | {"cgroup": str(small_memory)}])
    assert result.returncode == 0, result.stderr[-3000:]
    assert "because memory ran out" in result.stderr
    assert re.search(r"without a word: (0, )?1\): give the job more memory", result.stderr)
    assert curve(tmp_path / "run") == unbroken


def test_one_process_that_leaves_with_0_is_no_success(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS)
    fault = {"rank": 0, "step": 8, "at": "backward", "do": "exit0"}
    command = [*train_command(1, FAULTY_CLI), str(preset), "--restarts", "0"]
    result = subprocess.run(
        command, cwd=ROOT, env={**environment(), "FAULT_PLAN": json.dumps([fault])}, check=False
    )
    assert result.returncode == 70


def test_a_run_without_progress_is_given_up(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=STEPS)
    result = cloze_train(preset, [{"rank": 1, "step": 1, "at": "data", "do": "kill"}])
    assert result.returncode not in (0, 75)
    assert "no new checkpoint in 4 starts: giving up" in result.stderr
    assert processes_of(str(preset)) == []


def test_what_cannot_be_mended_is_not_tried_again(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, deepspeed="nowhere.json")
    result = cloze_train(preset, [])
    assert result.returncode == 78
    assert (
        result.stderr.count("nowhere.json does not exist") == 1
        and "starting again" not in result.stderr
    )


def test_a_slow_loader_is_no_hang(tiny_dataset: Path, tmp_path: Path) -> None:
    """Though it is slow for so long that notes are left."""
    preset = tiny_preset(tmp_path, tiny_dataset, steps=4, hang_timeout_seconds=16)
    notes = str(tmp_path / "run" / "stalls" / "*" / "rank-*.json")
    fault = {"rank": 1, "step": 2, "at": "data", "do": "hold", "until": notes}
    result = launch(preset, processes=2, script=FAULTY, FAULT_PLAN=json.dumps([fault]))
    assert result.returncode == 0, result.stderr
    assert len(read_metrics(tmp_path / "run")) == 4
    assert "the run hangs" not in result.stderr


def test_a_slow_rank_is_named(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=40, log_every=5, save_every=0)
    fault = {"rank": 1, "step": 0, "times": 99, "at": "forward", "do": "sleep", "seconds": 0.05}
    result = launch(preset, processes=2, script=FAULTY, FAULT_PLAN=json.dumps([fault]))
    assert result.returncode == 0, result.stderr
    named = [event for event in ledger(tmp_path / "run", "event") if event["what"] == "straggler"]
    (event,) = [event for event in named if "rank 1 (" in event["message"]]
    assert event["step"] in (20, 30, 40)  # after its second window of ten steps, where all is quiet


def test_who_is_slow() -> None:
    assert slowest([0.10, 0.10, 0.25, 0.11], step_seconds=0.5) == 2
    assert slowest([0.10, 0.10, 0.13, 0.11], step_seconds=0.5) is None  # within what is usual
    assert slowest([0.010, 0.010, 0.025], step_seconds=0.5) is None  # nothing is lost by it
    assert slowest([0.5], step_seconds=0.5) is None


def note(rank: int, step: int, activity: str, state: str = "S") -> dict:
    return {
        "rank": rank, "host": f"node{rank}", "pid": 10 + rank, "step": step, "activity": activity,
        "seconds": 120.0, "process_state": state,
    }  # fmt: skip


def test_whom_the_others_wait_for() -> None:
    said = explain([note(0, 7, "backward"), note(1, 7, "data"), note(2, 7, "backward")], 3)
    assert said.startswith(
        "the run hangs: rank 1 (node1, pid 11) in 'data' of step 8 for 120 s; the others"
    )
    said = explain([note(0, 8, "data"), note(1, 7, "save")], 2)
    assert said.startswith("the run hangs: rank 1 (node1, pid 11) in 'save' of step 8")
    said = explain([note(0, 7, "backward"), note(1, 7, "backward", "T")], 2)
    assert "rank 1 (node1, pid 11)" in said.splitlines()[0] and "stopped by a signal" in said
    said = explain([note(0, 7, "backward"), note(1, 7, "backward")], 3)
    assert "all ranks are at the same place" in said and "rank 2: no word" in said


def test_a_long_step_is_given_time() -> None:
    assert allowed_seconds("forward", 1.0, 120) == 120
    assert allowed_seconds("forward", 60.0, 120) == 600
    assert allowed_seconds("startup", 1.0, 120) == 1200
