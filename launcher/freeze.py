"""A run as it is now in, a folder out that a job can start it from days later, whatever has been edited since.

RUN/slurm/submit-N/
    config.yaml           resolved, with absolute paths; config-K.yaml for each task K of a job array
    deepspeed.json        that it names
    code/                 launcher, trainer, model, data, ds_configs, slurm
    environment.txt       the Python and the version of every package
    submit.json           command, time, commit of the code, whether it had been edited
    train.sbatch
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from data.transfer import is_url
from launcher.environment import CODE, ROOT, environment_lines
from trainer.checkpoint_files import SLURM_FOLDER
from trainer.config import RunConfig, to_yaml
from trainer.files import write_atomically


def next_folder(run: Path) -> Path:
    """Of the submission that is about to be made; it does not exist."""
    taken = [
        int(path.name.removeprefix("submit-"))
        for path in (run / SLURM_FOLDER).glob("submit-*")
        if path.name.removeprefix("submit-").isdigit()
    ]
    return (run / SLURM_FOLDER / f"submit-{max(taken, default=0) + 1}").resolve()


def freeze(folder: Path, configs: dict[str, RunConfig]) -> None:
    """Write all but the batch script. configs: name of a file in `folder` -> what is to be in it."""
    folder.mkdir(parents=True)
    for part in CODE:
        shutil.copytree(
            ROOT / part, folder / "code" / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name, config in configs.items():
        deepspeed = folder / name.replace("config", "deepspeed").replace(".yaml", ".json")
        shutil.copyfile(config.deepspeed, deepspeed)
        write_atomically(folder / name, to_yaml(frozen(config, deepspeed)))
    write_atomically(folder / "environment.txt", "\n".join(environment_lines()) + "\n")
    facts = {
        "command": shlex.join(sys.argv), "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": _git("rev-parse", "HEAD"), "edited": _git("status", "--porcelain"),
    }  # fmt: skip
    write_atomically(folder / "submit.json", json.dumps(facts, indent=2) + "\n")


def frozen(config: RunConfig, deepspeed: Path) -> RunConfig:
    """The same run, from any working directory."""
    data = (
        config.data
        if is_url(config.data.path)
        else replace(config.data, path=_absolute(config.data.path))
    )
    return replace(
        config,
        dir=_absolute(config.dir),
        data=data,
        deepspeed=str(deepspeed),
        init_from=config.init_from and _absolute(config.init_from),
    )


def _absolute(path: str) -> str:
    return str(Path(path).resolve())


def _git(*words: str) -> str | None:
    """None where this is no checkout."""
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
