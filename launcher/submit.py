"""`cloze submit PRESET --nodes N --hours H`: the run on Slurm, from a frozen copy, until it is done.

The code, the resolved preset and the versions of all packages are copied into the run's folder, with the
batch script that starts them; what is edited afterwards does not reach the job. It is slurm/train.sbatch with
its lines filled in: read it, or sbatch it by hand.
"""

import argparse
import hashlib
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from data.shards import Dataset
from launcher.cluster_env import SITE, site_variables
from launcher.environment import ROOT, environment_lines
from launcher.freeze import freeze, next_folder
from launcher.jobs import read_jobs
from launcher.slurm_job import ENVIRONMENT_FILE
from launcher.tables import bytes_text
from model.flops import num_parameters
from trainer.checkpoint_files import list_checkpoints, step_of
from trainer.config import RunConfig, load_config
from trainer.stopping import SAFETY

TEMPLATE = ROOT / "slurm" / "train.sbatch"
SPARE_SECONDS = 30  # of the signal's lead: for it to arrive, and for the processes to end
LEAST_LEAD_SECONDS = 120  # where nobody asks for less; Slurm's signal may come a minute earlier
WRITE_BYTES_PER_SECOND = 100e6  # of a checkpoint, by one rank, where nothing was measured
STATE_BYTES = 16  # of a checkpoint for each parameter: master, two moments, the copy in hf/
MAX_TASKS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", type=Path, help="YAML file, e.g. configs/base.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value; %%a is the task of a job array")
    add = parser.add_argument
    add("--nodes", type=int, required=True)
    add("--hours", type=float, required=True, help="of one job; the run may take many")
    add(
        "--gpus-per-node",
        type=int,
        help="one process each; without it one process per node, on CPUs",
    )
    add("--processes-per-node", type=int, help="where it is not one per GPU")
    add("--cpus-per-task", type=int, default=8, help="cores of a node's processes (%(default)s)")
    add("--partition", help="default: SBATCH_PARTITION of slurm/cluster.env, or Slurm's own")
    add("--account", help="default: SBATCH_ACCOUNT of slurm/cluster.env, or Slurm's own")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="e.g. --sbatch=--qos=long")
    add(
        "--jobs",
        type=int,
        help="queue so many, one after the other, instead of one that requeues itself",
    )
    add("--array", metavar="1-3", help="one run for each task; %%a in the overrides is its number")
    add(
        "--signal-seconds",
        type=int,
        help="before the time limit, to save; default: from what was measured",
    )
    add("--new-phase", action="store_true", help="as of `cloze train`")
    add("--dry-run", action="store_true", help="print all that would be done, and do nothing")


def run(options: argparse.Namespace) -> int:
    """Submit, and print the ids of the jobs. ValueError, all problems in one message; OSError from Slurm."""
    tasks = _tasks(options.array)
    configs = _configs(options, tasks)
    needed = max(needed_seconds(config) for config in configs.values())
    lead = options.signal_seconds or max(LEAST_LEAD_SECONDS, needed)
    if problems := [*_problems(options, configs), *_lead_problems(options, lead, needed)]:
        raise ValueError("; ".join(problems))
    site = site_variables()
    folder = next_folder(Path(next(iter(configs.values())).dir))
    script = batch_script(options, folder, lead, _job_name(configs))
    environment = {**os.environ, **site}
    if options.dry_run:
        _show(folder, configs, script, site)
        return 0
    freeze(folder, configs)
    (folder / "train.sbatch").write_text(script, encoding="utf-8")
    for _ in range(options.jobs or 1):
        print(f"job {_sbatch(folder / 'train.sbatch', environment)}: {folder / 'train.sbatch'}")
    for config in configs.values():
        print(f"cloze status {config.dir}")
    return 0


def needed_seconds(config: RunConfig) -> int:
    """How long before its time limit a job of this run has to be told: a step and a checkpoint, and to spare.

    As measured in its last job; before the first, a checkpoint's size over WRITE_BYTES_PER_SECOND.
    """
    jobs = [job for job in read_jobs(Path(config.dir)) if job.longest_save_seconds]
    needed = STATE_BYTES * _num_parameters(config) / WRITE_BYTES_PER_SECOND
    if jobs:
        needed = SAFETY * (jobs[-1].longest_step_seconds + jobs[-1].longest_save_seconds)
    return math.ceil(needed + SPARE_SECONDS)


def batch_script(options: argparse.Namespace, folder: Path, lead: int, name: str) -> str:
    """slurm/train.sbatch, its #SBATCH lines and its arguments filled in."""
    minutes = math.floor(60 * options.hours)
    told = {
        "job-name": name, "nodes": options.nodes, "time": f"{minutes // 60}:{minutes % 60:02d}:00",
        "gpus-per-node": options.gpus_per_node, "cpus-per-task": options.cpus_per_task,
        "partition": options.partition, "account": options.account, "array": options.array,
        "signal": f"B:USR1@{lead}", "output": f"{folder}/job-%j.log",
        "dependency": "singleton" if options.jobs else None,
    }  # fmt: skip
    lines = [f"#SBATCH --{key}={value}" for key, value in told.items() if value is not None]
    lines += [f"#SBATCH {option}" for option in options.sbatch]
    config = folder / ("config-%a.yaml" if options.array else "config.yaml")
    arguments = [str(config), *(["--new-phase"] if options.new_phase else [])]
    settings = {
        "CLOZE_CODE": folder / "code",
        "CLOZE_VENV": sys.prefix,
        ENVIRONMENT_FILE: folder / "environment.txt",
        "CLOZE_PROCESSES_PER_NODE": options.processes_per_node,
        "CLOZE_REQUEUE": 0 if options.jobs else None,
    }
    exports = [
        f"export {key}={shlex.quote(str(value))}"
        for key, value in settings.items()
        if value is not None
    ]
    replaced = re.compile(rf"#SBATCH --({'|'.join(map(re.escape, told))})=")
    head, body = [], []
    for line in TEMPLATE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#SBATCH"):
            if not (found := replaced.match(line)) or told[found[1]] is None:
                head.append(line)
        elif not line.startswith("#") or body:
            body.append(line)
    return "\n".join(
        ["#!/bin/bash", "# Written by `cloze submit` from slurm/train.sbatch.", *head, *lines, *exports,
         f"set -- {shlex.join(arguments)}", *body, ""]
    )  # fmt: skip


def _configs(options: argparse.Namespace, tasks: list[int]) -> dict[str, RunConfig]:
    """File name -> settings of that run."""
    if not tasks:
        return {"config.yaml": load_config(options.preset, options.overrides)}
    return {
        f"config-{task}.yaml": load_config(
            options.preset, [word.replace("%a", str(task)) for word in options.overrides]
        )
        for task in tasks
    }


def _tasks(array: str | None) -> list[int]:
    """1-3,7 -> 1 2 3 7; none where there is no array."""
    if array is None:
        return []
    tasks: list[int] = []
    for part in array.partition("%")[0].split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not found:
            raise ValueError(f"--array {array}: give numbers and ranges, e.g. 1-3 or 1,5,7%2")
        tasks += range(int(found[1]), int(found[2] or found[1]) + 1)
    if not 0 < len(tasks) <= MAX_TASKS:
        raise ValueError(f"--array {array} has {len(tasks)} tasks; 1 to {MAX_TASKS} are possible")
    return tasks


def _problems(options: argparse.Namespace, configs: dict[str, RunConfig]) -> list[str]:
    problems = [
        f"--{name.replace('_', '-')} {value} is below 1"
        for name in ("nodes", "gpus_per_node", "processes_per_node", "cpus_per_task", "jobs")
        if (value := getattr(options, name)) is not None and value < 1
    ]
    processes = options.processes_per_node or options.gpus_per_node or 1
    ranks = options.nodes * processes
    for config in configs.values():
        shared = min(config.global_batch_size, config.data.num_lanes)
        if ranks > 0 and shared % ranks:
            problems.append(
                f"{options.nodes} nodes x {processes} processes = {ranks} ranks do not divide "
                f"min(global_batch_size, data.num_lanes) = {shared}"
            )
            break
    folders = [config.dir for config in configs.values()]
    if len(set(folders)) < len(folders):
        problems.append(
            f"tasks of --array {options.array} share dir {folders[0]}: put %a into dir="
        )
    problems += [
        f"--sbatch {option}: give it as sbatch takes it, e.g. --sbatch=--qos=long"
        for option in options.sbatch
        if not option.startswith("-")
    ]
    return problems


def _lead_problems(options: argparse.Namespace, lead: int, needed: int) -> list[str]:
    problems = []
    if lead < needed:
        problems.append(
            f"--signal-seconds {lead} is too short: a step and a checkpoint of this run, and to spare, may "
            f"take {needed} s"
        )
    if 3600 * options.hours < 2 * lead:
        problems.append(
            f"--hours {options.hours:g} ({3600 * options.hours:.0f} s) leaves no time to train: the job is "
            f"told to save {lead} s before its end"
        )
    return problems


def _num_parameters(config: RunConfig) -> int:
    """ValueError or OSError where the dataset cannot be used."""
    dataset = Dataset.open(config.data.path, config.data.storage)
    return num_parameters(config.model, dataset.vocab_size)


def _job_name(configs: dict[str, RunConfig]) -> str:
    """The same for all submissions of a run, and of no other: one of a name runs at a time (singleton)."""
    folder = Path(next(iter(configs.values())).dir).resolve()
    return f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"


def _show(folder: Path, configs: dict[str, RunConfig], script: str, site: dict[str, str]) -> None:
    print(f"would freeze into {folder}: {', '.join(configs)}, code/, environment.txt "
          f"({len(environment_lines())} packages)")  # fmt: skip
    for config in configs.values():
        done = max(map(step_of, list_checkpoints(Path(config.dir))), default=0)
        size = STATE_BYTES * _num_parameters(config)
        print(
            f"{config.dir}: {config.steps - done:,} of {config.steps:,} steps are left; "
            f"a checkpoint is about {bytes_text(size)}"
        )
    for name, value in site.items():
        print(f"{name}={value} ({SITE})")
    print(f"would run: sbatch {folder / 'train.sbatch'}\n\n{script}", end="")


def _sbatch(script: Path, environment: dict[str, str]) -> str:
    try:
        result = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise OSError(
            f"sbatch was not found: run this on a machine of the cluster ({script} is ready)"
        ) from None
    if result.returncode != 0:
        raise OSError(
            f"sbatch refuses {script}: {result.stderr.strip()}. Change it with --partition, --account, "
            "--sbatch=..., or slurm/cluster.env"
        )
    return result.stdout.strip().partition(";")[0]
