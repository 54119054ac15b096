"""Checkpoint folders in, what can be trusted of them out. Needs no engine: files only."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import read_small_json
from trainer.files import link_problem, remove_folder, sha256_of

SLURM_FOLDER = "slurm"  # beside the checkpoints: what `cloze submit` froze, and logs
FORMAT = "cloze-checkpoint-v2"
READABLE = ("cloze-checkpoint-v1", FORMAT)  # version 1 held whole tensors only
NAME = re.compile(r"step-\d{8,15}")
FILE_NAME = re.compile(r"(hf/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
STATE = {  # of state.json
    "step": int, "num_tokens": int, "rows_digest": int, "optimizer_step": int, "stream": dict, "config": dict,
}  # fmt: skip


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoint folders, oldest first. Order is by step, never by time."""
    folder = checkpoints_folder(run_dir)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if NAME.fullmatch(path.name)), key=step_of)


def problems_of(folder: Path) -> list[str]:
    """Why a checkpoint cannot be trusted; empty when every file is there, whole and unaltered."""
    if problem := link_problem(folder):
        return [problem]
    try:
        manifest = read_small_json(folder / "MANIFEST.json")
        if manifest["format"] not in READABLE:
            return [f"{folder} has format {manifest['format']!r}, this version reads {READABLE}"]
        files = [
            (name, facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / 'MANIFEST.json'} cannot be read: {error}"]
    named = {name for name, *_ in files}
    return [
        f"{path} is not in the manifest"
        for path in sorted(folder.glob("train_state-*"))
        if path.name not in named
    ] + [
        problem
        for name, expected_bytes, expected_sha256 in files
        if (problem := _file_problem(folder, name, expected_bytes, expected_sha256))
    ]


def _file_problem(
    folder: Path, name: str, expected_bytes: object, expected_sha256: object
) -> str | None:
    """What is wrong with one file of a manifest, which may name none but plain files below its folder."""
    path = folder / name
    if not FILE_NAME.fullmatch(name):
        return f"{folder / 'MANIFEST.json'} names {name[:200]!r}, which is no file of a checkpoint"
    if path.is_symlink() or (path.parent.is_symlink() and path.parent != folder):
        return f"{path} is a symbolic link, which no checkpoint has"
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != expected_bytes:
        return f"{path} has {path.stat().st_size} bytes, the manifest says {expected_bytes}"
    if (found := sha256_of(path)) != expected_sha256:
        return f"{path} has sha256 {found}, the manifest says {expected_sha256}"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint. ValueError where it is not what is written there."""
    path = folder / "state.json"
    document = read_small_json(path)
    found = document.get("format") if isinstance(document, dict) else None
    if found not in READABLE:
        raise ValueError(f"{folder} has format {found!r}, this version reads {READABLE}")
    wrong = [name for name, kind in STATE.items() if not isinstance(document.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} is missing or of another kind")
    check_settings(document["config"], f"{path}: config")
    return document


def check_settings(values: Any, place: str) -> None:
    """ValueError unless these are settings of a run, of this version or another, that can be compared."""
    parts = values if isinstance(values, dict) else {}
    phases = parts.get("phases")
    if not isinstance(parts.get("optim"), dict) or not (
        isinstance(phases, list) and all(isinstance(phase, dict) for phase in phases)
    ):
        raise ValueError(f"{place} holds no settings of a run")


def prune(run_dir: Path, keep: int, is_kept: Callable[[int], bool]) -> None:
    """Delete all but the newest `keep` checkpoints and those of steps that are kept. Rank 0 only."""
    for old in list_checkpoints(run_dir)[:-keep]:
        if not is_kept(step_of(old)):
            remove_folder(old)
