"""A block's documents, cut, in, sentence pairs and what is asked of them out.

Each epoch uses every token of a block exactly once: documents are cut into consecutive (A, B)
pairs (data/cutting.py), and a "random" pair gets the B of another pair, which in turn gets
another's. Devlin et al. 2019 (appendix A.2) draw B from anywhere; here nothing is drawn twice.

What a label means:

    nsp         0 B follows A, 1 B is of another document (Devlin et al. 2019, 3.1)
    sop         0 A then B, 1 B then A (Lan et al. 2020, 3.1)
    order       0 B follows A, 1 B precedes A, 2 B is of another document (Wang et al. 2020, 2.2)
    distance    0 B follows A, 1 B is from elsewhere in the document, 2 of another (Sun et al. 2020, 4.2.2)

A pair is cut out of its document at any token, so that rows are full. Where A and B change places, what lies
outside their whole sentences stays where it is, at the row's two ends: else the half sentences would tell.
"""

from typing import NamedTuple

import numpy as np

from data.cutting import NUM_SPECIAL, Cut, Lengths, cut_documents
from data.hashing import hash_positions, mix64, stable_hash64
from data.objectives import PAIRED
from data.shards import Block

IS_NEXT, IS_RANDOM, UNLABELLED = 0, 1, -1  # as in transformers; UNLABELLED: nothing is asked
IS_SWAPPED = 1  # of sop
ORDER_NEXT, ORDER_PREVIOUS, ORDER_RANDOM = 0, 1, 2
DISTANCE_NEXT, DISTANCE_SAME_DOCUMENT, DISTANCE_RANDOM = 0, 1, 2
NSP = PAIRED.index("nsp")
THIRD = 1 / 3


class Pairs(NamedTuple):
    """All pairs of a block in reading order of its shuffled documents. All arrays are [num_pairs]."""

    a_start: np.ndarray  # int64: token offset in the block
    a_length: np.ndarray  # int64, at least 1
    b_start: np.ndarray  # int64
    b_length: np.ndarray  # int64; 0 where a single token was left: [CLS] A [SEP], no label
    label: np.ndarray  # int64: class of what is asked of the pair, or UNLABELLED
    row: np.ndarray  # int64: pairs of one row lie in it together
    is_swapped: np.ndarray  # bool: the whole sentences of B come before those of A

    @property
    def lengths(self) -> np.ndarray:
        """int64 [num_pairs]: row slots set aside for each pair, special tokens counted."""
        return self.a_length + self.b_length + np.where(self.b_length > 0, NUM_SPECIAL, 2)


def make_pairs(block: Block, sequence_length: int, packing: bool, key: int) -> Pairs:
    """Cut a block into rows of pairs, each row at most `sequence_length` slots; half get a random B.

    packing: several pairs may share a row, else each has its own. key: 64-bit address of this
    reading of the block (seed, source, epoch, block).
    """
    cut = cut_documents(block, Lengths.of(sequence_length), packing, key)
    return label_pairs(block, cut, np.full(len(cut.row), NSP), sentence_boundaries(block), key)


def sentence_boundaries(block: Block) -> np.ndarray:
    """int64 [num_sentences + 1], ascending: the token offsets at which sentences begin, and the end."""
    return np.concatenate([[0], np.cumsum(block.sentence_lengths, dtype=np.int64)])


def label_pairs(
    block: Block, cut: Cut, asked: np.ndarray, boundaries: np.ndarray, key: int
) -> Pairs:
    """Decide what each pair shows, and the answer to what is asked of it.

    asked: int64 [num_pairs], index into PAIRED, or -1 where nothing is asked: the pair then is the text as
    it stands. boundaries: of `sentence_boundaries`.
    """
    pairs = Pairs(
        cut.a_start, cut.a_length.copy(), cut.a_start + cut.a_length, cut.b_length.copy(),
        np.full(len(cut.row), UNLABELLED), cut.row, np.zeros(len(cut.row), dtype=bool),
    )  # fmt: skip
    documents = block.document_ids[cut.document]
    for index, name in enumerate(PAIRED):
        chosen = np.flatnonzero((asked == index) & (cut.b_length > 0))
        if len(chosen):
            own_key = stable_hash64(key, name)
            if name == "nsp":
                pairs.label[chosen] = IS_NEXT
                receivers = _give_other(pairs, cut.group, documents, chosen, 0.5, own_key)
                pairs.label[receivers] = IS_RANDOM
            elif name == "distance":
                _distance(pairs, cut.group, documents, chosen, own_key)
            else:
                chosen = chosen[num_inner_boundaries(pairs, chosen, boundaries) > 0]
                _order(pairs, cut.group, documents, chosen, (name, boundaries, own_key))
    return pairs


def num_inner_boundaries(pairs: Pairs, chosen: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """int64: sentence ends between the first and the last one within each pair, where it can be parted."""
    stop = pairs.a_start[chosen] + pairs.a_length[chosen] + pairs.b_length[chosen]
    first = np.searchsorted(boundaries, pairs.a_start[chosen])
    last = np.searchsorted(boundaries, stop, side="right") - 1
    return last - first - 1


def _give_other(
    pairs: Pairs,
    group: np.ndarray,
    document: np.ndarray,
    chosen: np.ndarray,
    share: float,
    key: int,
) -> np.ndarray:
    """Let a share of the chosen pairs exchange their B with pairs of other documents; those that did."""
    receivers, givers = _exchange(group[chosen], document[chosen], share, key)
    receivers, givers = chosen[receivers], chosen[givers]
    pairs.b_start[receivers], pairs.b_length[receivers] = (
        pairs.b_start[givers],
        pairs.b_length[givers],
    )
    return receivers


def _distance(
    pairs: Pairs, group: np.ndarray, document: np.ndarray, chosen: np.ndarray, key: int
) -> None:
    """A third gets a B of another document; of the rest, half one of the same document, where it has one."""
    pairs.label[chosen] = DISTANCE_NEXT
    receivers = _give_other(pairs, group, document, chosen, THIRD, stable_hash64(key, "other"))
    pairs.label[receivers] = DISTANCE_RANDOM
    rest = chosen[pairs.label[chosen] == DISTANCE_NEXT]
    both = np.stack([group[rest].astype(np.uint64), document[rest].astype(np.uint64)], axis=1)
    in_one = np.zeros(len(group), dtype=np.int64)
    in_one[rest] = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)
    every_pair = np.arange(len(group), dtype=np.uint64)  # each stands for a document of its own
    receivers = _give_other(pairs, in_one, every_pair, rest, 0.5, stable_hash64(key, "same"))
    pairs.label[receivers] = DISTANCE_SAME_DOCUMENT


def _order(
    pairs: Pairs,
    group: np.ndarray,
    document: np.ndarray,
    chosen: np.ndarray,
    what: tuple[str, np.ndarray, int],
) -> None:
    """sop: half of the pairs are swapped. order: a third each is as it is, swapped, and of two documents.

    The cut makes B longer than A on average, so half of all pairs, by hash, meet where that is the other
    way round, and half of those of two documents are swapped, too: no length tells a class.
    """
    name, boundaries, key = what
    hashes = hash_positions(key, len(pairs.row))[chosen]
    pairs.label[chosen] = ORDER_NEXT
    if name == "order":
        other = _give_other(pairs, group, document, chosen, THIRD, stable_hash64(key, "other"))
        pairs.label[other] = ORDER_RANDOM
        flips = _is_set(hash_positions(stable_hash64(key, "flip"), len(pairs.row))[other])
        swapped = other[flips & _can_swap(pairs, other, boundaries)]
        pairs.is_swapped[swapped] = True
        keep = pairs.label[chosen] != ORDER_RANDOM
        chosen, hashes = chosen[keep], hashes[keep]
    start, length = pairs.a_start[chosen], pairs.a_length[chosen]
    stop = start + length + pairs.b_length[chosen]
    mirrored = (hashes >> np.uint64(1)) & np.uint64(1) == 0
    met = _nearest_inner(np.where(mirrored, stop - length, start + length), start, stop, boundaries)
    pairs.a_length[chosen], pairs.b_start[chosen] = met - start, met
    pairs.b_length[chosen] = stop - met
    swapped = chosen[_is_set(hashes)]
    pairs.is_swapped[swapped] = True
    pairs.label[swapped] = IS_SWAPPED if name == "sop" else ORDER_PREVIOUS


def _is_set(hashes: np.ndarray) -> np.ndarray:
    return hashes & np.uint64(1) == 1


def _nearest_inner(
    wanted: np.ndarray, start: np.ndarray, stop: np.ndarray, boundaries: np.ndarray
) -> np.ndarray:
    """The sentence end nearest to `wanted` that has a whole sentence of [start, stop) on either side."""
    first = np.searchsorted(boundaries, start)
    last = np.searchsorted(boundaries, stop, side="right") - 1
    after = np.searchsorted(boundaries, wanted).clip(1, len(boundaries) - 1)
    nearer = wanted - boundaries[after - 1] < boundaries[after] - wanted
    return boundaries[np.clip(after - nearer, first + 1, last - 1)]


def whole_sentences(
    pairs: Pairs, chosen: np.ndarray, boundaries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(where the first sentence of A begins, where the last one of B ends): token offsets of the block."""
    b_stop = pairs.b_start[chosen] + pairs.b_length[chosen]
    first = boundaries[np.searchsorted(boundaries, pairs.a_start[chosen])]
    last = boundaries[np.searchsorted(boundaries, b_stop, side="right") - 1]
    return first, last


def _can_swap(pairs: Pairs, chosen: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """bool: A and B each have a whole sentence."""
    first, last = whole_sentences(pairs, chosen, boundaries)
    return (first < pairs.a_start[chosen] + pairs.a_length[chosen]) & (last > pairs.b_start[chosen])


def _exchange(
    group: np.ndarray, document: np.ndarray, share: float, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """(receivers, givers): a share of the pairs, and for each the pair whose B it gets; int64 indices.

    group, document: [num_pairs]. Every chosen pair gives its B once and receives one of another
    document of its group: with a group sorted by document and shifted by its largest document's
    count, no pair can meet its own. Pairs of a document that holds more than half of a group's
    chosen stay "next": within one document there is no random B to give.
    """
    hashes = hash_positions(key, len(group))
    order = np.lexsort((hashes, group))
    starts, counts = _runs(group[order])
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    wanted = _num_chosen(group[order][starts], counts, share, key)
    chosen = order[rank < np.repeat(wanted, counts)]
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


def _num_chosen(groups: np.ndarray, counts: np.ndarray, share: float, key: int) -> np.ndarray:
    """int64 [num_groups]: that share of each group, rounded by hash so that it is right on average.

    One pair alone cannot exchange: groups of one take no part, and the others a little more.
    """
    counts = counts.astype(np.float64)
    share = min(1.0, share * counts.sum() / max(1.0, counts[counts > 1].sum()))
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
