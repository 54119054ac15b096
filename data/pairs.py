"""A block's documents, cut, in, sentence pairs with next-sentence labels out.

Each epoch uses every token of a block exactly once: documents are cut into consecutive (A, B)
pairs (data/cutting.py), and a "random" pair gets the B of another pair, which in turn gets
another's. Devlin et al. 2019 (appendix A.2) draw B from anywhere; here nothing is drawn twice.
"""

from typing import NamedTuple

import numpy as np

from data.cutting import NUM_SPECIAL, Lengths, cut_documents
from data.hashing import MASK64, hash_order, hash_positions, stable_hash64
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
    b_start, b_length = cut.a_start + cut.a_length, cut.b_length.copy()
    labelled = np.flatnonzero(labels == IS_NEXT)
    labelled = labelled[np.argsort(cut.group[labelled], kind="stable")]
    groups = np.split(labelled, np.flatnonzero(np.diff(cut.group[labelled])) + 1)
    groups = [group for group in groups if len(group) > 1]
    share = 0.5 * len(labelled) / max(1, sum(map(len, groups)))  # those left alone cannot take part
    documents = block.document_ids[cut.document]
    from_start, from_length = b_start.copy(), b_length.copy()
    for group in groups:
        group_key = stable_hash64(key, "nsp", int(cut.group[group[0]]))
        receivers, givers = _exchange(group, documents, min(1.0, share), group_key)
        b_start[receivers], b_length[receivers] = from_start[givers], from_length[givers]
        labels[receivers] = IS_RANDOM
    return Pairs(cut.a_start, cut.a_length, b_start, b_length, labels, cut.row)


def _exchange(
    candidates: np.ndarray, document: np.ndarray, share: float, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """(receivers, givers): a share of the candidates, and the pair whose B each of them gets.

    Every chosen pair gives its B once and receives one of another document: sorted by document and
    shifted by the largest document's count, no pair can meet its own. Pairs of a document that
    holds more than half of the chosen stay "next": within one document there is no random B to
    give.
    """
    chosen = candidates[
        hash_order(key, len(candidates))[: _num_chosen(len(candidates), share, key)]
    ]
    documents, owner, counts = np.unique(document[chosen], return_inverse=True, return_counts=True)
    if len(documents) < 2:
        return chosen[:0], chosen[:0]
    largest = int(np.argmax(counts))
    excess = int(2 * counts[largest] - len(chosen))
    if excess > 0:
        keep = np.ones(len(chosen), dtype=bool)
        keep[np.flatnonzero(owner == largest)[:excess]] = False
        chosen, owner = chosen[keep], owner[keep]
    owner_order = hash_positions((key ^ 0xA5A5A5A5) & MASK64, len(documents))[owner]
    receivers = chosen[np.argsort(owner_order, kind="stable")]
    shift = int(np.bincount(owner).max())
    return receivers, np.roll(receivers, -shift)


def _num_chosen(num_candidates: int, share: float, key: int) -> int:
    """About share x candidates, rounded by hash so that it is right on average; one alone is no exchange."""
    wanted, draw = num_candidates * share, (key >> 11) * 2.0**-53
    if wanted < 2:
        return 2 if draw < wanted / 2 else 0
    return int(wanted + draw)
