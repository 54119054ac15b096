"""A block and its address in, rows out: sequences packed into row slots, masked, ready to batch.

A block's rows are a pure function of (block, seed, epoch): pairs are cut (data/pairs.py), packed
here, and masked (data/masking.py). Any rank can compute any row, and nothing about rows is ever
stored.
"""

from typing import NamedTuple

import numpy as np
import xxhash

from data.hashing import hash_order, stable_hash64
from data.masking import Vocabulary, mask_row
from data.pairs import Pairs, make_pairs
from data.shards import Block


class RowPlan(NamedTuple):
    """Which pairs share a row. Row r holds pairs order[starts[r]:starts[r + 1]]."""

    pairs: Pairs
    order: np.ndarray  # int64 [num_pairs]
    starts: np.ndarray  # int64 [num_rows + 1]

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1


class Row(NamedTuple):
    """One row without its padding. n slots are filled, with s sequences, m of the slots are masked."""

    input_ids: np.ndarray  # uint32 [n], masked
    token_type_ids: np.ndarray  # uint8 [n]: 0 in [CLS] A [SEP], 1 in B [SEP]
    sequence_lengths: np.ndarray  # int64 [s], sums to n
    masked_positions: np.ndarray  # int64 [m], ascending
    masked_labels: np.ndarray  # uint32 [m]
    nsp_labels: np.ndarray  # int64 [s]: IS_NEXT, IS_RANDOM or UNLABELLED

    def digest(self, row_number: int) -> int:
        """64-bit hash of the row's content and its place in the run: equal streams, equal digests."""
        digest = xxhash.xxh3_64(row_number.to_bytes(8, "little"))
        for array in self:
            digest.update(np.ascontiguousarray(array).data)
        return digest.intdigest()


def plan_rows(block: Block, sequence_length: int, packing: bool, key: int) -> RowPlan:
    """Choose the pairs of every row of a block. Only lengths are read, no token.

    packing: several pairs may share a row (best-fit decreasing); else each pair has its own.
    Rows come in hashed order, because packing alone would put the longest pairs first.
    """
    pairs = make_pairs(block, sequence_length, key, vary_lengths=packing)
    if packing:
        bins = best_fit_decreasing(pairs.lengths, sequence_length)
    else:
        bins = [[index] for index in range(len(pairs.lengths))]
    bin_order = hash_order(stable_hash64(key, "rows"), len(bins)).tolist()
    sizes = [len(bins[index]) for index in bin_order]
    order = [pair for index in bin_order for pair in bins[index]]
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return RowPlan(pairs, np.array(order, dtype=np.int64), starts)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins of `capacity`: longest first, each into the fullest bin that takes it.

    lengths: int64 [n], each in 1..capacity. Open bins are kept by room left; a bit mask over the
    rooms finds the smallest that fits in O(1).
    """
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> bin numbers
    rooms = 0  # bit r is set when a bin with r slots of room is open
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = open_bins[room].pop()
            if not open_bins[room]:
                rooms &= ~(1 << room)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        left = room - length
        if left:
            open_bins[left].append(number)
            rooms |= 1 << left
    return bins


def make_row(
    block: Block,
    plan: RowPlan,
    number: int,
    vocabulary: Vocabulary,
    masked_fraction: float,
    key: int,
) -> Row:
    """Assemble and mask row `number` of a planned block. key: the same as given to `plan_rows`."""
    pairs = plan.pairs
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    chosen = plan.order[plan.starts[number] : plan.starts[number + 1]].tolist()
    cls, sep = np.array([vocabulary.cls_id]), np.array([vocabulary.sep_id])
    for pair in chosen:
        a_start, a_length = int(pairs.a_start[pair]), int(pairs.a_length[pair])
        b_start, b_length = int(pairs.b_start[pair]), int(pairs.b_length[pair])
        ids += [cls, block.tokens[a_start : a_start + a_length], sep]
        types.append(np.zeros(a_length + 2, dtype=np.uint8))
        if b_length:
            ids += [block.tokens[b_start : b_start + b_length], sep]
            types.append(np.ones(b_length + 1, dtype=np.uint8))
        lengths.append(a_length + b_length + (3 if b_length else 2))
    input_ids = np.concatenate(ids).astype(np.uint32)
    maskable = _maskable(input_ids, vocabulary)
    positions, labels = mask_row(
        input_ids, maskable, masked_fraction, vocabulary, stable_hash64(key, "mask", number)
    )
    sequence_lengths = np.array(lengths, dtype=np.int64)
    return Row(
        input_ids,
        np.concatenate(types),
        sequence_lengths,
        positions,
        labels,
        pairs.nsp_label[chosen],
    )


def _maskable(input_ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """bool [n]: False at [CLS] and [SEP]. Text never holds these ids (data/vocab.py)."""
    return (input_ids != vocabulary.cls_id) & (input_ids != vocabulary.sep_id)
