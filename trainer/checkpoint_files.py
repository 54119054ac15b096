"""Checkpoint folders in, what can be trusted of them out. Needs no engine: files only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.files import remove_folder, sha256_of

FORMAT = "cloze-checkpoint-v2"
READABLE = ("cloze-checkpoint-v1", FORMAT)  # version 1 held whole tensors only


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoint folders, oldest first. Order is by step, never by time."""
    folder = checkpoints_folder(run_dir)
    return sorted(folder.glob("step-[0-9]*")) if folder.is_dir() else []


def problems_of(folder: Path) -> list[str]:
    """Why a checkpoint cannot be trusted; empty when every file is there, whole and unaltered."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
        if manifest["format"] not in READABLE:
            return [f"{folder} has format {manifest['format']!r}, this version reads {READABLE}"]
        files = [
            (name, facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / 'MANIFEST.json'} cannot be read: {error}"]
    problems = []
    for name, expected_bytes, expected_sha256 in files:
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected_bytes:
            problems.append(
                f"{path} has {path.stat().st_size} bytes, the manifest says {expected_bytes}"
            )
        elif (found := sha256_of(path)) != expected_sha256:
            problems.append(f"{path} has sha256 {found}, the manifest says {expected_sha256}")
    return problems


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if document.get("format") not in READABLE:
        raise ValueError(
            f"{folder} has format {document.get('format')!r}, this version reads {READABLE}"
        )
    return document


def prune(run_dir: Path, keep: int, is_kept: Callable[[int], bool]) -> None:
    """Delete all but the newest `keep` checkpoints and those of steps that are kept. Rank 0 only."""
    for old in list_checkpoints(run_dir)[:-keep]:
        if not is_kept(step_of(old)):
            remove_folder(old)
