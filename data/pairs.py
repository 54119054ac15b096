"""A block's documents, cut, in, sentence pairs with next-sentence labels out.

Each epoch uses every token of a block exactly once: documents are cut into consecutive (A, B)
pairs (data/cutting.py), and a "random" pair gets the B of another pair, which in turn gets
another's. Devlin et al. 2019 (appendix A.2) draw B from anywhere; here nothing is drawn twice.
"""

from typing import NamedTuple

import numpy as np

from data.cutting import NUM_SPECIAL, Lengths, cut_documents
from data.hashing import hash_positions, mix64, stable_hash64
from data.shards import Block

IS_NEXT, IS_RANDOM, UNLABELLED = 0, 1, -1  # as in transformers; UNLABELLED: an A without a B


class Pairs(NamedTuple):
    """All pairs of a block in reading order of its shuffled documents. All arrays are [num_pairs]."""

    a_start: np.ndarray  # int64: token offset in the block
    a_length: np.ndarray  # int64, at least 1
    b_start: np.ndarray  # int64
    b_length: np.ndarray  # int64; 0 where a single token was left: [CLS] A [SEP], no label
    nsp_label: np.ndarray  # int64: IS_NEXT, IS_RANDOM or UNLABELLED
    row: np.ndarray  # int64: pairs of one row lie in it together

    @property
    def lengths(self) -> np.ndarray:
        """int64 [num_pairs]: row slots each pair takes, special tokens counted."""
        return self.a_length + self.b_length + np.where(self.b_length > 0, NUM_SPECIAL, 2)


def make_pairs(block: Block, sequence_length: int, packing: bool, key: int) -> Pairs:
    """Cut a block into rows of pairs, each row at most `sequence_length` slots; half get a random B.

    packing: several pairs may share a row, else each has its own. key: 64-bit address of this
    reading of the block (seed, source, epoch, block).
    """
    cut = cut_documents(block, Lengths.of(sequence_length), packing, key)
    labels = np.where(cut.b_length > 0, IS_NEXT, UNLABELLED)
    labelled = np.flatnonzero(labels == IS_NEXT)
    documents = block.document_ids[cut.document[labelled]]
    receivers, givers = _exchange(cut.group[labelled], documents, stable_hash64(key, "nsp"))
    receivers, givers = labelled[receivers], labelled[givers]
    b_start, b_length = cut.a_start + cut.a_length, cut.b_length.copy()
    b_start[receivers], b_length[receivers] = b_start[givers], cut.b_length[givers]
    labels[receivers] = IS_RANDOM
    return Pairs(cut.a_start, cut.a_length, b_start, b_length, labels, cut.row)


def _exchange(group: np.ndarray, document: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray]:
    """(receivers, givers): half of the pairs, and for each the pair whose B it gets; int64 indices.

    group, document: [num_pairs]. Every chosen pair gives its B once and receives one of another
    document of its group: with a group sorted by document and shifted by its largest document's
    count, no pair can meet its own. Pairs of a document that holds more than half of a group's
    chosen stay "next": within one document there is no random B to give.
    """
    hashes = hash_positions(key, len(group))
    order = np.lexsort((hashes, group))
    starts, counts = _runs(group[order])
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    chosen = order[rank < np.repeat(_num_chosen(group[order][starts], counts, key), counts)]
    by_document = mix64(document ^ np.uint64(key))
    chosen = chosen[np.lexsort((hashes[chosen], by_document[chosen], group[chosen]))]
    chosen = chosen[_without_excess(group[chosen], by_document[chosen])]
    starts, counts = _runs(group[chosen])
    _, (_, shift) = _largest_documents(group[chosen], by_document[chosen])
    position = np.arange(len(chosen)) - np.repeat(starts, counts)
    giver = np.repeat(starts, counts) + (position + np.repeat(shift, counts)) % np.repeat(
        counts, counts
    )
    return chosen, chosen[giver]


def _num_chosen(groups: np.ndarray, counts: np.ndarray, key: int) -> np.ndarray:
    """int64 [num_groups]: half of each group, rounded by hash so that it is right on average.

    One pair alone cannot exchange: groups of one take no part, and the others a little more.
    """
    counts = counts.astype(np.float64)
    share = min(1.0, 0.5 * counts.sum() / max(1.0, counts[counts > 1].sum()))
    draw = (mix64(groups.astype(np.uint64) ^ np.uint64(key)) >> np.uint64(11)) * 2.0**-53
    wanted = counts * share
    few = np.where((counts > 1) & (draw < wanted / 2), 2, 0)
    return np.where(wanted < 2, few, np.floor(wanted + draw)).astype(np.int64)


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of the runs of equal values."""
    if len(values) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    starts = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
    return starts, np.diff(np.append(starts, len(values)))


def _largest_documents(
    group: np.ndarray, document: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Sorted by group, then document: runs of documents, and (runs' first of each group, largest run)."""
    group_starts, _ = _runs(group)
    change = np.ones(len(group), dtype=bool)
    change[1:] = (group[1:] != group[:-1]) | (document[1:] != document[:-1])
    starts = np.flatnonzero(change)
    lengths = np.diff(np.append(starts, len(group)))
    first = np.searchsorted(starts, group_starts)
    largest = np.maximum.reduceat(lengths, first) if len(first) else lengths
    return (starts, lengths), (first, largest)


def _without_excess(group: np.ndarray, document: np.ndarray) -> np.ndarray:
    """bool: False at as many pairs of a document as it has more than the rest of its group."""
    (starts, lengths), (first, _) = _largest_documents(group, document)
    group_starts, counts = _runs(group)
    del group_starts
    of_run = np.repeat(counts, np.diff(np.append(first, len(starts))))
    excess = np.maximum(0, 2 * lengths - of_run)
    position = np.arange(len(group)) - np.repeat(starts, lengths)
    return position >= np.repeat(excess, lengths)
