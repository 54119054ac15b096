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
    """Submit, and wait for the end; the log of each task."""
    output = f"--output={logs}-%a.log"
    try:
        cluster.run("sbatch", "--wait", output, *map(str, words), **{**VARIABLES, **variables})
    except AssertionError as error:
        told = [f"{path}: {path.read_text()}" for path in sorted(logs.parent.glob("*.log"))]
        raise AssertionError("\n".join([str(error), *told])) from None
    return [path.read_text() for path in sorted(logs.parent.glob(f"{logs.name}-*.log"))]


def stand_in(folder: Path, kind: str) -> str:
    """CLOZE_SRUN for something that changes what programs see, as a container does; each use leaves a line."""
    inside = f"{Path(sys.executable).parent}:{BARE_PATH}"
    file, log = folder / kind, folder / f"{kind}.used"
    if kind == "program":  # as `apptainer exec image.sif`
        file.write_text(f'#!/bin/bash\necho "$1" >> {log}\nPATH={inside} exec "$@"\n')
        words = f"{file}"
    else:  # as --container-image of pyxis
        file.write_text(f'#!/bin/bash\necho "$0" >> {log}\necho "export PATH={inside}"\n')
        words = f"--task-prolog={file}"
    file.chmod(0o755)
    return words


@pytest.mark.parametrize("kind", ["program", "option"])
def test_a_run_in_a_container_and_the_curve_of_its_checkpoints(
    kind: str, cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path
) -> None:
    """The nodes themselves have no Python of ours; every process goes through CLOZE_SRUN."""
    changes = {"steps": 4, "save_every": 2, "eval_every": 2}
    preset = tiny_preset(tmp_path, tiny_dataset, **changes)
    outside = {"CLOZE_VENV": "/none", "CLOZE_SRUN": stand_in(tmp_path, kind), "PATH": BARE_PATH}
    sbatch(
        cluster, "--nodes=2", "--cpus-per-task=1", "slurm/train.sbatch", preset,
        logs=tmp_path / "train", **outside,
    )  # fmt: skip
    heldout = {line["step"]: line for line in read_metrics(tmp_path / "run", "heldout")}
    assert sorted(heldout) == [2, 4]
    used = (tmp_path / f"{kind}.used").read_text().splitlines()
    assert len(used) == 4  # torchrun on both nodes; before and after it, what the batch script asks
    if kind == "program":
        assert sorted(used) == ["python", "python", "torchrun", "torchrun"]
    logs = sbatch(
        cluster, "--array=2,4", "--cpus-per-task=1", "slurm/evaluate.sbatch", tmp_path / "run",
        "--step=%a", "--rows=24", "--json", logs=tmp_path / "evaluate", **outside,
    )  # fmt: skip
    reports = [json.loads(log) for log in logs]
    assert [report["step"] for report in reports] == [2, 4]
    for report in reports:
        assert report["together"]["mlm_loss"] == pytest.approx(
            heldout[report["step"]]["mlm_loss"], rel=1e-5
        )


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
        write_corpus(raw / f"{number}.jsonl", 60, start=40 * number)  # twenty are in both
    recipe: dict[str, Any] = {"sources": {"text": [str(raw)]}, "steps": ["normalise"]}
    recipe |= {"dedup": {"exact": True, "near": False}}
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
    assert len(made["slurm"][1]) == 100
