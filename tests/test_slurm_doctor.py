"""What docs/cluster.md says to type, typed on a real Slurm; nodes with faults, and what names them."""

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, slurm_cluster
from support import ROOT, tiny_preset, write_corpus
from test_docs import blocks
from test_launcher_cluster_hosts import ill
from test_slurm import wait_for_state

from launcher.environment import CODE
from trainer.checkpoint_files import list_checkpoints, step_of

SIZES = {  # of the documented commands -> of the cluster here
    "--processes 64": "--processes 2 --vocab-size 360 --block-tokens 4096 --heldout-fraction 0.05",
    "--ranks 16": "--ranks 2",
    "--gpus-per-node=8 ": "--cpus-per-task=1 --mem=1000 ",
    "--gpus-per-node 8 --hours 24": "--cpus-per-task 1 --sbatch=--mem=1000 --hours 1",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster(3) as made:
        yield made


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository's folder with its .venv, as a user has it; its preset and text are small."""
    folder = tmp_path / "cloze"
    for part in (*CODE, "configs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "slurm" / "cluster.env").unlink(missing_ok=True)
    text = folder / "corpora" / "clean" / "documents" / "wiki"
    text.mkdir(parents=True)
    write_corpus(text / "00000.jsonl", 1500)
    preset = tiny_preset(tmp_path, folder / "datasets" / "none")
    shutil.move(preset, folder / "configs" / "large.yaml")
    return folder


def typed(cluster: SlurmCluster, folder: Path, line: str) -> str:
    """What is printed when that is typed on the login node, in `folder`, with its .venv activated."""
    script = f"cd {folder}; source .venv/bin/activate; {line}"
    return cluster.run("bash", "-c", script, PYTHONPATH=str(folder), OMP_NUM_THREADS="1")


def test_from_the_login_node_to_a_finished_run(cluster: SlurmCluster, checkout: Path) -> None:
    """All commands of the page's first block, in turn."""
    page = next(blocks(ROOT / "docs" / "cluster.md", "bash"))
    printed = {}
    for line in page.splitlines():
        for documented, here in SIZES.items():
            line = line.replace(documented, here)
        assert not re.search(r"gpu| 64| 16| 24", line), line
        printed[" ".join(line.split()[:2])] = typed(cluster, checkout, line)
        if line.startswith("cloze submit"):
            (job,) = re.findall(r"^job (\d+):", printed["cloze submit"], re.MULTILINE)
            wait_for_state(cluster, job, "COMPLETED")
    assert list(printed) == [
        "cp slurm/cluster.env.example", "cloze prepare", "cloze doctor", "salloc --nodes=2", "cloze submit",
        "cloze status",
    ]  # fmt: skip
    assert "0 PROBLEM" in printed["cloze doctor"]
    examined = printed["salloc --nodes=2"]
    assert "0 PROBLEM, 0 WARNING" in examined and ill(examined) == {}, examined
    assert re.search(r"^OK +meeting +2 machines +host1 to host2", examined, re.MULTILINE)
    assert step_of(list_checkpoints(checkout / "runs" / "large")[-1]) == 8
    assert "8 of 8" in printed["cloze status"], printed["cloze status"]


@contextmanager
def slow_cable(cluster: SlurmCluster, number: int) -> Iterator[None]:
    """A tenth of a gigabit per second, in one direction."""
    slow = "tc qdisc add dev eth0 root tbf rate 80mbit burst 64kb latency 400ms"
    try:
        cluster.run_on(number, *slow.split())
    except AssertionError as error:
        pytest.skip(f"this kernel has no tbf: {error}")
    try:
        yield
    finally:
        cluster.run_on(number, "tc", "qdisc", "del", "dev", "eth0", "root")


def test_nodes_with_faults_are_named(
    cluster: SlurmCluster, tiny_dataset: Path, checkout: Path
) -> None:
    """host3: a slow cable. host2: another version of a package, and a run's folder that is mounted read-only.
    The job: told to save too late."""
    run, extra, wrong = (checkout / name for name in ("runs/large", "extra", "wrong"))
    for folder in (run, extra, wrong / "torch-0.1.dist-info"):
        folder.mkdir(parents=True)
    (wrong / "torch-0.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 0.1\n")
    script = checkout / "slurm" / "doctor.sbatch"
    for before, after in {"USR1@300": "USR1@10", "cpus-per-task=8": "cpus-per-task=1"}.items():
        script.write_text(script.read_text().replace(before, after))
    cluster.run_on(2, "mount", "--bind", str(wrong), str(extra))
    cluster.run_on(2, "mount", "--bind", str(run), str(run))
    cluster.run_on(2, "mount", "-o", "remount,bind,ro", str(run))
    command = (
        f"PYTHONPATH=$PYTHONPATH:{extra} sbatch --parsable --nodes=3 --mem=1000 --output=log "
        f"slurm/doctor.sbatch configs/large.yaml data.path={tiny_dataset} dir=runs/large"
    )
    try:
        with slow_cable(cluster, 3):
            job = typed(cluster, checkout, command).strip()
            wait_for_state(cluster, job, "FAILED")  # not COMPLETED: something is a PROBLEM
    finally:
        cluster.run_on(2, "umount", str(run), str(extra))
    table = (checkout / "log").read_text()
    assert ill(table) == {
        ("packages", "host2"): "PROBLEM",
        ("run folder", "host2"): "PROBLEM",
        ("links", "host3"): "PROBLEM",
        ("time limit", "this job"): "PROBLEM",
    }, table
    assert re.search(r"torch 0\.1 and \S+ \(others ", table)
    assert "Read-only file system" in table and "--signal=B:USR1@10" in table
    assert re.search(r"at most \S+ MB/s with any other; usual are ", table)
    assert not list(run.iterdir())
