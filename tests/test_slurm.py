"""`cloze submit` on a real Slurm of three nodes: whatever ends a job, the run goes on, its curve the same."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, slurm_cluster
from support import ROOT, launch, read_metrics, tiny_preset
from test_trainer_stopping import curve, ledger

from trainer.checkpoint_files import list_checkpoints, problems_of, step_of

STEPS = 300
CHANGES = {"steps": STEPS, "save_every": 50, "log_every": 1, "hang_timeout_seconds": 8}


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster(3) as made:
        yield made


@pytest.fixture(scope="module")
def one_job(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """The curve of the run in one piece, on one machine."""
    folder = tmp_path_factory.mktemp("one_job")
    assert launch(tiny_preset(folder, tiny_dataset, **CHANGES), processes=2).returncode == 0
    return curve(folder / "run")


def submit(cluster: SlurmCluster, preset: Path, *options: str) -> list[str]:
    """Two nodes, a process each. The jobs' ids."""
    printed = cluster.run(
        sys.executable, "-m", "launcher.cli", "submit", str(preset), "--nodes=2", "--cpus-per-task=1",
        *options, SBATCH_MEM_PER_NODE="1000", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1",
    )  # fmt: skip
    return [line.split()[1].rstrip(":") for line in printed.splitlines() if line.startswith("job ")]


def wait_for_step(cluster: SlurmCluster, run: Path, step: int) -> None:
    def reached() -> bool:
        return read_metrics(run)[-1]["step"] >= step

    cluster.wait_for(reached, f"step {step} of {run}")


def wait_for_state(cluster: SlurmCluster, job: str, *states: str) -> None:
    cluster.wait_for(lambda: cluster.state(job) in states, f"job {job} is {states}", 200)


def run_now(cluster: SlurmCluster, job: str) -> None:
    """Slurm lets a job that was requeued wait for a minute or two."""
    wait_for_state(cluster, job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")


def log_of(run: Path) -> str:
    return "".join(path.read_text() for path in sorted(run.glob("slurm/submit-*/job-*.log")))


def test_a_chain_of_three_jobs_is_one_run(
    cluster: SlurmCluster, one_job: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    jobs = submit(cluster, tiny_preset(tmp_path, tiny_dataset, **CHANGES), "--hours=1", "--jobs=3")
    for job, step in zip(jobs, (60, 170), strict=False):
        wait_for_step(cluster, run, step)
        cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm's, before the time limit
        wait_for_state(cluster, job, "FAILED")  # with 75: the next one goes on
    wait_for_state(cluster, jobs[2], "COMPLETED")
    assert [line["slurm_job_id"] for line in ledger(run, "start")] == jobs
    assert [line["status"] for line in ledger(run, "end")] == ["preempted", "preempted", "done"]
    assert [m["step"] for m in read_metrics(run)] == list(range(1, STEPS + 1))
    assert curve(run) == one_job, log_of(run)
    assert step_of(list_checkpoints(run)[-1]) == STEPS
    assert problems_of(list_checkpoints(run)[-1]) == []
    assert len(list((run / "tensorboard").glob("events.*"))) == 3
