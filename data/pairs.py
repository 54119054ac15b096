"""A block's document and sentence lengths in, sentence pairs with next-sentence labels out.

Each epoch uses every token of a block exactly once: documents are cut into consecutive (A, B)
pairs of whole sentences, and a "random" pair gets the B of another pair, which in turn gets
another's. Devlin et al. 2019 (appendix A.2) draw B from anywhere and truncate; here nothing is
drawn twice and nothing is cut away. A sentence longer than its share of the row is split, its rest
goes on in the next part.
"""

from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from data.hashing import MASK64, hash_order, hash_positions, stable_hash64
from data.shards import Block

NUM_SPECIAL = 3  # [CLS] A [SEP] B [SEP]
IS_NEXT, IS_RANDOM, UNLABELLED = 0, 1, -1  # as in transformers; UNLABELLED: an A without a B
SHARES_OF_A = (0.25, 0.5, 0.75)  # A's share of a row; pairs exchange their B within one share only
SHARE_OF_HASH = (0, 1, 1, 2)  # two hash bits -> index into SHARES_OF_A: the middle twice as often


class Pairs(NamedTuple):
    """All pairs of a block in reading order of its shuffled documents. All arrays are [num_pairs]."""

    a_start: np.ndarray  # int64: token offset in the block
    a_length: np.ndarray  # int64, at least 1
    b_start: np.ndarray  # int64
    b_length: np.ndarray  # int64; 0 where a single token was left: [CLS] A [SEP], no label
    nsp_label: np.ndarray  # int64: IS_NEXT, IS_RANDOM or UNLABELLED

    @property
    def lengths(self) -> np.ndarray:
        """int64 [num_pairs]: row slots each pair takes, special tokens counted."""
        return self.a_length + self.b_length + np.where(self.b_length > 0, NUM_SPECIAL, 2)


def make_pairs(block: Block, sequence_length: int, key: int, *, vary_lengths: bool) -> Pairs:
    """Cut a block into pairs of at most `sequence_length` slots; half of them get a random B.

    key: 64-bit address of this reading of the block (seed, source, epoch, block).
    vary_lengths: a quarter of the pairs aims at 20 to 95 % of the row (Devlin et al. shorten a
    tenth). Packing needs short pairs to fill the room that long ones leave.
    """
    cut, document, share = _cut_documents(block, sequence_length - NUM_SPECIAL, key, vary_lengths)
    labels = np.where(cut[:, 3] > 0, IS_NEXT, UNLABELLED)
    swapped_b = cut[:, 2:4].copy()
    for share_index in range(len(SHARES_OF_A)):
        candidates = np.flatnonzero((share == share_index) & (labels == IS_NEXT))
        receivers, givers = _exchange(candidates, document, stable_hash64(key, "nsp", share_index))
        swapped_b[receivers] = cut[givers, 2:4]
        labels[receivers] = IS_RANDOM
    return Pairs(cut[:, 0], cut[:, 1], swapped_b[:, 0], swapped_b[:, 1], labels)


def _cut_documents(
    block: Block, budget: int, key: int, vary_lengths: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [num_pairs, 4] (a_start, a_length, b_start, b_length), document id and share of each."""
    document_ends = np.cumsum(block.document_lengths, dtype=np.int64)
    sentence_ends = np.cumsum(block.sentence_lengths, dtype=np.int64).tolist()
    last_sentence = np.cumsum(block.sentences_per_document, dtype=np.int64)
    order = hash_order(stable_hash64(key, "documents"), len(document_ends))
    document_keys = hash_positions(stable_hash64(key, "shares"), len(document_ends)).tolist()
    cuts: list[tuple[int, int, int, int]] = []
    owners: list[int] = []
    shares: list[int] = []
    for index in order.tolist():
        stop = int(document_ends[index])
        start = stop - int(block.document_lengths[index])
        first = int(last_sentence[index]) - int(block.sentences_per_document[index])
        bits = document_keys[index]
        while start < stop:
            first = bisect_right(sentence_ends, start, lo=first)
            wanted, shorter = SHARE_OF_HASH[bits & 3], vary_lengths and bits & 12 == 0
            length = budget * (4 + (bits >> 4 & 15)) // 20 if shorter else budget
            bits = (bits >> 8) | ((bits & 255) << 56)  # eight draws before any repeats
            share, a_end, b_end = _cut_one(
                sentence_ends, first, (start, stop), (length, budget), wanted
            )
            cuts.append((start, a_end - start, a_end, b_end - a_end))
            owners.append(index)
            shares.append(share)
            start = b_end
    cut = np.array(cuts, dtype=np.int64).reshape(-1, 4)
    return cut, block.document_ids[np.array(owners, dtype=np.int64)], np.array(shares)


def _cut_one(
    ends: list[int], first: int, span: tuple[int, int], budgets: tuple[int, int], share: int
) -> tuple[int, int, int]:
    """The next pair of a document: (share used, end of A, end of B), as token offsets.

    ends: cumulative sentence ends; first: the sentence `span[0]` lies in; span: what is left;
    budgets: tokens the pair aims at, tokens it may have at most. A sentence that does not fit what
    is aimed at moves to a larger share, or to the full budget; only one that fits nowhere is cut.
    """
    start, stop = span
    budget, full_budget = budgets
    first_length = min(ends[first], stop) - start
    if first_length > int(budget * SHARES_OF_A[-1]):
        budget = full_budget
    while share + 1 < len(SHARES_OF_A) and first_length > int(budget * SHARES_OF_A[share]):
        share += 1
    a_limit = int(budget * SHARES_OF_A[share])
    b_limit = full_budget - int(full_budget * SHARES_OF_A[share])
    a_target = min(a_limit, max(1, (stop - start) * a_limit // budget))
    a_end = _last_end(ends, first, start + a_target)
    if a_end <= start:
        a_end = start + min(first_length, a_limit)
    if a_end >= stop:  # one sentence is all that is left: it is split in two
        length = stop - start
        if length == 1:
            return share, stop, stop
        a_end = start + max(length // 2, length - b_limit)
    for limit in (min(budget - a_limit, b_limit), b_limit):
        b_end = _last_end(ends, first, min(a_end + limit, stop))
        if b_end > a_end:
            return share, a_end, b_end
    return share, a_end, min(a_end + b_limit, stop)


def _last_end(ends: list[int], first: int, limit: int) -> int:
    """The last sentence end at or before `limit`, -1 when sentence `first` already ends beyond it."""
    index = bisect_right(ends, limit, lo=first) - 1
    return ends[index] if index >= first else -1


def _exchange(
    candidates: np.ndarray, document: np.ndarray, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """(receivers, givers): half of the candidates, and the pair whose B each of them gets.

    Every chosen pair gives its B once and receives one of another document: sorted by document and
    shifted by the largest document's count, no pair can meet its own. Pairs of a document that
    holds more than half of the chosen stay "next": within one document there is no random B to
    give.
    """
    num_chosen = (len(candidates) + (key & 1)) // 2  # the odd one out falls to either side by hash
    chosen = candidates[hash_order(key, len(candidates))[:num_chosen]]
    documents, group, counts = np.unique(document[chosen], return_inverse=True, return_counts=True)
    if len(documents) < 2:
        return chosen[:0], chosen[:0]
    largest = int(np.argmax(counts))
    excess = int(2 * counts[largest] - len(chosen))
    if excess > 0:
        keep = np.ones(len(chosen), dtype=bool)
        keep[np.flatnonzero(group == largest)[:excess]] = False
        chosen, group = chosen[keep], group[keep]
    group_order = hash_positions((key ^ 0xA5A5A5A5) & MASK64, len(documents))[group]
    receivers = chosen[np.argsort(group_order, kind="stable")]
    shift = int(np.bincount(group).max())
    return receivers, np.roll(receivers, -shift)
