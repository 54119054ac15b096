"""A run's folder: who owns it, and whether it belongs to this configuration.

runs/tiny/
    config.yaml deepspeed.json       resolved; each reproduces the run
    checkpoints/ tensorboard/ metrics.jsonl
    jobs.jsonl                       what happened, job by job
    damaged_blocks.jsonl             which readings of a block were passed over, and why
    plan.json                        what `cloze plan` foretold; the run compares
    probes.jsonl                     what `cloze probe` found, beside the run
    rewinds.jsonl                    where a rewind has moved the stream
    slurm/                           what `cloze submit` froze, logs of its jobs, how each start ended
    lock owner.json                  the job that is training now
    STOP                             put there by you: the run saves and stops
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.files import TEMPORARY_MARK
from data.settings import read_settings
from trainer.checkpoint_files import SLURM_FOLDER, check_settings
from trainer.config import RunConfig, differences, to_dict, to_yaml
from trainer.files import link_problem, write_atomically
from trainer.jumps import REWINDS_FILE
from trainer.ledger import LEDGER_FILE
from trainer.stopping import STOP_FILE
from trainer.watchdog import STALLS

DAMAGE_FILE = "damaged_blocks.jsonl"
PLAN_FILE = "plan.json"


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """Hold the run's lock; ValueError naming the owner when another job has it, or links
    that others have planted. Rank 0 only.

    The lock is the kernel's: it is gone with its process, however that ended.
    """
    check_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{folder / 'lock'} is a symbolic link: delete it") from None
        raise
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read(folder / "owner.json")
            raise ValueError(
                f"{folder} is being trained by another job: {owner}. Wait for it, stop it, or give another dir="
            ) from None
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }
        write_atomically(folder / "owner.json", json.dumps(me))
        yield
    finally:
        os.close(descriptor)


def check_links(folder: Path) -> None:
    """ValueError where the run's folder, or what is in it, is a link that another user has planted."""
    entries = list(folder.iterdir()) if folder.is_dir() else []
    if problems := [problem for path in (folder, *entries) if (problem := link_problem(path))]:
        raise ValueError("; ".join(problems))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return "owner unknown"


def claim(folder: Path, config: RunConfig, resolved_deepspeed: dict[str, Any]) -> None:
    """Write the configuration into a new run folder, or check that an old one is of the same run.

    ValueError when the folder holds something else, or a run whose settings differ: each is listed.
    """
    known = {
        "config.yaml",
        "deepspeed.json",
        "checkpoints",
        "tensorboard",
        "metrics.jsonl",
        DAMAGE_FILE,
        REWINDS_FILE,
        LEDGER_FILE,
        STOP_FILE,
        STALLS,
        SLURM_FOLDER,
        PLAN_FILE,
        "lock",
        "owner.json",
    }
    written = folder / "config.yaml"
    if written.exists():
        before = read_settings(written, "settings")
        check_settings(before, str(written))
        changed = differences(before, to_dict(config))
        if changed:
            raise ValueError(
                f"{folder} belongs to a run with other settings: "
                + "; ".join(changed)
                + ". Give the same settings "
                "to continue it, or another dir= to start a new run."
            )
    else:
        foreign = sorted(
            path.name
            for path in folder.iterdir()
            if path.name not in known and TEMPORARY_MARK not in path.name
        )
        if foreign:
            raise ValueError(
                f"{folder} holds {foreign[:5]} and is no run of ours: give an empty or new folder as dir="
            )
    write_atomically(written, to_yaml(config))
    write_atomically(folder / "deepspeed.json", json.dumps(resolved_deepspeed, indent=2) + "\n")
