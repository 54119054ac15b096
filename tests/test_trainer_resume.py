"""Runs that are killed with SIGKILL, stopped and damaged: what comes after is what would have come."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support import FAULTY, ROOT, environment, launch, read_metrics, tiny_preset, train_command

EXACT = ("loss", "mlm_loss", "nsp_loss", "grad_norm", "learning_rate", "num_tokens", "rows_digest")
STEPS = 14


def curve(run: Path) -> list[tuple]:
    """Every step's numbers, exactly as floats."""
    return [(m["step"], *(m[name] for name in EXACT)) for m in read_metrics(run)]


def reached(step: int) -> Callable[[Path], bool]:
    """Whether `step` is in a run's metrics.jsonl."""

    def is_reached(run: Path) -> bool:
        metrics = run / "metrics.jsonl"
        return metrics.exists() and metrics.read_text(encoding="utf-8").count('"train"') >= step

    return is_reached


def is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".tmp-*/*"))


def start_and_kill(preset: Path, run: Path, processes: int, when: Callable[[Path], bool]) -> None:
    """Start the run as its own session and SIGKILL all of it as soon as `when(run)`."""
    last_step = yaml.safe_load(preset.read_text(encoding="utf-8"))["steps"] - 1
    hold = [{"rank": 0, "step": last_step, "at": "data", "do": "hold"}]  # it does not end unkilled
    command = [*train_command(processes, FAULTY), str(preset)]
    with (run.parent / "killed.log").open("a") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(), "FAULT_PLAN": json.dumps(hold)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            if when(run):
                break
            time.sleep(0.001)
        else:
            pytest.fail("it ended unkilled: " + (run.parent / "killed.log").read_text()[-3000:])
        os.killpg(process.pid, signal.SIGKILL)
        # the workers are in sessions of their own
        for pid in workers_of(str(preset)):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def workers_of(preset: str) -> list[int]:
    """Processes with `preset` on their command line, other than this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if preset.encode() in arguments:
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [
        ("zero0", "fp32", "adamw"),
        ("zero1", "bf16", "lamb"),
        ("zero2", "bf16", "adamw"),
        ("zero2", "fp32", "muon"),
        ("zero3", "bf16", "adamw"),
        ("zero3_offload", "fp32", "adamw"),
    ],
)
def test_killed_at_three_steps_and_bitwise_the_same(
    stage: str, precision: str, optimizer: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    changes = {
        "steps": STEPS,
        "precision": precision,
        "optim": {"name": optimizer, "ema_decay": None if optimizer == "adamw" else 0.9},
        "deepspeed": str(ROOT / "ds_configs" / f"{stage}.json"),
    }
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        folder.mkdir()
    preset = tiny_preset(unbroken, tiny_dataset, **changes)
    whole = launch(preset, processes=2)
    assert whole.returncode == 0, whole.stderr
    preset = tiny_preset(broken, tiny_dataset, **changes)
    for step in (2, 7, 11):  # before the first checkpoint, and in between
        start_and_kill(preset, broken / "run", 2, reached(step))
    last = launch(preset, processes=2)
    assert last.returncode == 0, last.stderr
    assert "resuming from" in last.stdout
    assert curve(broken / "run") == curve(unbroken / "run")
    assert [m["step"] for m in read_metrics(broken / "run")] == list(range(1, STEPS + 1))
    last_checkpoints = [
        p / "run" / "checkpoints" / f"step-{STEPS:08d}" / "hf" / "model.safetensors"
        for p in (unbroken, broken)
    ]
    assert last_checkpoints[0].read_bytes() == last_checkpoints[1].read_bytes()


def test_killed_inside_a_save(tiny_dataset: Path, tmp_path: Path) -> None:
    """The half-written checkpoint is never looked at, and is cleared away by the next save."""
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "broken").mkdir()
    changes = {"steps": 6, "save_every": 2}
    assert (
        launch(tiny_preset(tmp_path / "unbroken", tiny_dataset, **changes), processes=2).returncode
        == 0
    )
    preset, run = (
        tiny_preset(tmp_path / "broken", tiny_dataset, **changes),
        tmp_path / "broken" / "run",
    )
    start_and_kill(preset, run, 2, is_saving)
    last = launch(preset, processes=2)
    assert last.returncode == 0, last.stderr
    assert curve(run) == curve(tmp_path / "unbroken" / "run")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000002", "step-00000004", "step-00000006",
    ]  # fmt: skip


def test_other_world_sizes_stages_and_micro_batches_go_on(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """2 processes at ZeRO 2, 4 at ZeRO 3, 1 with offload: the same rows, the loss but for rounding."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    changes = {"steps": 112, "save_every": 10, "model": dropout}  # its masks are a micro-batch's
    for folder in ("unbroken", "elastic"):
        (tmp_path / folder).mkdir()
    assert launch(tiny_preset(tmp_path / "unbroken", tiny_dataset, **changes)).returncode == 0
    run = tmp_path / "elastic" / "run"

    def preset(stage: str, micro_batch: int) -> Path:
        deepspeed = str(ROOT / "ds_configs" / f"{stage}.json")
        other = {"deepspeed": deepspeed, "micro_batch_size": micro_batch}
        return tiny_preset(tmp_path / "elastic", tiny_dataset, **changes, **other)

    start_and_kill(preset("zero2", 4), run, 2, reached(12))
    start_and_kill(preset("zero3", 2), run, 4, reached(22))
    last = launch(preset("zero2_offload", 8))
    assert last.returncode == 0, last.stderr
    ours, theirs = read_metrics(run), read_metrics(tmp_path / "unbroken" / "run")
    assert [m["rows_digest"] for m in ours] == [m["rows_digest"] for m in theirs]
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True))
    print(f"largest relative difference of a loss: {worst:.1e}")
    assert worst < 1e-5


def test_a_finished_run_has_nothing_to_do(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=4)
    assert launch(preset).returncode == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = launch(preset)
    assert again.returncode == 0 and "steps 4 to 4" in again.stdout
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
