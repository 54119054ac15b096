"""Bytes in, bytes durably on disk out: fsync, hashes, and folders that appear whole or not at all."""

import hashlib
import os
import shutil
from pathlib import Path

from data.files import publishing


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Force a written file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one rename: readers see the old content or the new, no part."""
    with publishing(path) as file:
        file.write(text.encode("utf-8"))


def remove_folder(folder: Path) -> None:
    """Delete a folder so that nobody ever sees half of it under its own name."""
    trash = folder.with_name(f".trash-{folder.name}")
    if trash.exists():
        shutil.rmtree(trash)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def link_problem(path: Path) -> str | None:
    """What to say of a symbolic link that neither we nor the owner of its folder has made.

    It may lead anywhere. As the kernel's protected_symlinks has it, in any folder. None: there is no such link.
    """
    if not path.is_symlink():
        return None
    owner = path.lstat().st_uid
    if owner in (os.geteuid(), path.parent.stat().st_uid):
        return None
    return f"{path} is a symbolic link that user {owner} has made: it is not followed. Delete it"


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def no_space(folder: Path, needed_bytes: int, what: str) -> str:
    """What to say when `needed_bytes` do not fit."""
    return (
        f"No space left for {what} in {folder}: it needs about {needed_bytes / 1e6:,.1f} MB, "
        f"{free_bytes(folder) / 1e6:,.1f} MB are free. Free some space and run the same command again."
    )


def size_of(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
