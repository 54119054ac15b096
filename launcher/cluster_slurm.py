"""What Slurm tells of a job in, whether the job is warned early enough before its time limit out."""

import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from data.diagnosis import Finding, finding

ASK_SECONDS = 30
DEFAULT_LEAD_SECONDS = 60  # of --signal without a time


class SlurmJob(NamedTuple):
    """signal: as --signal has it, None where there is none, or Slurm does not tell."""

    signal: str | None
    limit_seconds: int | None  # None: unlimited


def read_job(environment: Mapping[str, str]) -> SlurmJob | None:
    """The job that we are in, from scontrol; None outside of Slurm. OSError where scontrol does not answer."""
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    shown = _scontrol("show", "job", job)
    script = _scontrol("write", "batch_script", job, "-", may_fail=True)  # salloc has none
    return parse_job(shown, script, environment)


def parse_job(shown: str, script: str, environment: Mapping[str, str]) -> SlurmJob:
    """From `scontrol show job`, the batch script, and variables. As for sbatch itself, its command line counts
    most (newer versions of Slurm show it), then SBATCH_SIGNAL, then the script's #SBATCH lines."""
    line = re.search(r"SubmitLine=(.*)", shown)
    signals = [
        _option(line[1] if line else ""),
        environment.get("SBATCH_SIGNAL"),
        *(_option(found) for found in re.findall(r"^#SBATCH\s+(.*)", script, re.MULTILINE)),
    ]
    limit = re.search(r"TimeLimit=(?:(\d+)-)?(\d+):(\d+):(\d+)", shown)
    seconds = None
    if limit:
        days, hours, minutes, rest = (int(number or 0) for number in limit.groups())
        seconds = ((24 * days + hours) * 60 + minutes) * 60 + rest
    return SlurmJob(next((s for s in signals if s), None), seconds)


def judge_job(job: SlurmJob, needed_seconds: int) -> list[Finding]:
    """needed_seconds: for a step and a checkpoint of the run."""
    needed = f"a step and a checkpoint of this run, and to spare, may take {needed_seconds} s"
    if job.signal is None:
        found = f"{needed}; cloze submit has the job told so early"
        return [Finding("time limit", "this job", found)]
    lead = lead_seconds(job.signal)
    limit = "no time limit" if job.limit_seconds is None else f"limit {job.limit_seconds:,} s"
    found = f"--signal={job.signal}, {limit}; {needed}"
    advice = (
        f"The job would be killed before it has saved. Give --signal=B:USR1@{needed_seconds} or more, or let "
        "`cloze submit` choose."
    )
    verdict = "PROBLEM" if lead < needed_seconds else "OK"
    early = [finding("time limit", "this job", found, verdict, advice)]
    if job.limit_seconds is not None and job.limit_seconds < 2 * lead:
        found = f"{job.limit_seconds:,} s, and told to save {lead} s before: no time to train"
        early.append(Finding("time limit", "this job", found, "WARNING", "Give a longer --time."))
    return early


def lead_seconds(signal: str) -> int:
    """B:USR1@300 -> 300."""
    seconds = signal.partition("@")[2]
    return int(seconds) if seconds.isdigit() else DEFAULT_LEAD_SECONDS


def _option(words: str) -> str | None:
    """The value of --signal in a command line."""
    for word, following in itertools.pairwise([*_split(words), ""]):
        if word.startswith("--signal="):
            return word.removeprefix("--signal=")
        if word == "--signal":
            return following
    return None


def _split(words: str) -> list[str]:
    try:
        return shlex.split(words, comments=True)
    except ValueError:  # a quote without its other half
        return words.split()


def _scontrol(*words: str, may_fail: bool = False) -> str:
    try:
        result = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=ASK_SECONDS, check=False,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise OSError(f"scontrol does not answer within {ASK_SECONDS} s") from None
    if result.returncode != 0 and not may_fail:
        raise OSError(f"scontrol {' '.join(words)}: {result.stderr.strip()[:200]}")
    return result.stdout if result.returncode == 0 else ""
