"""A preset's file and a number of processes in, a finished or a killed run out, of real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.jobs import json_lines

ROOT = Path(__file__).resolve().parent.parent
OF_LAUNCHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
MARK = "CLOZE_PROOF"  # in the environment of all processes of one run, by which they are found
LOOK_SECONDS = 0.002
TAIL_LINES, NUM_CAUSES = 20, 8
CAUSE = re.compile(r"\bcloze: |\b\w*(?:Error|Exception): ")  # our own messages, and Python's


def run_to_end(preset: Path, world_size: int, log: Path) -> float:
    """Train in `world_size` processes; returns the seconds it took. ValueError when it fails."""
    start = time.monotonic()
    with _started(preset, world_size, log) as (process, _):
        if process.wait():
            raise ValueError(
                f"training in {processes(world_size)} ended with exit status {process.returncode}:\n"
                + _cause(log)
            )
    return time.monotonic() - start


def run_and_kill(preset: Path, world_size: int, log: Path, run: Path, step: int) -> int:
    """Train until `step` is in metrics.jsonl, then SIGKILL every process. Returns the step reached."""
    with _started(preset, world_size, log) as (process, mark):
        while last_step(run / "metrics.jsonl") < step:
            if process.poll() is not None:
                raise ValueError(
                    f"training in {processes(world_size)} ended with exit status {process.returncode} before "
                    f"it could be killed at step {step} (steps of milliseconds are too fast for this):\n"
                    + _cause(log)
                )
            time.sleep(LOOK_SECONDS)
        kill_marked(mark)
        process.wait()
    return last_step(run / "metrics.jsonl")


@contextmanager
def _started(
    preset: Path, world_size: int, log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The run under way, and the mark of its processes; none of them is left afterwards."""
    arguments = ["-m", "launcher.train", str(preset)]
    if world_size > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        arguments = [*torchrun, f"--nproc-per-node={world_size}", *arguments]
    mark = f"{MARK}={uuid.uuid4().hex}"
    environment = {k: v for k, v in os.environ.items() if k not in OF_LAUNCHERS}
    path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    environment |= {"PYTHONPATH": path, MARK: mark.partition("=")[2]}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # ours alone decides when it is interrupted
        )
        try:
            yield process, mark
        finally:
            kill_marked(mark)
            process.wait()


def kill_marked(mark: str) -> None:
    """SIGKILL all processes with `mark` in their environment, those too that they start meanwhile."""
    while pids := marked(mark):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(LOOK_SECONDS)


def marked(mark: str) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
            except OSError:  # it has ended, or belongs to somebody else
                continue
    return found


def last_step(metrics: Path) -> int:
    """Of the last whole line about training; 0 without one."""
    try:
        lines = list(json_lines(metrics.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return 0
    return max((line["step"] for line in lines if line.get("kind") == "train"), default=0)


def copy_run(run: Path, copy: Path) -> None:
    """A second run that stands where the first was killed. Checkpoints are linked: nothing alters them."""

    def place(source: str, target: str) -> None:
        in_checkpoint = Path(source).is_relative_to(run / "checkpoints")
        (os.link if in_checkpoint else shutil.copy2)(source, target)

    shutil.copytree(run, copy, copy_function=place, ignore=shutil.ignore_patterns("lock"))


def read_curve(run: Path) -> dict[int, dict]:
    """Step -> its line of metrics.jsonl. ValueError where a step is told twice."""
    curve: dict[int, dict] = {}
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["kind"] == "train":
            if line["step"] in curve:
                raise ValueError(f"{run / 'metrics.jsonl'} has step {line['step']} twice")
            curve[line["step"]] = line
    return curve


def processes(world_size: int) -> str:
    return "1 process" if world_size == 1 else f"{world_size} processes"


def _cause(log: Path) -> str:
    """The lines that say why, each once; the last ones where none does."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    telling = [line for line in lines if CAUSE.search(line)][:NUM_CAUSES] or lines[-TAIL_LINES:]
    return "\n".join(f"  {line}" for line in dict.fromkeys(telling))
