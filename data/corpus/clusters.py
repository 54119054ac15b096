"""Arrays of documents in, pairs that are alike and what belongs together out: the core of `duplicates`.

Nothing here knows of files. A document is an integer; of two that are alike the smaller one stays.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAX_LEADERS = 32  # of one bucket
PAIR = np.dtype([("first", "<i8"), ("second", "<i8"), ("similarity", "<f4")])


class Matches(NamedTuple):
    pairs: np.ndarray  # [num_pairs] PAIR, first < second, sorted
    num_not_compared: int  # documents left over in buckets of more than MAX_LEADERS kinds


def pairs_in_buckets(
    bucket: np.ndarray,
    document: np.ndarray,
    alike: Callable[[np.ndarray, np.ndarray], np.ndarray],
    threshold: float,
) -> Matches:
    """Compare the documents of each bucket with its leaders.

    bucket: int64 [n], ascending; document: int64 [n], ascending in each bucket; alike(i, j): the
    similarity of places i and j, float [m]. The first document leads; who is not like it chooses a next
    leader among themselves, and so on. So a bucket of copies takes one comparison each, not all pairs;
    of three documents that are alike, two are compared with the first only.
    """
    found: list[np.ndarray] = []
    left = np.arange(len(bucket))
    for _ in range(MAX_LEADERS):
        starts, sizes = _runs(bucket[left])
        left = left[np.repeat(sizes > 1, sizes)]  # who is alone has met all leaders
        if len(left) == 0:
            break
        starts, sizes = _runs(bucket[left])
        leader = np.repeat(left[starts], sizes)
        follows = np.ones(len(left), dtype=bool)
        follows[starts] = False
        likeness = alike(leader[follows], left[follows])
        hit = likeness >= threshold
        pairs = np.empty(int(hit.sum()), dtype=PAIR)
        pairs["first"] = document[leader[follows][hit]]
        pairs["second"] = document[left[follows][hit]]
        pairs["similarity"] = likeness[hit]
        found.append(pairs)
        left = left[follows][~hit]
    _, sizes = _runs(bucket[left])
    return Matches(merged(found), int(sizes[sizes > 1].sum()))


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes) of the runs of equal values."""
    if len(values) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    return starts, np.diff(np.append(starts, len(values)))


def merged(parts: list[np.ndarray]) -> np.ndarray:
    """[n] PAIR of all parts, sorted; a pair that occurs in several with its greatest similarity."""
    pairs = np.concatenate([np.zeros(0, dtype=PAIR), *parts])
    pairs = pairs[np.lexsort((-pairs["similarity"], pairs["second"], pairs["first"]))]
    again = (pairs["first"][1:] == pairs["first"][:-1]) & (
        pairs["second"][1:] == pairs["second"][:-1]
    )
    return pairs[np.concatenate([[True], ~again])] if len(pairs) else pairs


def join(first: np.ndarray, second: np.ndarray, num_nodes: int) -> np.ndarray:
    """int64 [num_nodes]: the smallest node that each can be reached from over the edges (first, second).

    Each round, the roots of an edge's ends learn of each other, the larger under the smaller, and
    paths are shortened until every node knows its root (as in Shiloach and Vishkin 1982).
    """
    root = np.arange(num_nodes)
    while True:
        one, other = root[first], root[second]
        low, high = np.minimum(one, other), np.maximum(one, other)
        if np.array_equal(low, high):
            return root
        np.minimum.at(root, high, low)
        while not np.array_equal(shorter := root[root], root):
            root = shorter


def join_slowly(first: list[int], second: list[int], num_nodes: int) -> list[int]:
    """What `join` computes, edge by edge (union-find)."""
    root = list(range(num_nodes))

    def find(node: int) -> int:
        while root[node] != node:
            node = root[node]
        return node

    for one, other in zip(first, second, strict=True):
        low, high = sorted((find(one), find(other)))
        root[high] = low
    return [find(node) for node in range(num_nodes)]
