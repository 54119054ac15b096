"""What a Slurm job does around its processes: a folder for their last words before, a decision after.

slurm/train.sbatch calls it on the job's first node:

    folder=$(python -m launcher.slurm_job begin PRESET [key=value ...])
    CLOZE_STATUS_FILE=$folder/rank srun ... torchrun ... -m launcher.train PRESET [key=value ...]
    python -m launcher.slurm_job end "$folder" PROCESSES STATUS_OF_SRUN

`end` says in one line what happened, and ends with what is to be done: 0 the run is complete or was stopped by
its STOP file, AGAIN start the processes again in this allocation, 75 stopped and saved (requeue the
job), anything else: end the job with that status. srun and torchrun would say 1 for nearly all of these.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from launcher.environment import environment_differences
from launcher.jobs import json_lines, read_jobs
from launcher.supervise import status_of
from trainer.checkpoint_files import SLURM_FOLDER, list_checkpoints, step_of
from trainer.config import load_config
from trainer.exit_status import BUG, CONFIG, DONE, NOT_TO_REPEAT, PREEMPTED
from trainer.stopping import STOP_FILE

AGAIN = 3
STARTS_FILE = "starts.jsonl"
STARTS_IN_VAIN = 4  # in a row, over all jobs of the run: no new checkpoint, and not asked to stop
ENVIRONMENT_FILE = "CLOZE_ENVIRONMENT"  # variable: the versions that the run was submitted with


def main(arguments: list[str]) -> int:
    match arguments:
        case ["begin", preset, *overrides]:
            return begin(Path(preset), [word for word in overrides if not word.startswith("--")])
        case ["end", folder, processes, status]:
            return end(Path(folder), int(processes), int(status))
    print(__doc__, file=sys.stderr)
    return CONFIG


def begin(preset: Path, overrides: list[str]) -> int:
    """Print the path of a new, empty folder in the run's own."""
    try:
        run = Path(load_config(preset, overrides).dir)
    except ValueError as error:
        _say(str(error))
        return CONFIG
    if file := os.environ.get(ENVIRONMENT_FILE):
        for difference in environment_differences(Path(file)):
            _say(f"warning: not as when it was submitted: {difference}")
    job = os.environ.get("SLURM_JOB_ID", "none")
    number = len(_starts(run)) + 1
    folder = run / SLURM_FOLDER / f"job-{job}-start-{number}"
    shutil.rmtree(folder, ignore_errors=True)  # of the same job, killed and requeued
    folder.mkdir(parents=True)
    print(folder.resolve())
    return DONE


def end(folder: Path, processes: int, returncode: int) -> int:
    """What is to be done, now that all processes have ended; returncode: of srun."""
    run = folder.parent.parent
    words = [_read(folder / f"rank-{rank}") for rank in range(processes)]
    shutil.rmtree(folder)
    status = status_of(words, returncode, asked_to_stop=False)
    if status == 1:  # torchrun's, where no rank had a word to say
        status = BUG
    newest = max(map(step_of, list_checkpoints(run)), default=-1)
    line = {"slurm_job_id": os.environ.get("SLURM_JOB_ID"), "status": status, "newest_step": newest}
    with (run / SLURM_FOLDER / STARTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if status == DONE:
        _say("the run is complete")
        return DONE
    if status == PREEMPTED:
        if _stop_file_was_found(run):
            _say(f"stopped by {run / STOP_FILE}: submitted again, it goes on from step {newest}")
            return DONE
        _say(f"stopped and saved; the same command goes on from step {newest}")
        return PREEMPTED
    if status in NOT_TO_REPEAT:
        _say(f"ended with status {status}, which another start would not mend")
        return status
    in_vain = _starts_in_vain(run, newest)
    killed = [str(rank) for rank, word in enumerate(words) if not word.isdigit()]
    left = f" (ranks that left without a word: {', '.join(killed)})" if killed else ""
    if in_vain >= STARTS_IN_VAIN:
        _say(f"no new checkpoint in {in_vain} starts: giving up (status {status}){left}")
        return status
    _say(f"ended with status {status}{left}; starting again from step {max(0, newest)}")
    return AGAIN


def _starts_in_vain(run: Path, newest: int) -> int:
    """Starts at the end of the list that could be tried again, and brought no newer checkpoint."""
    starts = _starts(run)
    reached = [start["newest_step"] for start in starts]
    number = 0
    for index in range(len(starts) - 1, -1, -1):
        before = reached[index - 1] if index else -1
        if starts[index]["status"] in NOT_TO_REPEAT or before < reached[index]:
            break
        number += 1
    return number


def _starts(run: Path) -> list[dict]:
    return list(json_lines(_read(run / SLURM_FOLDER / STARTS_FILE)))


def _stop_file_was_found(run: Path) -> bool:
    jobs = read_jobs(run)
    events = jobs[-1].events if jobs else []
    return any(
        e.what == "stop_requested" and f"/{STOP_FILE} was found" in e.message for e in events
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _say(message: str) -> None:
    print(f"cloze: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
