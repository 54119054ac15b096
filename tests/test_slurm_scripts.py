"""What else runs on Slurm, on a real one of two nodes: the scripts, their arrays, containers, the executors."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import SlurmCluster, slurm_cluster
from support import ROOT, environment, read_metrics, tiny_preset, write_corpus

from data.corpus.output import read_documents
from data.shards import Dataset

CLOZE = [sys.executable, "-m", "launcher.cli"]
VARIABLES = {
    "CLOZE_VENV": sys.prefix, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SBATCH_MEM_PER_NODE": "1000",
}  # fmt: skip
BARE_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"  # of a machine that has Slurm, and none of our Python


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster(2) as made:
        yield made


def here(*arguments: object) -> str:
    """A `cloze` command in a process of this machine; what it printed."""
    result = subprocess.run(
        [*CLOZE, *map(str, arguments)], cwd=ROOT, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def sbatch(cluster: SlurmCluster, *words: object, logs: Path, **variables: str) -> list[str]:
    """Submit, and wait until all tasks have ended well; the log of each.

    Not by `sbatch --wait`, which looks ever more rarely.
    """
    job = cluster.run(
        "sbatch", "--parsable", f"--output={logs}-%a.log", *map(str, words), **{**VARIABLES, **variables}
    ).strip()  # fmt: skip
    cluster.wait_for(lambda: not cluster.run("squeue", "-h", "-j", job), f"job {job} ends", 200)
    told = [path.read_text() for path in sorted(logs.parent.glob(f"{logs.name}-*.log"))]
    shown = cluster.run("scontrol", "show", "job", job)
    assert shown.count("JobState=") == shown.count("JobState=COMPLETED"), [shown, *told]
    return told


def stand_ins(folder: Path) -> tuple[str, str]:
    """Two things for CLOZE_SRUN that change what programs see, as a container does; each use leaves a line.

    An option of srun, as --container-image of pyxis; and a program, as `apptainer exec image.sif`.
    """
    inside = f"{Path(sys.executable).parent}:{BARE_PATH}"
    option, program = folder / "option", folder / "program"
    option.write_text(f'#!/bin/bash\necho task >> {option}.used\necho "export PATH={inside}"\n')
    program.write_text(f'#!/bin/bash\necho "$1" >> {program}.used\nPATH={inside} exec "$@"\n')
    for file in (option, program):
        file.chmod(0o755)
    return f"--task-prolog={option}", str(program)


def test_a_run_in_a_container_and_the_curve_of_its_checkpoints(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path
) -> None:
    """The nodes themselves have no Python of ours: everything goes through CLOZE_SRUN."""
    preset = tiny_preset(tmp_path, tiny_dataset, steps=4, save_every=2, eval_every=2)
    option, program = stand_ins(tmp_path)
    outside = {"CLOZE_VENV": "/none", "PATH": BARE_PATH}
    sbatch(
        cluster, "--nodes=2", "--cpus-per-task=1", "slurm/train.sbatch", preset,
        logs=tmp_path / "train", CLOZE_SRUN=program, **outside,
    )  # fmt: skip
    heldout = {line["step"]: line for line in read_metrics(tmp_path / "run", "heldout")}
    assert sorted(heldout) == [2, 4]
    used = (tmp_path / "program.used").read_text().split()
    # torchrun on both nodes; before and after it, what the batch script asks
    assert sorted(used) == ["python", "python", "torchrun", "torchrun"]
    logs = sbatch(
        cluster, "--array=2,4", "--cpus-per-task=1", "slurm/evaluate.sbatch", tmp_path / "run",
        "--step=%a", "--rows=24", "--json", logs=tmp_path / "evaluate", CLOZE_SRUN=option, **outside,
    )  # fmt: skip
    reports = [json.loads(log) for log in logs]
    assert [report["step"] for report in reports] == [2, 4]
    for report in reports:
        logged = heldout[report["step"]]["mlm_loss"]
        assert report["together"]["mlm_loss"] == pytest.approx(logged, rel=1e-5)
    assert (tmp_path / "option.used").read_text().split() == ["task", "task"]


def test_arrays_of_prepare(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Two datasets side by side, then two sources after each other into one of them."""
    for number in (1, 2):
        write_corpus(tmp_path / f"text-{number}.jsonl", 120, start=1000 * number)
    options = ["--vocab-size=360", "--heldout-fraction=0.05", "--block-tokens=4096"]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    text, task = f"text={tmp_path}/text-%a.jsonl", "%a"
    sbatch(
        cluster, "--array=1-2", "--cpus-per-task=1", "slurm/prepare.sbatch", f"{tmp_path}/there/part-%a",
        text, *options, logs=tmp_path / "part",
    )  # fmt: skip
    more = f"more_%a={tmp_path}/text-%a.jsonl"
    sbatch(
        cluster, "--array=1-2%1", "--cpus-per-task=1", "slurm/prepare.sbatch", tmp_path / "there" / "part-1",
        more, "--append", logs=tmp_path / "more",
    )  # fmt: skip
    for number in ("1", "2"):
        folder = tmp_path / "here" / f"part-{number}"
        here("prepare", folder, text.replace(task, number), *options, "--processes=1")
    for number in ("1", "2"):
        folder = tmp_path / "here" / "part-1"
        here("prepare", folder, more.replace(task, number), "--append", "--processes=1")
    for name in ("part-1", "part-2"):
        mine, its = (Dataset.open(tmp_path / place / name) for place in ("here", "there"))
        assert mine.digest == its.digest
    assert Dataset.open(tmp_path / "there" / "part-1").sources == ["text", "more_1", "more_2"]


def test_prepare_by_the_slurm_executor(cluster: SlurmCluster, tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text.jsonl", 150)
    options = [f"text={text}", "--vocab-size=360", "--heldout-fraction=0.05", "--block-tokens=4096"]
    cluster.run(
        *CLOZE, "prepare", str(tmp_path / "there"), *options, "--executor=slurm", "--processes=2",
        **VARIABLES,
    )  # fmt: skip
    here("prepare", tmp_path / "here", *options, "--processes=2")
    there, local = Dataset.open(tmp_path / "there"), Dataset.open(tmp_path / "here")
    assert there.digest == local.digest


def test_a_corpus_by_the_slurm_executor(cluster: SlurmCluster, tmp_path: Path) -> None:
    """One job for each stage, which wait for one another; the same documents, and the same report."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in (1, 2):
        write_corpus(raw / f"{number}.jsonl", 60, start=60 * number)
    recipe: dict[str, Any] = {"sources": {"text": [str(raw)]}, "steps": ["normalise"]}
    made = {}
    for kind in ("slurm", "local"):
        executor = {"kind": kind, "workers": 2}
        if kind == "slurm":
            executor |= {"partition": "main", "mem_per_cpu_gb": 1, "time": "0:10:00"}
        values = {**recipe, "output": str(tmp_path / kind), "executor": executor}
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(values))
    cluster.run(*CLOZE, "corpus", str(tmp_path / "slurm.yaml"), **VARIABLES)
    here("corpus", tmp_path / "local.yaml")
    cluster.wait_for(lambda: not cluster.run("squeue", "-h"), "all stages have run")
    for kind in ("slurm", "local"):
        report = tmp_path / kind / "report.json"
        assert report.is_file(), sorted((tmp_path / kind).rglob("*"))
        paths = sorted((tmp_path / kind / "documents").rglob("*.zst"))
        made[kind] = (
            json.loads(report.read_text().replace(f"/{kind}", "/output")),
            [row for path in paths for row in read_documents(path)],
        )
    assert made["slurm"] == made["local"]
    assert len(made["slurm"][1]) == 120
