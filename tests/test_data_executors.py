"""Executors: the same dataset from one process, from Ray workers, and from the elements of a Slurm array."""

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from prepare_support import config, corpus, dataset, fingerprint

from data.executors import run_on, slurm_script
from data.prepare import prepare

__all__ = ["config", "corpus", "dataset"]  # fixtures, used by name

SBATCH = """#!/bin/bash
# Stands for sbatch --wait: runs the elements of an array here, two at a time.
echo "$@" >> "$FAKE_SBATCH_LOG"
for argument; do
  case "$argument" in --array=0-*) last=${argument#--array=0-};; *.sh) script=$argument;; esac
done
seq 0 "$last" | xargs -P 2 -I{} env SLURM_ARRAY_TASK_ID={} bash "$script"
"""


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """A fake sbatch first on the path; its calls."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sbatch"
    program.write_text(SBATCH)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SBATCH_LOG", str(tmp_path / "calls"))
    monkeypatch.setattr("data.executors.POLL_SECONDS", 0.05)
    return tmp_path / "calls"


def test_slurm_gives_the_same_bytes(dataset, config, tmp_path, sbatch, monkeypatch):
    monkeypatch.setenv("CLOZE_SBATCH", "--partition=cpu --time=1:00:00")
    prepare(replace(config, output=str(tmp_path / "d"), executor="slurm", num_processes=3))
    assert fingerprint(tmp_path / "d") == fingerprint(dataset.root)
    calls = sbatch.read_text().splitlines()
    assert len(calls) == 3  # scan, encode, shards
    assert all("--wait --array=0-2 --partition=cpu --time=1:00:00" in call for call in calls)


def test_the_script_is_sound(tmp_path):
    script = tmp_path / "array.sh"
    script.write_text(slurm_script(tmp_path / "with space", "scan_file"))
    subprocess.run(["bash", "-n", script], check=True)
    assert "'" in script.read_text() and "$SLURM_ARRAY_TASK_ID" in script.read_text()


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three is wrong")
    return number * 2


def end_at_three(number: int) -> int:
    if number == 3:
        os._exit(9)
    return number * 2


def test_slurm_tells_errors_and_deaths(tmp_path, sbatch, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the elements import this module
    import test_data_executors as module

    run = run_on("slurm", module.fail_at_three, list(range(6)), 2, str(tmp_path))
    with pytest.raises(ValueError, match="three is wrong"):
        list(run)
    run = run_on("slurm", module.end_at_three, list(range(6)), 2, str(tmp_path))
    with pytest.raises(ChildProcessError, match=r"left 2 tasks undone.*Run the same command again"):
        list(run)


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no sbatch here"):
        list(run_on("slurm", fail_at_three, [1], 1, str(tmp_path)))


def test_ray_gives_the_same_bytes(dataset, config, tmp_path):
    """In a process of its own: Ray leaves threads and warnings behind."""
    pytest.importorskip("ray")
    from prepare_support import run

    changed = replace(config, output=str(tmp_path / "d"), executor="ray", num_processes=2)
    process = run(changed)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert fingerprint(tmp_path / "d") == fingerprint(dataset.root)
    (tmp_path / "bad.jsonl").write_text("not json\n")
    wrong = replace(changed, output=str(tmp_path / "e"), sources={"s": (f"{tmp_path}/bad.jsonl",)})
    process = run(wrong)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 3 and "not JSON" in output, output + errors
