"""A recipe in, a folder of clean documents and a report out: the stages, one after the other.

The work is datatrove's: its executor for this machine, for Slurm, or for Ray. What is complete is not done
again, so a run that was stopped goes on; and as every task is a function of the input alone, the output
is the same bytes wherever it was made.
"""

import glob
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor

from data.corpus.output import WORK
from data.corpus.readers import SUPPORTED, kind_of
from data.corpus.recipe import Recipe
from data.corpus.report import Report
from data.corpus.stages import Clean, Cluster, CorpusTask, Ledger, Match, Publish, Read, Stage
from data.files import remove_temporaries, write_json
from data.inputs import capped
from data.plan import locked_folder

RECIPE_FILE = "recipe.yaml"


def run_recipe(recipe: Recipe, *, dry_run: bool = False, verbose: bool = False) -> Path | None:
    """Carry a recipe out, or go on with it; the report's path. None where Slurm has it now.

    dry_run: of the Slurm executor, only write its scripts. verbose: datatrove's log on the screen;
    else it goes to .work/logs alone.
    """
    output = Path(recipe.output).absolute()
    tasks = find_tasks(recipe)
    with locked_folder(output):
        _enter(output, recipe, tasks)
        executors = make_executors(output, recipe, tasks)
        if recipe.executor.kind == "slurm":
            _submit(executors, dry_run)
            return None
        for executor in executors:
            name = Path(executor.logging_dir.path).name
            left = len(executor.get_incomplete_ranks())
            print(
                f"{name}: {left} of {executor.world_size} tasks to do", file=sys.stderr, flush=True
            )
            with nullcontext() if verbose else _stderr_into(output / WORK / "logs" / f"{name}.log"):
                executor.run()
        return output / "report.html"


@contextmanager
def _stderr_into(path: Path) -> Iterator[None]:
    """Standard error of this process and its children goes into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    screen = os.dup(2)
    with path.open("wb") as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def find_tasks(recipe: Recipe) -> list[CorpusTask]:
    """One task per input file, by source and path. ValueError with all that is wrong with them."""
    tasks: list[CorpusTask] = []
    problems: list[str] = []
    for source in sorted(recipe.sources):
        config = recipe.sources[source]
        paths: set[str] = set()
        for entry in config.files:
            found = _expand(entry)
            if not found:
                problems.append(
                    f"{source}: no file of a supported kind ({SUPPORTED}) is at {entry}"
                )
            paths.update(map(os.path.abspath, found))
        unknown = sorted(path for path in paths if kind_of(path) is None)
        problems += [
            f"{source}: {path} has an unknown suffix; supported: {SUPPORTED}" for path in unknown
        ]
        if paths:
            parent = os.path.commonpath([os.path.dirname(path) for path in paths])
            tasks += [
                CorpusTask(source, path, os.path.relpath(path, parent), config)
                for path in sorted(paths)
            ]
    if problems:
        raise ValueError(capped("input that cannot be used:", problems))
    return tasks


def _expand(entry: str) -> list[str]:
    if os.path.isdir(entry):
        return [
            os.path.join(folder, name)
            for folder, _, names in os.walk(entry)
            for name in names
            if not name.startswith(".") and kind_of(name) is not None
        ]
    return (
        [entry]
        if os.path.isfile(entry)
        else [p for p in glob.glob(entry, recursive=True) if os.path.isfile(p)]
    )


def _enter(output: Path, recipe: Recipe, tasks: list[CorpusTask]) -> None:
    """Write the recipe into a new folder, or check that the one that is there is the same."""
    files = {
        f"{task.source}: {task.relative}": [task.path, os.stat(task.path).st_size] for task in tasks
    }
    values = {"recipe": recipe.values, "files": files}
    path = output / RECIPE_FILE
    if path.exists():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        changes = [
            f"{part} {name}: {before[part].get(name)!r} -> {values[part].get(name)!r}"
            for part in ("recipe", "files")
            for name in sorted({*before[part], *values[part]})
            if before[part].get(name) != values[part].get(name)
        ]
        if changes:
            raise ValueError(
                capped(f"{output} was made from something else:", changes)
                + "\nGive another output, or delete this one."
            )
        remove_temporaries(output)
        return
    if foreign := sorted(p.name for p in output.iterdir()):
        raise ValueError(f"{output} is not empty ({', '.join(foreign[:5])}): give a new folder")
    (output / WORK).mkdir()
    write_json(output / WORK / "tasks.json", [task[:3] for task in tasks])
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def make_executors(output: Path, recipe: Recipe, tasks: list[CorpusTask]) -> list[PipelineExecutor]:
    """One executor per stage, in order; each waits for the one before it."""
    ledger = Ledger()
    stages: list[tuple[str, list[Any], int]] = [
        (
            "clean",
            [
                Read(tasks, ledger, recipe.stop_on_problems),
                *(Clean(step, ledger) for step in recipe.steps),
                Stage(output, tasks, recipe.dedup, ledger),
            ],
            len(tasks),
        )
    ]
    if recipe.dedup is not None and recipe.dedup.passes:
        passes = len(recipe.dedup.passes)
        stages.append(("match", [Match(output, len(tasks), recipe.dedup)], passes))
        stages.append(("cluster", [Cluster(output, len(tasks), recipe.dedup)], 1))
    stages.append(("publish", [Publish(output, tasks, with_copies=len(stages) == 1)], len(tasks)))
    stages.append(("report", [Report(output, recipe.values, tasks)], 1))
    executors: list[PipelineExecutor] = []
    for name, pipeline, num_tasks in stages:
        previous = executors[-1] if executors else None
        executors.append(_executor(output, recipe, (name, pipeline, num_tasks), previous))
    return executors


def _executor(
    output: Path, recipe: Recipe, stage: tuple[str, list[Any], int], previous: Any
) -> PipelineExecutor:
    name, pipeline, num_tasks = stage
    config = recipe.executor
    workers = min(num_tasks, config.workers or os.cpu_count() or 1)
    logging_dir = str(output / WORK / "logs" / name)
    if config.kind == "local":
        return LocalPipelineExecutor(pipeline, num_tasks, workers, logging_dir)
    if config.kind == "ray":
        from datatrove.executor import RayPipelineExecutor

        return RayPipelineExecutor(
            pipeline,
            num_tasks,
            workers,
            logging_dir=logging_dir,
            mem_per_cpu_gb=config.mem_per_cpu_gb,
        )
    return SlurmPipelineExecutor(
        pipeline,
        num_tasks,
        config.time,
        config.partition,
        mem_per_cpu_gb=config.mem_per_cpu_gb,
        workers=config.workers or -1,
        job_name=f"cloze-corpus-{name}",
        qos="",
        depends=previous,
        logging_dir=logging_dir,
        mail_type="NONE",
        sbatch_args=dict(config.sbatch),
        env_command=_environment(),
    )


def _submit(executors: list[PipelineExecutor], dry_run: bool) -> None:
    """Hand the last stage to Slurm, which makes it wait for those before it; dry_run: write scripts only."""
    if not dry_run:
        try:
            executors[-1].run()
        except subprocess.CalledProcessError as error:  # it has told why itself, on standard error
            raise ValueError(
                f"sbatch did not take a job (exit status {error.returncode}; its own words are above): change "
                "executor.partition, executor.time, executor.mem_per_cpu_gb or executor.sbatch"
            ) from error
        return
    for executor in executors:
        assert isinstance(executor, SlurmPipelineExecutor)
        pickled = executor.logging_dir.resolve_paths("executor.pik")
        script = executor.get_launch_file_contents(
            executor.get_sbatch_args(executor.tasks),
            f"srun -l -n 1 launch_pickled_pipeline {pickled}",
        )
        with executor.logging_dir.open("launch_script.slurm", "w") as file:
            file.write(script)


def _environment() -> str:
    """What a Slurm job runs first: the Python of now, with this code on its path."""
    code = Path(__file__).resolve().parent.parent.parent
    return f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={code}:${{PYTHONPATH:-}}"
