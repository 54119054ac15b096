"""Documents of many tasks in, which of them are copies out: in three stages that meet in files only.

1. `SignatureWriter`, in every task: a content hash and a MinHash signature per document.
2. `match`, once for the content and once for every band: pairs that are alike.
3. `cluster`, once: what is alike belongs together, also by way of a third; its first document stays.

Then `Removals` tells each task what to leave out. A document is (task, index): index counts the
documents that the task has kept. The files depend on the documents alone, not on which task ran when
or where. A pair counts if the whole signatures say so; no text is read again.

Memory: 0.1 GB, and 40 bytes a document in stage 2, a part of it with `num_partitions`; in stage 3, 300
bytes for every document that has a copy. Nothing here finds a short text inside a
long one: by the share of n-grams in common the two are not alike.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from data.corpus.clusters import Matches, join, merged, pairs_in_buckets
from data.corpus.minhash import similarity
from data.corpus.signatures import (
    EXACT,
    DedupConfig,
    SignatureWriter,
    keys_path,
    offsets_of,
    read_names,
    read_records,
)
from data.files import publishing, read_json, write_array, write_json

__all__ = ["DedupConfig", "Removal", "Removals", "SignatureWriter", "cluster", "match"]

AT_ONCE = 1 << 16  # documents whose signatures are in memory; larger buckets are cut


def pairs_path(folder: Path, band: int) -> Path:
    return folder / "pairs" / ("exact.npy" if band == EXACT else f"{band:03d}.npy")


def removals_path(folder: Path, task: int) -> Path:
    return folder / "removals" / f"{task:06d}.json"


def match(folder: Path, band: int, num_tasks: int, config: DedupConfig) -> None:
    """Find the pairs that are alike in one band, or in their content, and write them down.

    Documents without a word have no copies. ValueError: signatures were made with other settings.
    """
    offsets = offsets_of(folder, num_tasks, config)
    found = [
        _match_part(folder, part, offsets, band, config)
        for partition in range(config.num_partitions)
        for part in _buckets(folder, offsets, band, partition, config)
    ]
    path = pairs_path(folder, band)
    left = sum(matches.num_not_compared for matches in found)
    write_json(path.with_suffix(".json"), {"num_not_compared": left})
    write_array(path, merged([matches.pairs for matches in found]))


def _buckets(
    folder: Path, offsets: np.ndarray, band: int, partition: int, config: DedupConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(bucket, document), int64 [n]: documents of equal key, in parts of AT_ONCE and less."""
    keys, documents = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.int64)]
    row = config.passes.index(band)
    for task, (first, last) in enumerate(pairwise(offsets.tolist())):
        count = last - first
        key = np.fromfile(keys_path(folder, task), dtype="<u8", count=count, offset=row * count * 8)
        mine = np.flatnonzero((key != 0) & (key % np.uint64(config.num_partitions) == partition))
        keys.append(key[mine])
        documents.append(mine + first)
    key, document = np.concatenate(keys), np.concatenate(documents)
    keys.clear()
    documents.clear()
    order = np.argsort(key, kind="stable")  # stable: documents stay ascending within a bucket
    key = key[order]
    same = key[1:] == key[:-1]
    shared = np.zeros(len(key), dtype=bool)
    shared[1:] |= same
    shared[:-1] |= same
    document = document[order[shared]]
    bucket = np.cumsum(np.diff(key[shared], prepend=key[:1]) != 0)
    del key, order, same, shared
    yield from _parts(bucket, document)


def _parts(bucket: np.ndarray, document: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whole buckets together; one that is too large in parts, each with its first document."""
    start = 0
    while start < len(bucket):
        last = min(start + AT_ONCE, len(bucket))
        if last < len(bucket):
            whole = int(np.searchsorted(bucket, bucket[last]))  # the last bucket begins there
            last = whole if whole > start else last
        head = int(np.searchsorted(bucket, bucket[start]))
        place = np.arange(start, last)
        place = place if head == start else np.concatenate([[head], place])
        yield bucket[place], document[place]
        start = last


def _match_part(
    folder: Path,
    part: tuple[np.ndarray, np.ndarray],
    offsets: np.ndarray,
    band: int,
    config: DedupConfig,
) -> Matches:
    bucket, document = part
    if band == EXACT:
        content = read_records(folder, document, offsets, "content", config)

        def same(i: np.ndarray, j: np.ndarray) -> np.ndarray:
            return (content[i] == content[j]).all(axis=1).astype(np.float32)

        return pairs_in_buckets(bucket, document, same, 1.0)
    signature = read_records(folder, document, offsets, "signature", config)

    def alike(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return similarity(signature[i], signature[j])

    return pairs_in_buckets(bucket, document, alike, config.minhash.threshold)


class ClusterCounts(NamedTuple):
    num_clusters: int  # documents that have copies
    num_exact: int  # copies removed that have the same words
    num_near: int  # others removed
    largest: list[tuple[str, int]]  # the ten with most copies: id of what stays, copies
    num_not_compared: int  # comparisons left out: a band met more unlike texts than are compared


class Removal(NamedTuple):
    """Why a document is left out."""

    kind: str  # "exact" or "near"
    of: str  # id of the document that stays
    similarity: float  # to a document of the cluster: estimated for near ones


def cluster(folder: Path, num_tasks: int, config: DedupConfig) -> ClusterCounts:
    """Join pairs to clusters, keep the first document of each, write down what is removed, by task."""
    offsets = offsets_of(folder, num_tasks, config)
    nodes, root, alike = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0)
    left = 0
    for band in config.passes:
        path = pairs_path(folder, band)
        nodes, root, alike = _joined(nodes, root, alike, np.load(path))
        left += read_json(path.with_suffix(".json"))["num_not_compared"]
    removed = np.flatnonzero(root != np.arange(len(nodes)))
    content = read_records(folder, nodes, offsets, "content", config)
    exact = (content[removed] == content[root[removed]]).all(axis=1)
    heads, copies = np.unique(root[removed], return_counts=True)
    names = dict(zip(heads.tolist(), read_names(folder, nodes[heads], offsets), strict=True))
    removals = [
        Removal("exact" if same else "near", names[head], 1.0 if same else round(likeness, 3))
        for head, same, likeness in zip(
            root[removed].tolist(), exact.tolist(), alike[removed].tolist(), strict=True
        )
    ]
    bounds = np.searchsorted(nodes[removed], offsets).tolist()
    for task, (start, end) in enumerate(pairwise(bounds)):
        index = (nodes[removed[start:end]] - offsets[task]).tolist()
        with publishing(removals_path(folder, task)) as file:
            file.write(json.dumps(dict(zip(index, removals[start:end], strict=True))).encode())
    most = [(names[head], n) for head, n in zip(heads.tolist(), copies.tolist(), strict=True)]
    most.sort(key=lambda item: (-item[1], item[0]))
    num_exact = int(exact.sum())
    return ClusterCounts(len(heads), num_exact, len(removed) - num_exact, most[:10], left)


def _joined(
    nodes: np.ndarray, root: np.ndarray, alike: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(documents, place of the first of each's cluster, greatest similarity) with some more pairs."""
    every = np.sort(
        np.concatenate([nodes, pairs["first"], pairs["second"]])
    )  # np.unique hashes: slow
    every = every[np.diff(every, prepend=-1) > 0]
    known = np.searchsorted(every, nodes)
    first, second = (np.searchsorted(every, pairs[end]) for end in ("first", "second"))
    greatest = np.zeros(len(every))
    greatest[known] = alike
    for ends in (first, second):
        np.maximum.at(greatest, ends, pairs["similarity"])
    edges = np.concatenate([known[root], first]), np.concatenate([known, second])
    return every, join(*edges, len(every)), greatest


@final
class Removals:
    """What one task is to leave out."""

    def __init__(self, folder: Path, task: int) -> None:
        values = read_json(removals_path(folder, task))
        self._removals = {int(index): Removal(*value) for index, value in values.items()}

    def get(self, index: int) -> Removal | None:
        return self._removals.get(index)
