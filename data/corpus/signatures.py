"""Texts in, files of their signatures out, and back by number: what `duplicates` works on.

Three files a task: records in the order of the documents, the keys that each pass sorts by, and ids.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import final

import numpy as np
import zstandard

from data.corpus.fingerprint import content_hash, ngram_hashes, word_hashes
from data.corpus.minhash import MinHashConfig, signature_of
from data.files import publishing
from data.hashing import mix64

EXACT = -1  # the "band" of the content hash


@dataclass(frozen=True)
class DedupConfig:
    """What counts as a copy."""

    exact: bool = True  # the same words in the same order, whatever case, spacing and punctuation
    near: bool = True
    minhash: MinHashConfig = field(default_factory=MinHashConfig)
    num_partitions: int = 1  # of stage 2: the more, the less memory

    def __post_init__(self) -> None:
        if self.num_partitions < 1:
            raise ValueError(f"num_partitions {self.num_partitions} is below 1")

    @property
    def passes(self) -> list[int]:
        """What `match` is to be called with."""
        bands = list(range(self.minhash.bands)) if self.near else []
        return ([EXACT] if self.exact else []) + bands

    @property
    def dtype(self) -> np.dtype:
        """Of one document in a task's signature file."""
        size = self.minhash.size if self.near else 0
        return np.dtype(
            [("content", "<u8", (2,)), ("num_words", "<u4"), ("signature", "<u4", (size,))]
        )


def signatures_path(folder: Path, task: int) -> Path:
    """[num_documents] DedupConfig.dtype. Written last: where it is, keys and names are."""
    return folder / "signatures" / f"{task:06d}.bin"


def keys_path(folder: Path, task: int) -> Path:
    """uint64 [num_passes, num_documents]: what `match` sorts by; 0 for a document without words."""
    return folder / "signatures" / f"{task:06d}.keys"


def names_path(folder: Path, task: int) -> Path:
    return folder / "signatures" / f"{task:06d}.names.zst"


@final
class SignatureWriter:
    """Writes the signatures of a task's documents, in order. A context manager: complete or absent."""

    def __init__(self, folder: Path, task: int, config: DedupConfig) -> None:
        self._folder, self._task, self._config = folder, task, config
        self._names: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> "SignatureWriter":
        path = signatures_path(self._folder, self._task)
        self._file = self._stack.enter_context(publishing(path))
        return self

    def add(self, document_id: str, text: str) -> None:
        words = word_hashes(text)
        record = np.zeros(1, dtype=self._config.dtype)
        content = content_hash(words)
        record["content"] = [content & (2**64 - 1), content >> 64]
        record["num_words"] = min(len(words), 2**32 - 1)
        minhash = self._config.minhash
        if self._config.near:
            record["signature"] = signature_of(ngram_hashes(words, minhash.ngram), minhash)
        self._file.write(record.tobytes())
        self._names.append(document_id)

    def __exit__(self, *exception: object) -> None:
        with self._stack:
            if exception[0] is not None:
                self._stack.__exit__(*exception)  # pyright: ignore[reportArgumentType]
                return
            self._file.flush()
            names = zstandard.compress(json.dumps(self._names).encode())
            with publishing(names_path(self._folder, self._task)) as file:
                file.write(names)
            records = _mapped(Path(self._file.name), self._config)
            with publishing(keys_path(self._folder, self._task)) as file:
                for band in self._config.passes:
                    file.write(_keys(records, band, self._config).tobytes())


def _keys(records: np.ndarray, band: int, config: DedupConfig) -> np.ndarray:
    """uint64 [n]: a hash of the places of one band, or half of the content hash."""
    if band == EXACT:
        key = records["content"][:, 0].copy()
    else:
        rows = config.minhash.rows_per_band
        key = np.full(len(records), band, dtype=np.uint64)
        for place in range(band * rows, (band + 1) * rows):
            key = mix64(key ^ records["signature"][:, place].astype(np.uint64))
    return np.where(records["num_words"] > 0, np.maximum(key, 1), 0)


def _mapped(path: Path, config: DedupConfig) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=config.dtype)
    return np.memmap(path, dtype=config.dtype, mode="r")


def offsets_of(folder: Path, num_tasks: int, config: DedupConfig) -> np.ndarray:
    """int64 [num_tasks + 1]: document `index` of `task` has the number offsets[task] + index."""
    counts = []
    for task in range(num_tasks):
        size, width = signatures_path(folder, task).stat().st_size, config.dtype.itemsize
        keys_size = keys_path(folder, task).stat().st_size
        if size % width or keys_size != size // width * 8 * len(config.passes):
            raise ValueError(
                f"{signatures_path(folder, task)} was made with other settings: make it anew"
            )
        counts.append(size // width)
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def read_records(
    folder: Path, documents: np.ndarray, offsets: np.ndarray, name: str, config: DedupConfig
) -> np.ndarray:
    """[n, ...]: a field of the records of some documents, one task's file open at a time."""
    values = np.zeros(len(documents), dtype=config.dtype[name])
    if len(documents) == 0:
        return values
    task_of = np.searchsorted(offsets, documents, side="right") - 1
    order = np.argsort(documents, kind="stable")
    tasks, starts = np.unique(task_of[order], return_index=True)
    for task, places in zip(tasks.tolist(), np.split(order, starts[1:]), strict=True):
        records = _mapped(signatures_path(folder, task), config)
        values[places] = records[name][documents[places] - offsets[task]]
    return values


def read_names(folder: Path, documents: np.ndarray, offsets: np.ndarray) -> list[str]:
    """The ids of some documents, ascending."""
    found: list[str] = []
    bounds = np.searchsorted(documents, offsets).tolist()
    for task, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            names = json.loads(zstandard.decompress(names_path(folder, task).read_bytes()))
            found += [names[i] for i in (documents[start:end] - offsets[task]).tolist()]
    return found
