"""Names and bytes in, the same bytes out later: a folder of blocks on disk, of bounded size.

Processes share a cache without knowing of each other. A file has its final name when it is complete;
nothing is trusted for being there: whoever reads a block compares its hash and drops what differs.
The least recently used files go first; one that is being read may go too, its reader keeps its bytes.
"""

import fcntl
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

import xxhash

from data.files import TEMPORARY_MARK

ROOM_AFTER_EVICTION = 0.9  # of the limit: what one eviction leaves
WRITES_PER_SCAN = 128  # a process looks at the whole cache after writing 1/128 of the limit
STALE_SECONDS = 3600.0  # a temporary file older than this was left by a killed process


def block_name(shown_url: str, offset: int, nbytes: int, digest: int) -> str:
    """The name of a block's file: which bytes of which URL, and their xxh3_64 digest.

    shown_url: the whole address of the shard but for secrets, so two sources with equal file names
    never meet, and a newly signed URL finds what an older one has fetched.
    """
    place = xxhash.xxh3_128_hexdigest(f"{shown_url}\0{offset}\0{nbytes}".encode())
    return f"{place}-{digest:016x}"


@final
class BlockCache:
    """Blocks under `folder`, of about `limit_bytes` in all; 0 keeps nothing. Any thread may call.

    With n processes writing, the files may exceed the limit by n/128 of it before they are thinned.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._unscanned_bytes = limit_bytes  # the first write looks at what is there
        self._writes = True  # until the disk refuses

    def get(self, name: str) -> bytes | None:
        """The bytes kept under `name`, to be checked by the caller; None when there are none."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"{path} cannot be read ({error.strerror}); blocks are fetched again")
            return None
        with suppress(OSError):  # a cache that others write may be read-only
            os.utime(path)  # used now
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep a block. A disk that refuses is told of once, and the run goes on without it."""
        if self.limit_bytes < len(data) or not self._writes:
            return
        path = self._path(name)
        mark = f"{TEMPORARY_MARK}{os.getpid()}-{threading.get_ident()}"
        temporary = path.with_name(path.name + mark)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            self._unscanned_bytes += len(data)
            if self._unscanned_bytes * WRITES_PER_SCAN >= self.limit_bytes:
                self._unscanned_bytes = 0
                self.evict()
        except OSError as error:
            self._writes = False
            self._warn(f"{self.folder} cannot be written ({error.strerror}): no more is kept there")

    def drop(self, name: str) -> None:
        """Remove a block whose bytes were found to be damaged."""
        with suppress(OSError):
            self._path(name).unlink()

    def evict(self) -> None:
        """Delete the least recently used blocks until the limit holds. One process at a time does it."""
        with locked(self.folder / "evict.lock", wait=False) as mine:
            if not mine:
                return
            files = self._files()
            total = sum(nbytes for _, nbytes, _ in files)
            if total <= self.limit_bytes:
                return
            for _, nbytes, path in sorted(files):
                Path(path).unlink(missing_ok=True)
                total -= nbytes
                if total <= self.limit_bytes * ROOM_AFTER_EVICTION:
                    return

    def _files(self) -> list[tuple[float, int, str]]:
        """(last use, bytes, path) of every block; what killed processes left is deleted on the way."""
        files = []
        for folder in os.scandir(self.folder):
            if not folder.is_dir():
                continue
            for entry in os.scandir(folder):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                if TEMPORARY_MARK not in entry.name:
                    files.append((status.st_mtime, status.st_size, entry.path))
                elif time.time() - status.st_mtime > STALE_SECONDS:
                    Path(entry.path).unlink(missing_ok=True)
        return files

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _warn(self, told: str) -> None:
        warnings.warn(f"block cache: {told}", RuntimeWarning, stacklevel=3)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock that ends with its process. Yields whether it is held; without `wait`, at once.

    On a file system without locks it yields True: the lock saves work, correctness needs none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        except OSError:
            held = True
        yield held
    finally:
        os.close(descriptor)
