"""A checkpoint's folder in, what its manifest and state tell about it out, without reading the tensors."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint_files import list_checkpoints, step_of

SHARE = re.compile(r"train_state-\d+-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class CheckpointFacts:
    """What is not known of it is None."""

    name: str
    step: int
    time: float  # of its manifest, the last file that is written; unix seconds
    num_bytes: int
    num_files: int
    world_size: int | None  # that wrote it
    num_tokens: int | None  # trained on so far


def facts_of(folder: Path, *, with_state: bool = True) -> CheckpointFacts:
    """OSError or ValueError where the manifest or the state cannot be read."""
    manifest = folder / "MANIFEST.json"
    try:
        files: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        state = json.loads((folder / "state.json").read_text("utf-8")) if with_state else {}
        shares = [found for name in files if (found := SHARE.fullmatch(name))]
        return CheckpointFacts(
            name=folder.name,
            step=step_of(folder),
            time=manifest.stat().st_mtime,
            num_bytes=sum(file["bytes"] for file in files.values()),
            num_files=len(files),
            world_size=int(shares[0][1]) if shares else None,
            num_tokens=state.get("num_tokens"),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder} has a manifest or a state that cannot be read") from error


def known_checkpoints(run: Path) -> tuple[list[CheckpointFacts], list[str]]:
    """Oldest first, and why others cannot be read. One that is deleted meanwhile is left out."""
    found, problems = [], []
    for folder in list_checkpoints(run):
        try:
            found.append(facts_of(folder, with_state=False))
        except (OSError, ValueError) as error:
            if folder.is_dir():
                problems.append(str(error))
    return found, problems
