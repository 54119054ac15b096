"""Documents of many tasks in, which of them are copies out: in three stages that meet in files only.

1. `SignatureWriter`, in every task: a content hash and a MinHash signature per document.
2. `match`, once for the content and once for every band: pairs that are alike.
3. `cluster`, once: what is alike belongs together, also by way of a third; its first document stays.

Then `Removals` tells each task what to leave out. A document is (task, index): index counts the
documents that the task has kept. Memory: 24 bytes a document in stage 2 (a part of it with
`num_partitions`), and what has a copy in stage 3. The files depend on the documents alone, not on
which task ran when or where.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, final

import numpy as np
import zstandard

from data.corpus.fingerprint import content_hash, ngram_hashes, word_hashes
from data.corpus.minhash import MinHashConfig, signature_of, similarity
from data.files import publishing, read_json, write_array, write_json
from data.hashing import mix64

EXACT = -1  # the "band" of the content hash
MAX_REPRESENTATIVES = 32  # of one bucket: what else is in it is compared with these


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
        return np.dtype(
            [("content", "<u8"), ("num_words", "<u4"), ("signature", "<u4", (self.minhash.size,))]
        )


def signatures_path(folder: Path, task: int) -> Path:
    return folder / "signatures" / f"{task:06d}.bin"


def names_path(folder: Path, task: int) -> Path:
    return folder / "signatures" / f"{task:06d}.names.zst"


def pairs_path(folder: Path, band: int) -> Path:
    return folder / "pairs" / ("exact.npy" if band == EXACT else f"{band:03d}.npy")


def removals_path(folder: Path, task: int) -> Path:
    return folder / "removals" / f"{task:06d}.json"


@final
class SignatureWriter:
    """Writes the signatures of a task's documents, in order. A context manager: complete or absent."""

    def __init__(self, folder: Path, task: int, config: DedupConfig) -> None:
        self._config = config
        self._publishing = publishing(signatures_path(folder, task))
        self._names_path = names_path(folder, task)
        self._names: list[str] = []

    def __enter__(self) -> "SignatureWriter":
        self._file: BinaryIO = self._publishing.__enter__()
        return self

    def add(self, document_id: str, text: str) -> None:
        words = word_hashes(text)
        record = np.zeros(1, dtype=self._config.dtype)
        record["content"] = content_hash(words) & (2**64 - 1)
        record["num_words"] = min(len(words), 2**32 - 1)
        minhash = self._config.minhash
        if self._config.near:
            record["signature"] = signature_of(ngram_hashes(words, minhash.ngram), minhash)
        self._file.write(record.tobytes())
        self._names.append(document_id)

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            names = zstandard.compress(json.dumps(self._names).encode())
            with publishing(self._names_path) as file:
                file.write(names)
        self._publishing.__exit__(*exception)  # pyright: ignore[reportArgumentType]


def match(folder: Path, band: int, num_tasks: int, config: DedupConfig) -> None:
    """Find the pairs that are alike in one band, or in their content, and write them down.

    Documents without a word have no copies. A pair of a band counts if the whole signatures say so.
    """
    tasks = [_signatures(folder, task, config) for task in range(num_tasks)]
    pairs: list[tuple[int, int, int, int, float]] = []
    for partition in range(config.num_partitions):
        for bucket in _buckets(tasks, band, partition, config):
            pairs += _pairs_of(bucket, tasks, band, config)
    pairs.sort()
    write_array(pairs_path(folder, band), np.array(pairs, dtype=np.float64).reshape(-1, 5))


def _signatures(folder: Path, task: int, config: DedupConfig) -> np.ndarray:
    """[num_documents] config.dtype, memory-mapped."""
    path = signatures_path(folder, task)
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=config.dtype)
    return np.memmap(path, dtype=config.dtype, mode="r")


def _buckets(
    tasks: list[np.ndarray], band: int, partition: int, config: DedupConfig
) -> Iterator[np.ndarray]:
    """int64 [n, 2] (task, index) of every set of two or more documents with an equal key, sorted."""
    keys, places = [], []
    for task, records in enumerate(tasks):
        if len(records) == 0:
            continue
        key = records["content"].copy() if band == EXACT else _band_key(records, band, config)
        mine = (key % np.uint64(config.num_partitions) == partition) & (records["num_words"] > 0)
        index = np.flatnonzero(mine)
        keys.append(key[index])
        places.append(np.stack([np.full(len(index), task), index], axis=1))
    if not keys:
        return
    key, place = np.concatenate(keys), np.concatenate(places)
    order = np.argsort(key, kind="stable")  # stable: places stay ascending within a bucket
    key = key[order]
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    sizes = np.diff(np.append(starts, len(key)))
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        yield place[order[start : start + size]]


def _band_key(records: np.ndarray, band: int, config: DedupConfig) -> np.ndarray:
    """uint64 [n]: a hash of the places of one band."""
    rows = config.minhash.rows_per_band
    key = np.full(len(records), band, dtype=np.uint64)
    for place in range(band * rows, (band + 1) * rows):
        key = mix64(key ^ records["signature"][:, place].astype(np.uint64))
    return key


def _pairs_of(
    bucket: np.ndarray, tasks: list[np.ndarray], band: int, config: DedupConfig
) -> list[tuple[int, int, int, int, float]]:
    """(task, index, task, index, similarity) of the pairs of one bucket; the first named is the earlier."""
    if band == EXACT:
        (first_task, first), *others = bucket.tolist()
        return [(first_task, first, task, index, 1.0) for task, index in others]
    representatives: list[tuple[tuple[int, int], np.ndarray]] = []
    pairs = []
    for task, index in bucket.tolist():
        mine = tasks[task][index]["signature"]
        known = np.array([other for _, other in representatives]).reshape(-1, len(mine))
        alike = similarity(known, mine)
        if len(alike) and alike.max() >= config.minhash.threshold:
            best = int(alike.argmax())
            pairs.append((*representatives[best][0], task, index, float(alike[best])))
        elif len(representatives) < MAX_REPRESENTATIVES:
            representatives.append(((task, index), mine))
    return pairs


class ClusterCounts(NamedTuple):
    num_clusters: int  # documents that have copies
    num_exact: int  # copies removed that have the same words
    num_near: int  # others removed
    largest: list[tuple[str, int]]  # the ten with most copies: id of what stays, copies


class Removal(NamedTuple):
    """Why a document is left out."""

    kind: str  # "exact" or "near"
    of: str  # id of the document that stays
    similarity: float  # to a document of the cluster: estimated for near ones


def cluster(folder: Path, num_tasks: int, config: DedupConfig) -> ClusterCounts:
    """Join pairs to clusters, keep the first document of each, write down what is removed, by task."""
    parent: dict[tuple[int, int], tuple[int, int]] = {}
    alike: dict[tuple[int, int], float] = {}

    def root(node: tuple[int, int]) -> tuple[int, int]:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for band in config.passes:
        for row in np.load(pairs_path(folder, band)).tolist():
            first, second = (int(row[0]), int(row[1])), (int(row[2]), int(row[3]))
            low, high = sorted((root(first), root(second)))
            parent[high] = low
            for node in (first, second):
                alike[node] = max(alike.get(node, 0.0), row[4])
    members: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for node in sorted(parent):
        members.setdefault(root(node), []).append(node)
    return _write_removals(folder, num_tasks, config, members, alike)


def _write_removals(
    folder: Path,
    num_tasks: int,
    config: DedupConfig,
    members: dict[tuple[int, int], list[tuple[int, int]]],
    alike: dict[tuple[int, int], float],
) -> ClusterCounts:
    records = [_signatures(folder, task, config) for task in range(num_tasks)]
    names = [_names(folder, task) for task in range(num_tasks)]
    removals: list[dict[str, Removal]] = [{} for _ in range(num_tasks)]
    counts = {"exact": 0, "near": 0}
    for (task, index), copies in members.items():
        content, kept = records[task][index]["content"], names[task][index]
        for other_task, other in copies[1:]:
            same = records[other_task][other]["content"] == content
            kind = "exact" if same else "near"
            likeness = 1.0 if same else alike[other_task, other]
            counts[kind] += 1
            removals[other_task][str(other)] = Removal(kind, kept, round(likeness, 3))
    for task, removed in enumerate(removals):
        write_json(removals_path(folder, task), removed)
    sizes = [(names[task][index], len(copies) - 1) for (task, index), copies in members.items()]
    largest = sorted(sizes, key=lambda item: (-item[1], item[0]))[:10]
    return ClusterCounts(len(members), counts["exact"], counts["near"], largest)


def _names(folder: Path, task: int) -> list[str]:
    return json.loads(zstandard.decompress(names_path(folder, task).read_bytes()))


@final
class Removals:
    """What one task is to leave out."""

    def __init__(self, folder: Path, task: int) -> None:
        values = read_json(removals_path(folder, task))
        self._removals = {int(index): Removal(*value) for index, value in values.items()}

    def get(self, index: int) -> Removal | None:
        return self._removals.get(index)
