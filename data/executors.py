"""A function and its tasks in, results out: on this machine, by Slurm, or by Ray.

Tasks leave their files in a folder that all machines see; which machine ran which task leaves no trace in
them. A job that was killed is started again, and is given what is not finished.
"""

import os
import pickle
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from data.files import publishing
from data.pool import run_tasks

Executor = Literal["local", "slurm", "ray"]
EXECUTORS: tuple[Executor, ...] = ("local", "slurm", "ray")
SBATCH_OPTIONS = (
    "CLOZE_SBATCH"  # environment: options for sbatch, as "--partition=cpu --time=8:00:00"
)
POLL_SECONDS = 1.0

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_on(
    executor: Executor,
    function: Callable[[Task], Result],
    tasks: list[Task],
    num_processes: int,
    folder: str,
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, result) in the order of completion. The first error stops the rest and is raised.

    function: of a module's top level. num_processes: at a time, over all machines. folder: for what is
    handed over; every machine must see it under this name, as it must the input and the dataset.
    ChildProcessError: a worker was killed. ValueError: there is no such service here.
    """
    if executor == "slurm":
        return _run_by_slurm(function, tasks, num_processes, Path(folder))
    if executor == "ray":
        return _run_by_ray(function, tasks, num_processes)
    return run_tasks(function, tasks, num_processes)


def _run_by_ray(
    function: Callable[[Task], Result], tasks: list[Task], num_processes: int
) -> Iterator[tuple[Task, Result]]:
    """In the cluster that RAY_ADDRESS names, or one on this machine; one task takes one core."""
    if not tasks:
        return
    try:
        import ray
        from ray.exceptions import RayTaskError, WorkerCrashedError
    except ImportError as error:
        raise ValueError("executor ray needs the package ray: pip install ray") from error
    if started := not ray.is_initialized():
        num_cpus = None if "RAY_ADDRESS" in os.environ else num_processes
        # Workers import the code from where it is here: machines must share it, or have it installed.
        environment = {
            "env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        }
        ray.init(
            num_cpus=num_cpus, log_to_driver=False, include_dashboard=False, runtime_env=environment
        )
    try:
        remote = ray.remote(num_cpus=1, max_retries=3)(function)
        waiting = iter(tasks)
        running: dict[Any, Task] = {}
        while True:
            while len(running) < num_processes and (task := next(waiting, None)) is not None:
                running[remote.remote(task)] = task
            if not running:
                return
            finished, _ = ray.wait(list(running), num_returns=1)
            try:
                yield running.pop(finished[0]), ray.get(finished[0])
            except RayTaskError as error:
                raise error.cause from None
            except WorkerCrashedError as error:
                raise ChildProcessError(f"a Ray worker died: {error}. Run again") from error
    finally:
        if started:
            ray.shutdown()


def _run_by_slurm(
    function: Callable[[Task], Result], tasks: list[Task], num_processes: int, folder: Path
) -> Iterator[tuple[Task, Result]]:
    """As one job array of `num_processes` elements. Element i takes every num_processes-th task from i on."""
    if not tasks:
        return
    if shutil.which("sbatch") is None:
        raise ValueError(
            "executor slurm: there is no sbatch here. Run on a login node of the cluster"
        )
    batch = folder / "slurm" / f"{function.__name__}-{uuid.uuid4().hex[:8]}"
    batch.mkdir(parents=True)
    num_elements = min(num_processes, len(tasks))
    (batch / "tasks.pkl").write_bytes(pickle.dumps((function, tasks, num_elements)))
    (batch / "array.sh").write_text(slurm_script(batch, function.__name__))
    process = _sbatch(batch, num_elements)
    missing = set(range(len(tasks)))
    try:
        ended = False
        while missing:
            found = [number for number in missing if _result_path(batch, number).is_file()]
            for number in found:
                missing.remove(number)
                result = pickle.loads(_result_path(batch, number).read_bytes())
                if isinstance(result, Exception):
                    raise result
                yield tasks[number], result
            if ended and not found:
                raise ChildProcessError(_why_slurm_ended(batch, len(missing), process.returncode))
            ended = process.poll() is not None  # results of before are looked for once more
            if not ended and not found:
                time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    shutil.rmtree(batch)


def _sbatch(batch: Path, num_elements: int) -> subprocess.Popen[bytes]:
    """The job array, queued; the process ends when the array does."""
    options = shlex.split(os.environ.get(SBATCH_OPTIONS, ""))
    array = f"--array=0-{num_elements - 1}"
    with open(batch / "sbatch.log", "wb") as log:
        return subprocess.Popen(
            ["sbatch", "--wait", array, *options, str(batch / "array.sh")],
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def slurm_script(batch: Path, name: str) -> str:
    """What each element of the array runs: this Python, from this folder."""
    code = Path(__file__).resolve().parent.parent
    return f"""#!/bin/bash
#SBATCH --job-name=cloze-{name}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --requeue
#SBATCH --output={shlex.quote(str(batch))}/%a.log
set -euo pipefail
cd {shlex.quote(str(code))}
exec {shlex.quote(sys.executable)} -m data.executors {shlex.quote(str(batch))} "$SLURM_ARRAY_TASK_ID"
"""


def _why_slurm_ended(batch: Path, num_missing: int, status: int | None) -> str:
    said = (batch / "sbatch.log").read_text(errors="replace").strip()[-500:]
    return (
        f"the Slurm job ended (sbatch --wait gave {status}) and left {num_missing} tasks undone. It said: "
        f"{said!r}; the elements' logs are in {batch}. Run the same command again: what is finished is kept"
    )


def _result_path(batch: Path, number: int) -> Path:
    return batch / "results" / f"{number:06d}.pkl"


def run_element(batch: Path, element: int) -> None:
    """What one element of a Slurm array does. A task that fails leaves its error as its result."""
    function, tasks, num_elements = pickle.loads((batch / "tasks.pkl").read_bytes())
    for number in range(element, len(tasks), num_elements):
        if _result_path(batch, number).is_file():
            continue  # this element was requeued
        try:
            result = function(tasks[number])
        except (ValueError, OSError) as error:
            result = error
        with publishing(_result_path(batch, number)) as file:
            file.write(pickle.dumps(result))


if __name__ == "__main__":
    run_element(Path(sys.argv[1]), int(sys.argv[2]))
