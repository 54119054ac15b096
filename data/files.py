"""Paths and bytes in, durable files and their digests out: write under a temporary name, then rename.

A file that exists under its final name is complete. Whatever a killed process leaves behind has a name
with TEMPORARY_MARK in it, and the next run removes it.
"""

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk that is full
TEMPORARY_MARK = ".tmp-"
READ_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 25  # of one file; a manifest has about 150 for each shard


@contextmanager
def publishing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that gets its name `path` only when the block ends well. Parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)  # of a process that had our id, or a link planted there
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:  # a failed write does not say where; the user must be told
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}")


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_array(path: Path, array: np.ndarray) -> None:
    """Publish `array` as .npy. (np.save itself, on a file, does not tell why it could not write.)"""
    buffer = io.BytesIO()
    np.save(buffer, array)
    with publishing(path) as file:
        file.write(buffer.getbuffer())


def write_json(path: Path, value: Any) -> None:
    """Publish `value` as JSON: insertion order, UTF-8, one space of indent."""
    with publishing(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8") + b"\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def read_small_json(path: Path) -> Any:
    """A file that others may have written. ValueError, naming it, when it is too large or no JSON."""
    return parse_json(str(path), read_small(path))


def read_small(path: Path) -> bytes:
    """The bytes of a file of at most MAX_JSON_BYTES. ValueError when it has more."""
    if (nbytes := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {nbytes:,} bytes, over {MAX_JSON_BYTES:,}: it is none of ours"
        )
    return path.read_bytes()


def parse_json(place: str, raw: bytes) -> Any:
    """The value of a JSON text. ValueError, naming `place`, for anything else."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError(f"{place} is none of ours: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes have left anywhere under `folder`."""
    for path in sorted(folder.rglob(f"*{TEMPORARY_MARK}*"), reverse=True):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's bytes, 32 hex digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def names_digest(folder: Path, names: list[str]) -> str:
    """xxh3_128 over the names and bytes of files in `folder`, in the order of their names."""
    digest = xxhash.xxh3_128()
    for name in sorted(names):
        data = (folder / name).read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """xxh3_128 over the names and bytes of all files directly in `folder`."""
    return names_digest(folder, [path.name for path in folder.iterdir() if path.is_file()])
