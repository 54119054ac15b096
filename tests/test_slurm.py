"""`cloze submit` on a real Slurm of three nodes: whatever ends a job, the run goes on, its curve the same."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, slurm_cluster
from support import ROOT, launch, read_metrics, tiny_preset, write_corpus
from test_trainer_stopping import curve, ledger, processes_of

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
    """Slurm lets a job that was requeued wait for a minute or two. Three seconds are enough: nodes compare
    whole seconds to tell whether a start is older than the end before, which they refuse, ending the job."""
    wait_for_state(cluster, job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")


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


def test_a_job_that_is_told_to_save_requeues_itself(
    cluster: SlurmCluster, one_job: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    preset = tiny_preset(tmp_path, tiny_dataset, **CHANGES)
    (job,) = submit(cluster, preset, "--hours=1")
    wait_for_step(cluster, run, 40)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    run_now(cluster, job)
    wait_for_state(cluster, job, "COMPLETED")
    assert curve(run) == one_job, log_of(run)
    assert [line["slurm_job_id"] for line in ledger(run, "start")] == [job, job]
    assert "requeued 1 times" in log_of(run)
    assert "stopped and saved; the same command goes on from step" in log_of(run)


def test_a_job_that_is_cancelled_saves_and_stays_away(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    preset = tiny_preset(tmp_path, tiny_dataset, **CHANGES | {"save_every": 0})
    (job,) = submit(cluster, preset, "--hours=1")
    wait_for_step(cluster, run, 20)
    cluster.run("scancel", job)
    wait_for_state(cluster, job, "CANCELLED")
    cluster.wait_for(
        lambda: not processes_of(str(run / "slurm" / "submit-1" / "config.yaml")), "all end"
    )
    (end,) = ledger(run, "end")
    assert end["status"] == "preempted", log_of(run)
    assert step_of(list_checkpoints(run)[-1]) == end["step"] >= 20
    assert problems_of(list_checkpoints(run)[-1]) == []
    assert cluster.state(job) == "CANCELLED"


def test_a_node_that_dies_is_replaced(
    cluster: SlurmCluster, one_job: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (job,) = submit(cluster, tiny_preset(tmp_path, tiny_dataset, **CHANGES), "--hours=1")
    wait_for_step(cluster, run, 60)
    nodes = cluster.run("squeue", "-h", "-j", job, "-o", "%N")
    cluster.crash(2)  # one of host[1-2]: the first two that are free
    try:
        run_now(cluster, job)
        wait_for_state(cluster, job, "COMPLETED")
    finally:
        cluster.boot(2)
    assert nodes.strip() == "host[1-2]"
    assert "(host[1,3])" in log_of(run)
    assert curve(run) == one_job, log_of(run)


def test_a_preempted_job_goes_on_when_there_is_room(
    cluster: SlurmCluster, one_job: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (job,) = submit(cluster, tiny_preset(tmp_path, tiny_dataset, **CHANGES), "--hours=1")
    wait_for_step(cluster, run, 60)
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null",
        "--wrap", "sleep 1",
    ).strip()  # fmt: skip
    wait_for_state(cluster, urgent, "COMPLETED")
    run_now(cluster, job)
    wait_for_state(cluster, job, "COMPLETED")
    assert curve(run) == one_job, log_of(run)


def test_a_rank_that_dies_costs_a_start_and_no_place_in_the_queue(
    cluster: SlurmCluster, one_job: list[tuple], tiny_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (job,) = submit(cluster, tiny_preset(tmp_path, tiny_dataset, **CHANGES), "--hours=1")
    wait_for_step(cluster, run, 60)
    config = run / "slurm" / "submit-1" / "config.yaml"
    ranks = [pid for pid in pids() if f"-u -m launcher.train {config}" in command_of(pid)]
    os.kill(min(ranks), signal.SIGKILL)
    wait_for_state(cluster, job, "COMPLETED")
    assert "ranks that left without a word:" in log_of(run)
    assert "requeued 0 times, start 2" in log_of(run)
    assert curve(run) == one_job


def pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except OSError:  # it has ended
        return ""


def test_what_another_start_would_not_mend_ends_the_job(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Here: a folder that somebody else's files are in by the time that the job begins."""
    run = tmp_path / "run"
    preset = tiny_preset(tmp_path, tiny_dataset, **CHANGES)
    (job,) = submit(cluster, preset, "--hours=1", "--sbatch=--hold")
    (run / "thesis.tex").write_text("mine")
    cluster.run("scontrol", "release", job)
    wait_for_state(cluster, job, "FAILED")
    assert "ExitCode=78:0" in cluster.run("scontrol", "show", "job", job)
    assert "holds ['thesis.tex'] and is no run of ours" in log_of(run)
    assert log_of(run).count("start 1:") == 1 and "start 2:" not in log_of(run)


def test_a_dataset_is_prepared_by_a_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text.jsonl", 300)
    made = {}
    for name in ("here", "there"):
        arguments = [
            str(tmp_path / name),
            f"text={text}",
            "--vocab-size=360",
            "--heldout-fraction=0.05",
        ]
        if name == "here":
            cloze = [sys.executable, "-m", "launcher.cli", "prepare"]
            subprocess.run([*cloze, *arguments], cwd=ROOT, check=True, capture_output=True)
        else:
            cluster.run(
                "sbatch", "--wait", "--cpus-per-task=2", "--mem=1000", f"--output={tmp_path}/log",
                "slurm/prepare.sbatch", *arguments, CLOZE_VENV=sys.prefix,
            )  # fmt: skip
        made[name] = {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.tar")}
    assert made["here"] == made["there"] and made["here"]
