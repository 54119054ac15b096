"""A URL in, checked blocks and the dataset's small files out: range requests, with patience and a cache.

What may pass (resets, timeouts, HTTP 5xx and 429) is tried again after growing waits, bytes whose hash
is wrong are fetched anew, and what no second try mends is an error at once.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import final

import xxhash

from data.cache import BlockCache, block_name
from data.hashing import stable_hash64
from data.storage import (
    RESTORE,
    Absent,
    BlockAddress,
    DamagedBlock,
    StorageOptions,
    TransferCounts,
    Unreachable,
    UnreachableBlock,
    block_place,
    hash_problem,
)
from data.transfer import (
    HTTP_SCHEMES,
    Location,
    Refused,
    TransferFault,
    Transport,
    WrongBytes,
    parse_location,
)

PATIENCE = (
    "Check the server and the network between; storage.num_retries, timeout_seconds and "
    "first_backoff_seconds set how long to try"
)


TOLD_WAIT_SECONDS = (
    1.0  # a wait that long is told of, so that a run that waits does not seem to hang
)
PIECE_BYTES = 8 << 20  # of a file that is read from end to end
ProblemOf = Callable[[bytes], str | None]  # what is wrong with bytes that came; None: nothing


def no_problem(_: bytes) -> str | None:
    return None


class Damage(ValueError):
    """Bytes of a file came, and again, and were not those that were written."""

    def __init__(self, reason: str, attempts: int) -> None:
        super().__init__(reason)
        self.reason, self.attempts = reason, attempts


@final
class RemoteShards:
    """Shards below a URL. Blocks are range requests; those that were read are kept in the cache."""

    def __init__(self, url: str, options: StorageOptions) -> None:
        self.location, self.options = parse_location(url), options
        self.transport = transport_for(self.location, options)
        self.cache = BlockCache(options.cache_root / "blocks", options.cache_bytes)
        self.counts = TransferCounts()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[str, StorageOptions]]:
        base, userinfo, query = self.location[1:]
        url = base.replace("://", f"://{userinfo}@", 1) if userinfo else base
        return RemoteShards, (url + (f"?{query}" if query else ""), self.options)

    def place(self, path: str) -> str:
        return self.location.shown(path)

    def read(self, address: BlockAddress) -> bytes:
        shown = f"{self.location.base}/{address.shard}"
        name = block_name(shown, address.offset, address.nbytes, address.xxh3)
        data = self.cache.get(name) if self.options.cache_bytes else None
        if data is not None:
            if hash_problem(data, address.xxh3) is None:
                self._count(num_cached=1)
                return data
            self._count(num_cache_damaged=1)
            self.cache.drop(name)
        data = self._fetch_block(address)
        self.cache.put(name, data)
        return data

    def _fetch_block(self, address: BlockAddress) -> bytes:
        where = block_place(self, address)
        try:
            return self.read_range(
                address.shard,
                address.offset,
                address.nbytes,
                lambda data: hash_problem(data, address.xxh3),
            )
        except Damage as damage:
            told = f"{where} is damaged: {damage.reason} (tries: {damage.attempts}). {RESTORE}"
            shard = self.place(address.shard)
            raise DamagedBlock(
                told, address, shard=shard, reason=damage.reason, attempts=damage.attempts
            ) from None
        except Unreachable as error:
            raise UnreachableBlock(
                f"block {address.block}: {error}",
                index=address.block,
                reason=error.reason,
                attempts=error.attempts,
            ) from None

    def read_range(
        self, path: str, offset: int, nbytes: int, problem_of: ProblemOf = no_problem
    ) -> bytes:
        """Bytes of a file. `problem_of` tells what is wrong with them, or None. Damage or Unreachable."""
        where = f"{self.place(path)}, bytes {offset} to {offset + nbytes},"
        return self._insist(
            where, lambda: self.transport.read_range(path, offset, nbytes), problem_of
        )

    def read_whole(self, path: str, max_bytes: int) -> bytes:
        """A small file. Absent, Unreachable, or Damage when it is longer than `max_bytes`."""
        return self._insist(
            self.place(path), lambda: self.transport.read_whole(path, max_bytes), no_problem
        )

    def digest(self, path: str, nbytes: int) -> str:
        """xxh3_128 of a file's first `nbytes` bytes, hex, fetched piece by piece."""
        digest = xxhash.xxh3_128()
        for start in range(0, nbytes, PIECE_BYTES):
            digest.update(self.read_range(path, start, min(PIECE_BYTES, nbytes - start)))
        return digest.hexdigest()

    def _insist(self, where: str, request: Callable[[], bytes], problem_of: ProblemOf) -> bytes:
        """Ask until the bytes are right, an answer is final, or the retries are used up."""
        num_faults = num_damaged = 0
        start = time.monotonic()
        while True:
            self._count(num_requests=1)
            attempts, asked_seconds = num_faults + num_damaged + 1, None
            try:
                data = request()
                if (problem := problem_of(data)) is None:
                    self._count(num_bytes=len(data))
                    return data
                raise WrongBytes(problem)
            except Refused as refused:
                told = f"{where} cannot be read: {refused.reason}. {refused.advice}"
                failure = Absent if refused.absent else Unreachable
                raise failure(told, reason=refused.reason, attempts=attempts) from None
            except WrongBytes as wrong:
                num_damaged, reason = num_damaged + 1, wrong.reason
                self._count(num_damaged=1)
                if wrong.final or num_damaged > self.options.num_refetches:
                    raise Damage(wrong.reason, attempts) from None
            except TransferFault as fault:
                num_faults += 1
                self._count(num_faults=1)
                reason, asked_seconds = fault.reason, fault.wait_seconds
                if num_faults > self.options.num_retries:
                    spent = f"(tries: {attempts}, in {time.monotonic() - start:.1f} s)"
                    told = f"{where} cannot be read: {fault.reason} {spent}. {PATIENCE}"
                    raise Unreachable(told, reason=fault.reason, attempts=attempts) from None
            wait_seconds = backoff_seconds(self.options, attempts, where, asked_seconds)
            if wait_seconds >= TOLD_WAIT_SECONDS:
                told = f"{where} {reason}; try {attempts + 1} follows in {wait_seconds:.0f} s"
                print(told, file=sys.stderr, flush=True)
            time.sleep(wait_seconds)

    def _count(self, **steps: int) -> None:
        with self._lock:
            for name, step in steps.items():
                setattr(self.counts, name, getattr(self.counts, name) + step)


def backoff_seconds(
    options: StorageOptions, attempts: int, where: str, asked_seconds: float | None
) -> float:
    """How long to wait after try number `attempts` (from 1), `asked_seconds` being the server's wish.

    Doubles from try to try; half of it differs between processes, so they do not come back together.
    """
    doubled = options.first_backoff_seconds * 2.0 ** min(attempts - 1, 60)
    share = stable_hash64(os.getpid(), where, attempts) / 2**64
    wait = doubled * (0.5 + 0.5 * share)
    return min(max(wait, asked_seconds or 0.0), options.max_backoff_seconds)


def transport_for(location: Location, options: StorageOptions) -> Transport:
    """ValueError when reading the location's scheme needs a package that is not installed."""
    if location.scheme in HTTP_SCHEMES:
        from data.http_ranges import HttpTransport

        return HttpTransport(location, options.timeout_seconds)
    from data.object_store import ObjectStoreTransport

    return ObjectStoreTransport(location, options.timeout_seconds)
