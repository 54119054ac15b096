"""Disks that are full, read-only or broken: said with path and cause, and what is committed stays."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import FAULTY, ROOT, environment, launch, read_metrics, tiny_preset, train_command
from test_trainer_stopping import curve, ledger, wait_for_step

from trainer.checkpoint_files import list_checkpoints, problems_of, step_of


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system in memory at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    result = subprocess.run(mount, capture_output=True, check=False)
    if result.returncode:
        pytest.skip("mounting a small file system needs root: " + result.stderr.decode())
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The run's folder is a file system of 5 MB: room for some checkpoints, not for all."""
    with mounted(tmp_path / "run", "size=5m"):
        yield tmp_path / "run"


def test_older_checkpoints_make_room(small_disk: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(
        tmp_path, tiny_dataset, steps=8, save_every=1, keep_checkpoints=50, keep_every=4
    )
    result = launch(preset)
    assert result.returncode == 0, result.stderr
    assert "space is short" in result.stdout
    kept = [step_of(checkpoint) for checkpoint in list_checkpoints(small_disk)]
    assert {4, 8} <= set(kept) and 1 not in kept
    assert all(problems_of(checkpoint) == [] for checkpoint in list_checkpoints(small_disk))


def test_a_full_disk_loses_nothing(small_disk: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(
        tmp_path, tiny_dataset, steps=8, save_every=1, keep_checkpoints=50, keep_every=1
    )
    result = launch(preset)
    assert result.returncode == 74, result.stderr
    assert "No space left for a checkpoint" in result.stderr and "MB are free" in result.stderr
    assert result.stdout.count("save failed at step") == 1  # once is not the end, twice is
    kept = list_checkpoints(small_disk)
    assert kept and all(problems_of(checkpoint) == [] for checkpoint in kept)
    for checkpoint in kept[:-1]:
        shutil.rmtree(checkpoint)
    again = launch(preset, "keep_checkpoints=2", "keep_every=0")
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    assert [m["step"] for m in read_metrics(small_disk)] == list(range(1, 9))


def test_a_stop_that_cannot_be_saved_is_told(tiny_dataset: Path, tmp_path: Path) -> None:
    """It was asked to stop, and its only save failed: that is no status 75, which means saved."""
    plan = json.dumps([{"rank": 0, "step": 2, "at": "forward", "do": "term"}])
    preset = tiny_preset(tmp_path, tiny_dataset, save_every=0)
    result = launch(preset, script=FAULTY, FAULT_PLAN=plan, FULL_DISK="0", FULL_DISK_STEP="3")
    assert result.returncode == 74, result.stderr
    assert "No space left on device" in result.stderr
    assert list_checkpoints(tmp_path / "run") == []


def test_a_disk_that_fills_while_a_checkpoint_is_written(
    small_disk: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Somebody else takes the space after it was found to be enough."""
    preset = tiny_preset(tmp_path, tiny_dataset, steps=8, save_every=2, keep_checkpoints=2)
    assert launch(preset, "time_limit_minutes=100").returncode == 0
    size = sum(p.stat().st_size for p in list_checkpoints(small_disk)[-1].rglob("*"))
    shutil.rmtree(small_disk / "checkpoints" / "step-00000008")
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - size // 2))
    result = launch(preset, UNPROTECTED="room", script=FAULTY)
    assert result.returncode == 74, result.stderr
    assert "No space left on device" in result.stderr
    assert [step_of(c) for c in list_checkpoints(small_disk)] == [6]
    assert problems_of(list_checkpoints(small_disk)[0]) == []
    assert not list((small_disk / "checkpoints").glob(".tmp-*"))
    (small_disk / "filler").unlink()
    assert launch(preset).returncode == 0
    assert [step_of(c) for c in list_checkpoints(small_disk)] == [6, 8]


def test_a_disk_without_inodes(tiny_dataset: Path, tmp_path: Path) -> None:
    """Bytes are free, and yet no file can be made."""
    run = tmp_path / "run"
    with mounted(run, "size=50m,nr_inodes=45"):
        preset = tiny_preset(tmp_path, tiny_dataset, steps=8, save_every=1, keep_checkpoints=50)
        result = launch(preset)
        assert result.returncode == 74, result.stderr
        assert "No space left on device" in result.stderr and str(run) in result.stderr
        kept = list_checkpoints(run)
        assert kept and all(problems_of(checkpoint) == [] for checkpoint in kept)
        assert not list(run.glob("checkpoints/.tmp-*"))


def test_a_read_only_folder_is_told_before_the_first_step(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "run", "size=5m,ro"):
        result = launch(tiny_preset(tmp_path, tiny_dataset))
    assert result.returncode == 74
    assert "Read-only file system" in result.stderr and str(tmp_path / "run") in result.stderr
    assert "Traceback" not in result.stderr and "step 1/" not in result.stdout


def test_a_disk_that_becomes_read_only(tiny_dataset: Path, tmp_path: Path) -> None:
    """As a shared one does after an error. What was saved is still there when it is well again."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    whole.mkdir()
    assert launch(tiny_preset(whole, tiny_dataset, steps=30, save_every=0)).returncode == 0
    preset = tiny_preset(tmp_path, tiny_dataset, steps=30, save_every=2)
    mounted_now = tmp_path / "mounted"
    hold = {"rank": 0, "step": 4, "at": "data", "do": "hold", "until": str(mounted_now)}
    process = subprocess.Popen(
        [*train_command(1, FAULTY), str(preset)],
        cwd=ROOT, env={**environment(), "FAULT_PLAN": json.dumps([hold])}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_step(run, 4)
    while list_checkpoints(run)[-1:] != [run / "checkpoints" / "step-00000004"]:
        assert process.poll() is None
    with mounted(run / "checkpoints", "ro"):
        mounted_now.touch()
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 74, stderr
    assert stderr.count("Read-only file system") >= 2  # once is not the end
    assert list_checkpoints(run)[-1] == run / "checkpoints" / "step-00000004"
    assert launch(preset).returncode == 0
    assert curve(run) == curve(whole / "run")


def test_what_could_not_be_forced_to_disk_is_no_checkpoint(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """fsync fails on one rank, and would succeed the second time without having written anything."""
    preset = tiny_preset(tmp_path, tiny_dataset, steps=9, keep_checkpoints=9)
    result = launch(preset, processes=2, script=FAULTY, BROKEN_DISK_STEP="6")
    assert result.returncode == 0, result.stderr
    assert [step_of(c) for c in list_checkpoints(tmp_path / "run")] == [3, 9]
    (failed,) = [e for e in ledger(tmp_path / "run", "event") if e["what"] == "save_failed"]
    assert "rank 1" in failed["message"] and "Input/output error" in failed["message"]
