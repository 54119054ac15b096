"""Where a block lies in, its checked bytes out: from a folder, or over the network, with patience.

A block whose bytes are not those that were written raises DamagedBlock; one that could not be had
raises UnreachableBlock. Both name the place, the reason and what to do, and hold no secrets.
"""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, final

import xxhash

from data.files import file_digest

RESTORE = "Restore the shard from a copy, or prepare the dataset again"
CACHE_VARIABLE = "CLOZE_CACHE"  # names the cache's folder where no option does


@dataclass(frozen=True)
class StorageOptions:
    """How datasets are read from object stores and web servers; local folders need none of it."""

    cache_dir: str | None = None  # None: $CLOZE_CACHE, else ~/.cache/cloze
    cache_bytes: int = 16 << 30  # of blocks kept in cache_dir, by all processes; 0: none
    num_retries: int = (
        8  # after the first try, of what may pass: resets, timeouts, HTTP 5xx and 429
    )
    num_refetches: int = 2  # after the first try, of bytes that are not those that were written
    timeout_seconds: float = 60.0  # of one request, from connecting to its last byte
    first_backoff_seconds: float = 0.5  # before the first retry; doubled before each of the next
    max_backoff_seconds: float = 60.0  # the longest wait, and the longest Retry-After obeyed

    def __post_init__(self) -> None:
        counts = ("cache_bytes", "num_retries", "num_refetches")
        seconds = ("timeout_seconds", "first_backoff_seconds", "max_backoff_seconds")
        problems = [
            f"storage.{name} is {value!r}: give an integer of at least 0"
            for name in counts
            if not isinstance(value := getattr(self, name), int) or value < 0
        ]
        problems += [
            f"storage.{name} is {value!r}: give a number of seconds above 0"
            for name in seconds
            if not 0 < (value := getattr(self, name)) < float("inf")
        ]
        if self.first_backoff_seconds > self.max_backoff_seconds:
            problems.append(
                f"storage.first_backoff_seconds {self.first_backoff_seconds} is over "
                f"storage.max_backoff_seconds {self.max_backoff_seconds}"
            )
        if self.cache_dir == "":
            problems.append("storage.cache_dir is empty: name a folder, or leave it out")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def cache_root(self) -> Path:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        named = self.cache_dir or os.environ.get(CACHE_VARIABLE) or Path(home) / "cloze"
        return Path(named).expanduser().absolute()


class BlockAddress(NamedTuple):
    """Where the block table says that a block lies."""

    block: int  # row of the block table
    shard: str  # path within the dataset
    offset: int  # bytes
    nbytes: int
    xxh3: int  # xxh3_64 of the bytes


class DamagedBlock(ValueError):
    """A block's bytes are there, but are not those that were written."""

    def __init__(
        self,
        message: str,
        address: BlockAddress | None = None,
        *,
        shard: str = "",
        reason: str = "",
        attempts: int = 1,
    ) -> None:
        super().__init__(message)
        self.index = address.block if address else None
        self.shard = shard  # path or URL, without secrets
        self.offset = address.offset if address else None  # bytes
        self.reason, self.attempts = reason, attempts


class Unreachable(OSError):
    """A file or block could not be had from where it lies. `reason`: of the last try."""

    def __init__(self, message: str, *, reason: str = "", attempts: int = 1) -> None:
        super().__init__(message)
        self.reason, self.attempts = reason, attempts


class Absent(Unreachable, FileNotFoundError):
    """The server says that the file is not there, or that it may not be read."""


class UnreachableBlock(Unreachable):
    """The same of a block: nothing is known of its bytes."""

    def __init__(
        self, message: str, *, index: int | None = None, reason: str = "", attempts: int = 1
    ) -> None:
        super().__init__(message, reason=reason, attempts=attempts)
        self.index = index


@dataclass
class TransferCounts:
    """What one process has read over the network. Bytes are those of answers that were right."""

    num_requests: int = 0
    num_bytes: int = 0
    num_faults: int = 0  # requests that failed
    num_damaged: int = 0  # answers that were not what was written
    num_cached: int = 0  # blocks that came from the cache
    num_cache_damaged: int = 0  # blocks of the cache that were thrown away


class Shards(Protocol):
    """Reads blocks of one dataset. Any thread may call; may be pickled."""

    counts: TransferCounts  # all 0 for a local folder

    def read(self, address: BlockAddress) -> bytes:
        """The block's bytes, whose hash is right. DamagedBlock or UnreachableBlock."""
        ...

    def place(self, path: str) -> str:
        """Where a file of the dataset lies, for messages."""
        ...

    def digest(self, path: str, nbytes: int) -> str:
        """xxh3_128 of a shard that should have `nbytes` bytes, hex."""
        ...


def hash_problem(data: bytes, expected: int) -> str | None:
    """What is told of bytes whose xxh3_64 is another than `expected`; None when it is that."""
    found = xxhash.xxh3_64_intdigest(data)
    if found == expected:
        return None
    return f"xxh3 is {found:016x}, blocks.npy says {expected:016x}"


def block_place(shards: Shards, address: BlockAddress) -> str:
    end = address.offset + address.nbytes
    return f"block {address.block} ({shards.place(address.shard)}, bytes {address.offset} to {end})"


@final
class LocalShards:
    """Shards in a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.counts = TransferCounts()

    def place(self, path: str) -> str:
        return str(self.root / path)

    def digest(self, path: str, nbytes: int) -> str:
        return file_digest(self.root / path)

    def read(self, address: BlockAddress) -> bytes:
        try:
            data = pread(self.root / address.shard, address.offset, address.nbytes)
        except OSError as error:
            where = block_place(self, address)
            if error.errno == errno.EIO:
                raise self._damaged(address, f"cannot be read: {error}", str(error)) from error
            raise UnreachableBlock(
                f"{where} cannot be read: {error}", index=address.block, reason=str(error)
            ) from error
        if len(data) < address.nbytes:
            reason = f"{len(data)} of {address.nbytes} bytes are there"
            raise self._damaged(address, f"is cut off: {reason}", reason)
        if problem := hash_problem(data, address.xxh3):
            raise self._damaged(address, f"is damaged: {problem}. {RESTORE}", problem)
        return data

    def _damaged(self, address: BlockAddress, told: str, reason: str) -> DamagedBlock:
        message = f"{block_place(self, address)} {told}"
        return DamagedBlock(message, address, shard=self.place(address.shard), reason=reason)


def pread(path: Path, offset: int, nbytes: int) -> bytes:
    """`nbytes` bytes of a file, or fewer at its end."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = b""
        while len(data) < nbytes:  # pread may give less than asked for
            part = os.pread(descriptor, nbytes - len(data), offset + len(data))
            if not part:
                break
            data += part
        return data
    finally:
        os.close(descriptor)
