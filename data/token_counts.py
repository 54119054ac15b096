"""A dataset in, how often each token occurs in it out, in tasks that may run side by side."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data.shards import SPLITS, Dataset, Split

BLOCKS_PER_TASK = 256

TokenCounts = dict[tuple[str, Split], np.ndarray]  # (source, split) -> int64 [vocab_size]


@dataclass(frozen=True)
class CountTask:
    root: str
    source: str
    split: Split
    blocks: tuple[int, ...]  # rows of the block table


def no_counts(sources: Iterable[str], vocab_size: int) -> TokenCounts:
    """0 of every token, in both splits of each source."""
    return {(s, split): np.zeros(vocab_size, np.int64) for s in sources for split in SPLITS}


def count_tasks(dataset: Dataset) -> list[CountTask]:
    """Tasks that together read every block once."""
    return [
        CountTask(str(dataset.root), source, split, tuple(rows[at : at + BLOCKS_PER_TASK].tolist()))
        for source in dataset.sources
        for split in SPLITS
        for rows in (dataset.block_indices(split, source),)
        for at in range(0, len(rows), BLOCKS_PER_TASK)
    ]


def count_tokens(task: CountTask) -> np.ndarray:
    """int64 [vocab_size]: how often each token occurs in some blocks. ValueError when one is damaged."""
    dataset = _open(task.root)
    counts = np.zeros(dataset.vocab_size, np.int64)
    for index in task.blocks:
        counts += np.bincount(dataset.read_block(index).tokens, minlength=dataset.vocab_size)
    return counts


@functools.cache
def _open(root: str) -> Dataset:
    return Dataset.open(root)
