"""A dataset and the mixture's weights in, the streams that are mixed out, and which one is whose turn.

Nothing here grows with the dataset: the block table is sorted by source and split, so a stream is a
few ranges of it, found by bisection.
"""

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import final, overload

import numpy as np

from data.hashing import permute, stable_hash64
from data.shards import SPLITS, Dataset, Split

MAX_WEIGHT_SUM = 1 << 16


@final
class BlockRows:
    """Rows of the block table that make up one stream, by ordinal."""

    def __init__(self, ranges: Iterable[range]) -> None:
        self.ranges = [part for part in ranges if len(part)]
        self._ends = list(accumulate(map(len, self.ranges)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, ordinal: int) -> int: ...
    @overload
    def __getitem__(self, ordinal: np.ndarray) -> np.ndarray: ...
    def __getitem__(self, ordinal: int | np.ndarray) -> int | np.ndarray:
        if isinstance(ordinal, np.ndarray):
            part = np.searchsorted(self._ends, ordinal, side="right")
            firsts = np.array([r.start for r in self.ranges], dtype=np.int64)
            before = np.array([0, *self._ends[:-1]], dtype=np.int64)
            return firsts[part] + ordinal - before[part]
        part = bisect_right(self._ends, ordinal)
        return self.ranges[part][ordinal - (self._ends[part - 1] if part else 0)]


def block_rows(dataset: Dataset, split: Split, sources: list[str]) -> BlockRows:
    """The rows of the block table that belong to a split of some sources."""
    table = dataset.blocks

    def first_row_from(source: int, split_index: int) -> int:
        """The first row that is not before (source, split), by bisection."""
        low, high = 0, len(table)
        while low < high:
            middle = (low + high) // 2
            row = table[middle]
            if (int(row["source"]), int(row["split"])) < (source, split_index):
                low = middle + 1
            else:
                high = middle
        return low

    wanted = SPLITS.index(split)
    numbers = [dataset.sources.index(name) for name in sources]
    return BlockRows(
        range(first_row_from(n, wanted), first_row_from(n, wanted + 1)) for n in numbers
    )


def training_sources(
    dataset: Dataset, weights: dict[str, int] | None
) -> tuple[list[str], list[BlockRows]]:
    """The streams that are mixed: their names, and the block-table rows of each.

    Without weights all blocks form one stream, so every source has the share it was prepared with.
    """
    if weights is None:
        return ["all"], [block_rows(dataset, "train", dataset.sources)]
    unknown = sorted(set(weights) - set(dataset.sources))
    if unknown:
        raise ValueError(f"data.weights names {unknown}; {dataset.place} has {dataset.sources}")
    names = list(weights)
    blocks = [block_rows(dataset, "train", [name]) for name in names]
    empty = [name for name, rows in zip(names, blocks, strict=True) if len(rows) == 0]
    if empty:
        raise ValueError(f"data.weights names {empty}, which have no training blocks")
    return names, blocks


def pick_source(weights: list[int], key: int, window: int) -> int:
    """The source of a lane's window: each appears exactly `weight` times in every period of sum(weights)."""
    period = sum(weights)
    if period == 1:
        return 0
    cycle, position = divmod(window, period)
    slot = permute(position, period, stable_hash64(key, cycle))
    for source, weight in enumerate(weights):
        if slot < weight:
            return source
        slot -= weight
    raise AssertionError("slot is below the sum of the weights")
