"""Host copies of tensors in, a published checkpoint folder out. Needs no engine and no collective.

Every rank writes its own part, then a note of its files' sizes and hashes. Rank 0 waits for the notes,
adds hf/ and the manifest, and publishes by one rename.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors.torch import save_file

from data.files import sync_folder
from trainer.checkpoint_files import FORMAT
from trainer.files import remove_folder, sha256_of, sync_file, write_atomically

# Writes the model as a Hugging Face folder, from fp32 weights by our names, and raises where it is not what it
# should be.
WriteHf = Callable[[Mapping[str, torch.Tensor], Path], None]
LOOK_SECONDS = 0.02
NOTE_SECONDS = 600.0  # rank 0 waits so long for the other ranks' notes


def write_part(folder: Path, rank: int, size: int, tensors: dict[str, torch.Tensor]) -> None:
    """This rank's tensors, synced, and its note."""
    path = folder / f"train_state-{rank:05d}-of-{size:05d}.safetensors"
    save_file(tensors, path)
    _write_note(folder, rank, facts_of(folder, [path]))


def facts_of(folder: Path, paths: list[Path]) -> dict[str, dict[str, Any]]:
    """{relative path: {bytes, sha256}} of files that are on disk for certain when this returns."""
    for path in paths:
        sync_file(path)
    return {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)}
        for p in paths
    }


def note_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _write_note(folder: Path, rank: int, files: dict[str, dict[str, Any]]) -> None:
    write_atomically(folder / note_name(rank), json.dumps(files))


def collect_notes(folder: Path, size: int, given_up: Event) -> dict[str, dict[str, Any]]:
    """The files of all ranks. OSError when one's note does not come, or the save was given up."""
    files: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + NOTE_SECONDS
    for rank in range(size):
        path = folder / note_name(rank)
        while not path.exists():
            if given_up.is_set():
                raise OSError("another rank could not write its part")
            if time.monotonic() > deadline:
                raise OSError(f"rank {rank} has not written its part after {NOTE_SECONDS:.0f} s")
            time.sleep(LOOK_SECONDS)
        files |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    return files


def publish(temporary: Path, final: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest, and give the folder its name: from here on the checkpoint exists.

    OSError where files of it are gone: another job has cleared away what this one was writing.
    """
    gone = [str(path) for path in (temporary, *map(temporary.joinpath, files)) if not path.exists()]
    if gone:
        raise FileNotFoundError(2, "No such file or directory", gone[0])
    manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
    write_atomically(temporary / "MANIFEST.json", json.dumps(manifest, indent=1))
    for folder in (temporary / "hf", temporary):
        if folder.is_dir():
            sync_folder(folder)
    if final.exists():  # left by a job that was stopped between saving and going on
        remove_folder(final)
    os.rename(temporary, final)
    sync_folder(final.parent)
