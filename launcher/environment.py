"""This Python and the program's own files in, what to keep with a run out; and what has changed since."""

import platform
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("launcher", "trainer", "model", "data", "ds_configs", "slurm")


def environment_lines() -> list[str]:
    """`python==3.11.7`, then `name==version` of every installed distribution, sorted."""
    found = {f"{d.name.lower()}=={d.version}" for d in distributions() if d.name}
    return [f"python=={platform.python_version()}", *sorted(found)]


def environment_differences(file: Path) -> list[str]:
    """What `file` (of `environment_lines`) says and this Python does not, one sentence each."""
    then = _versions(file.read_text(encoding="utf-8").split("\n"))
    now = _versions(environment_lines())
    return [
        f"{name} was {then.get(name, 'not installed')} and is {now.get(name, 'not installed')} ({sys.prefix})"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def _versions(lines: list[str]) -> dict[str, str]:
    return dict(line.strip().split("==", 1) for line in lines if "==" in line)
