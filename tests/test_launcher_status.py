"""`cloze status` on folders of every kind: older runs, new ones, held, killed, and one that is training."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from ledger_support import Ledger
from support import ROOT, environment, tiny_preset

from launcher.cli import main
from launcher.curve import draw
from launcher.owner import lock_holders
from launcher.status import as_json, read_status
from trainer.run_folder import own

NOW = 1_000_500.0
HOLDER = """
import sys, time
from pathlib import Path
from trainer.run_folder import own
with own(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def new_run(folder: Path, *, steps: int = 100, last: int = 0) -> Path:
    """A run's folder with what every version has written: settings, and metrics up to step `last`."""
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"steps": steps, "save_every": 10}))
    lines = [
        {"kind": "train", "step": step, "loss": 10 - step / 20, "num_tokens": 50 * step,
         "step_seconds": 2.0, "tokens_per_second": 25.0}
        for step in range(10, last + 1, 10)
    ]  # fmt: skip
    lines += [{"kind": "heldout", "step": last, "loss": 5.5, "mlm_loss": 4.9}] if last else []
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def add_checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    files = {f"train_state-0000{n}-of-00002.safetensors": {"bytes": 500} for n in range(2)}
    (folder / "MANIFEST.json").write_text(json.dumps({"files": files}))


@contextmanager
def held(run: Path) -> Iterator[int]:
    """Another process trains the run: it has the lock. Gives its pid."""
    command = [sys.executable, "-c", HOLDER, str(run)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def shown(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    for unknown in ("None", "nan", "null"):
        assert unknown not in text
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(run)
    return text


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert main(["status", str(folder)]) == 78
        assert "is no run: it has no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("{a: [")
    assert main(["status", str(tmp_path)]) == 78
    assert "config.yaml is not valid YAML" in capsys.readouterr().err


def test_older_runs_have_a_status_without_a_ledger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path, last=40)
    add_checkpoint(run, 30)
    text = shown(run, capsys)
    assert f"{run}: stopped\nstep 40 of 100 (40.0%), 2,000 tokens\n" in text
    assert "at step 40: loss 8.0000, 25 tokens/s, 2 s a step\n" in text
    assert "held out at step 40: loss 5.5000, mlm 4.9000\n" in text
    assert "newest checkpoint: step 30, 1.0 kB" in text
    assert not {"ETA", "goodput", "job"} & set(text.split())
    assert len([line for line in text.splitlines() if "┤" in line]) == 10
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 100, "loss": 5}) + '\n{"kind": "tr')
    assert "finished\nstep 100 of 100" in shown(run, capsys)


def test_a_run_just_begun_says_little_and_nothing_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    assert shown(run, capsys) == f"{run}: new\nstep 0 of 100 (0.0%)\n"
    with held(run) as pid:
        assert shown(run, capsys).startswith(f"{run}: running (pid {pid} on ")
        assert lock_holders(run / "lock") == {pid}
        with pytest.raises(ValueError, match="another job"), own(run):
            pass
    assert read_status(run, now=NOW).state == "stopped"


def test_a_job_that_runs_has_an_eta_with_its_saves(tmp_path: Path) -> None:
    run = new_run(tmp_path, last=40)
    ledger = Ledger().start(0).progress(startup=10).progress(10, step=20).progress(save=5)
    ledger.progress(20, step=20).progress(save=5).progress(40, step=40).write(run)
    with held(run):
        status = read_status(run, now=NOW)
    # from step 10 to 40 in 70 s, two saves among them; 60 steps to go
    assert status.state == "running" and status.eta_seconds == pytest.approx(60 * 70 / 30)
    assert as_json(status)["jobs"][0]["ended"] == "running"


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("done", "finished"), ("preempted", "preempted"), ("failed", "failed"),
        ("diverged", "diverged"), ("hung", "hung"), (None, "killed"),
    ],
)  # fmt: skip
def test_the_ledger_tells_how_it_ended(
    status: str | None, state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path, last=30)
    ledger = Ledger().start(0).progress(startup=10).progress(35, step=35, data=1).wait(20)
    ledger.start(30, world_size=4).progress(startup=8).event("spike", "loss 9.1 at step 33")
    ledger.progress(37, step=7)
    if status:
        ledger.end(status, 1, "out of luck")
    ledger.write(run)
    text = shown(run, capsys)
    assert text.startswith(f"{run}: {state}\nstep 37 of 100")
    assert "goodput 45.7% of 0:01:21 over 2 jobs, 5 steps done again" in text
    assert re.search(r"no job was running +20\.0 s +24\.7%", text)
    assert ("out of luck" in text) == (status not in (None, "done"))
    assert "step 30  spike: loss 9.1 at step 33" in text
    rows = [line.split() for line in text.splitlines() if "  here  " in line]
    assert [row[-5:] for row in rows] == [
        ["2", "1", "0", "35", "killed"],
        ["4", "1", "30", "37", status or "killed"],
    ]


def test_a_job_on_another_machine_is_judged_by_its_signs_of_life(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run / "owner.json").write_text(json.dumps({"host": "elsewhere", "pid": 3}))
    assert read_status(run, now=NOW).state == "unknown"
    Ledger(NOW - 100).start(0).progress(3, step=10).write(run)
    assert read_status(run, now=NOW).state == "running"
    assert read_status(run, now=NOW + 3600).state == "unknown"


def test_a_hint_is_given_where_saves_are_too_rare_or_too_many(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    ledger = Ledger()
    for _ in range(3):  # a fault each 1000 s, a save of 5 s each 10 s
        ledger.start(0)
        for step in range(10, 700, 10):
            ledger.progress(step, step=10).progress(save=5)
    ledger.write(run)
    told = read_status(run, now=NOW).hint
    assert told and "save_every=1" in told and "at 10)" in told
    Ledger().start(0).progress(100, step=100, save=5).end("done").write(run)
    assert read_status(run, now=NOW).hint is None


def test_curves_go_from_the_first_point_to_the_last() -> None:
    falling = [(float(x), 100.0 - 5 * x) for x in range(21)]
    lines = draw(falling, width=21, height=5, ascii_only=True).splitlines()
    assert lines[0].split("|")[1].startswith("*") and lines[4].split("|")[1].endswith("*")
    assert lines[0].startswith("     100") and lines[4].startswith("       0")
    assert draw(falling, width=20, height=5, ascii_only=False).splitlines()[0].endswith("⠒⠤⣀")
    step = [(0.0, 1.0), (50.0, 1.0), (51.0, 0.0), (100.0, 0.0)]
    upright = draw(step, width=21, height=5, ascii_only=True).splitlines()[:5]
    assert all("*" in line for line in upright)
    assert draw([(1, 2)], ascii_only=True) == draw([], ascii_only=True) == ""
    assert "nan" not in draw([(0, 1.0), (9, 1.0)], ascii_only=True)


def test_the_status_of_a_run_that_is_training(tiny_dataset: Path, tmp_path: Path) -> None:
    """Asked all the time, from before its folder is there until it has ended, it answers rightly."""
    preset, run = tiny_preset(tmp_path, tiny_dataset, steps=12, save_every=2), tmp_path / "run"
    command = [sys.executable, "-m", "launcher.train", str(preset)]
    states, steps = [], []
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        try:
            while process.poll() is None:
                time.sleep(0.02)
                if (run / "config.yaml").is_file():
                    status = read_status(run, now=time.time())
                    states.append(status.state)
                    steps.append(status.step)
                    assert status.problems == []
        finally:
            process.kill()
    assert process.returncode == 0, (tmp_path / "log").read_text()
    # it has ended a moment before its process is gone
    assert list(dict.fromkeys(states)) in (["running"], ["running", "finished"])
    assert steps == sorted(steps) and max(steps) > 2
    after = read_status(run, now=time.time())
    assert (after.state, after.step, len(after.checkpoints)) == ("finished", 12, 3)
    account = after.account
    assert account and account.num_steps == 12 and account.seconds["useful"] > 0
    left = abs(account.seconds["unknown"]) + account.seconds["other"]
    assert left < 0.005 * account.wall_seconds  # the job's own figures explain all its time
    told = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "status", str(run)],
        cwd=ROOT,
        env={**environment(), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "step 12 of 12 (100.0%)" in told.stdout and "|*" in told.stdout
