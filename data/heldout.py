"""A dataset's held-out split in, all of it out, source by source: batches, and documents in pieces.

What is measured in training is the beginning of the same rows (`data.batch.evaluation_batches`).
"""

import itertools
from collections.abc import Iterator

import numpy as np

from data.batch import in_turn, rows_in_turn
from data.collate import Batch, collate
from data.lanes import DataConfig
from data.rows import Row
from data.shards import Dataset


def heldout_batches(
    dataset: Dataset,
    config: DataConfig,
    seed: int,
    *,
    rows_per_batch: int,
    num_rows: int | None = None,
) -> Iterator[tuple[str, Batch]]:
    """(source, batch) of held-out rows; the rows of a batch are of one source.

    num_rows: so many, the very rows of `heldout_rows`; None: all there are, one block in memory at a time.
    """
    blocks = dataset.block_indices("heldout").tolist()
    groups = [[block] for block in blocks] if num_rows is None else [blocks]
    rows = itertools.chain.from_iterable(
        rows_in_turn(dataset, config, seed, group) for group in groups
    )
    pad_id, mixture = dataset.special_ids["[PAD]"], config.mixture
    waiting: dict[str, list[Row]] = {}

    def batch_of(source: str) -> tuple[str, Batch]:
        taken = waiting.pop(source)
        numbers = list(range(len(taken)))
        return source, collate(taken, numbers, config.sequence_length, pad_id, mixture)

    for block, row in itertools.islice(rows, num_rows):
        source = source_of(dataset, block)
        waiting.setdefault(source, []).append(row)
        if len(waiting[source]) == rows_per_batch:
            yield batch_of(source)
    for source in list(waiting):
        yield batch_of(source)


def heldout_documents(dataset: Dataset, num_documents: int) -> Iterator[tuple[str, np.ndarray]]:
    """(source, token ids [n]) of `num_documents` held-out documents, or of all where they are fewer.

    The first of each block, then the second, and so on. Documents lie in hashed order, so these are a sample.
    """

    def documents_of(block_index: int) -> Iterator[tuple[str, np.ndarray]]:
        block = dataset.read_block(block_index)
        ends = np.cumsum(block.document_lengths, dtype=np.int64).tolist()
        for start, end in itertools.pairwise([0, *ends]):
            yield source_of(dataset, block_index), block.tokens[start:end]

    queues = [documents_of(block) for block in dataset.block_indices("heldout").tolist()]
    return itertools.islice(in_turn(queues), num_documents)


def pieces_of(tokens: np.ndarray, longest: int) -> list[np.ndarray]:
    """A document cut into as few pieces of at most `longest` tokens as can be, of even length."""
    return np.array_split(tokens, max(1, -(-len(tokens) // longest)))


def source_of(dataset: Dataset, block: int) -> str:
    return dataset.sources[int(dataset.blocks[block]["source"])]
