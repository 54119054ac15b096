"""A block's documents, cut, in, sentence pairs and what is asked of them out.

Each epoch uses every token of a block exactly once: documents are cut into consecutive (A, B)
pairs (data/cutting.py), and a "random" pair gets the B of another pair, which in turn gets
another's. Devlin et al. 2019 (appendix A.2) draw B from anywhere; here nothing is drawn twice.

What a label means:

    nsp         0 B follows A, 1 B is of another document (Devlin et al. 2019, 3.1)
    sop         0 A then B, 1 B then A (Lan et al. 2020, 3.1)
    order       0 B follows A, 1 B precedes A, 2 B is of another document (Wang et al. 2020, 2.2)
    distance    0 B follows A, 1 B comes later in the document, 2 B is of another (Sun et al. 2020, 4.2.2)

Nothing but the text tells a class: neither lengths nor where sentences are cut. A pair is cut out of its
document at any token, so that rows are full. Where A and B change places, what lies outside their whole
sentences stays where it is, at the sequence's two ends: else the half sentences would tell. A pair of which
not every class could be made is left unlabelled.
"""

from typing import NamedTuple

import numpy as np

from data.cutting import NUM_SPECIAL, SHARES_OF_A, Cut, Lengths, cut_documents, meeting
from data.hashing import hash_positions, mix64, stable_hash64
from data.objectives import PAIRED
from data.shards import Block

IS_NEXT, IS_RANDOM, UNLABELLED = 0, 1, -1  # as in transformers; UNLABELLED: nothing is asked
IS_SWAPPED = 1  # of sop
ORDER_NEXT, ORDER_PREVIOUS, ORDER_RANDOM = 0, 1, 2
DISTANCE_NEXT, DISTANCE_LATER, DISTANCE_RANDOM = 0, 1, 2
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
    is_swapped: np.ndarray  # bool. sop, order: the whole sentences of B come before those of A;
    # distance: the first half of A is shown before B, and not the second

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


class _Labelling(NamedTuple):
    """What the labels of a block's pairs are made from. All arrays but boundaries are [num_pairs]."""

    pairs: Pairs  # changed in place
    group: np.ndarray  # int64: pairs of one group may exchange their B
    document: np.ndarray  # uint64: id of the document that each is of
    boundaries: np.ndarray  # of `sentence_boundaries`


def label_pairs(
    block: Block, cut: Cut, asked: np.ndarray, boundaries: np.ndarray, key: int
) -> Pairs:
    """Decide what each pair shows, and the answer to what is asked of it.

    asked: int64 [num_pairs], index into PAIRED, or -1 where nothing is asked: the pair then is the text as
    it stands. boundaries: of `sentence_boundaries`; nsp needs none.
    """
    pairs = Pairs(
        cut.a_start, cut.a_length.copy(), cut.a_start + cut.a_length, cut.b_length.copy(),
        np.full(len(cut.row), UNLABELLED), cut.row, np.zeros(len(cut.row), dtype=bool),
    )  # fmt: skip
    labelling = _Labelling(pairs, cut.group, block.document_ids[cut.document], boundaries)
    for index, name in enumerate(PAIRED):
        is_chosen = asked == index
        chosen = np.flatnonzero(is_chosen & (cut.b_length > 0))
        if len(chosen):
            own_key = stable_hash64(key, name)
            if name == "nsp":
                _nsp(labelling, chosen, bool(is_chosen.all()), own_key)
            elif name == "sop":
                _sop(labelling, chosen, own_key)
            elif name == "order":
                _order(labelling, chosen, own_key)
            else:
                _distance(labelling, chosen, own_key)
    return pairs


def _nsp(labelling: _Labelling, chosen: np.ndarray, is_whole_block: bool, key: int) -> None:
    """Half get a random B.

    Where every pair of the block is asked, nearly all find a partner, and the few others are labelled, too.
    """
    if not is_whole_block:
        chosen = chosen[_has_partner(labelling.group[chosen], labelling.document[chosen])]
    labelling.pairs.label[chosen] = IS_NEXT
    receivers = _give_other(labelling, chosen, 0.5, key)
    labelling.pairs.label[receivers] = IS_RANDOM


def _sop(labelling: _Labelling, chosen: np.ndarray, key: int) -> None:
    """Half are swapped. A and B meet at any inner sentence end alike, so no length tells which."""
    pairs, _, _, boundaries = labelling
    hashes = hash_positions(key, len(pairs.row))
    start, stop = _ends(pairs)
    chosen = chosen[num_inner_boundaries(start[chosen], stop[chosen], boundaries) > 0]
    start, stop, hashes = start[chosen], stop[chosen], hashes[chosen]
    _meet(pairs, chosen, any_inner_boundary(start, stop, boundaries, hashes >> np.uint64(1)))
    pairs.is_swapped[chosen] = _is_set(hashes)
    pairs.label[chosen] = np.where(_is_set(hashes), IS_SWAPPED, ORDER_NEXT)


def _order(labelling: _Labelling, chosen: np.ndarray, key: int) -> None:
    """A third gets a B of another document; half of the rest is swapped.

    The first segment of a swapped pair ends where the cut would have ended it, had the sentences stood in the
    order in which they are shown. So it is as long in all three classes, if both that end and the pair's own
    leave whole sentences on either side; other pairs are not asked.
    """
    pairs, group, document, boundaries = labelling
    start, stop = _ends(pairs)
    hashes = hash_positions(key, len(pairs.row))
    first, last = whole_sentences(pairs, chosen, boundaries)
    own = pairs.b_start[chosen]
    is_inner = (own > first) & (own < last) & (boundaries[np.searchsorted(boundaries, own)] == own)
    chosen = chosen[is_inner]
    swapped_meeting = np.array(
        [
            _meeting_if_swapped(boundaries, *pair)
            for pair in zip(
                start[chosen].tolist(), stop[chosen].tolist(), hashes[chosen].tolist(), strict=True
            )
        ],
        dtype=np.int64,
    )
    chosen, swapped_meeting = chosen[swapped_meeting > 0], swapped_meeting[swapped_meeting > 0]
    has_partner = _has_partner(group[chosen], document[chosen])
    chosen, swapped_meeting = chosen[has_partner], swapped_meeting[has_partner]
    pairs.label[chosen] = ORDER_NEXT
    receivers = _give_other(labelling, chosen, THIRD, stable_hash64(key, "other"))
    pairs.label[receivers] = ORDER_RANDOM
    is_swapped = _is_set(hashes[chosen]) & (pairs.label[chosen] == ORDER_NEXT)
    _meet(pairs, chosen[is_swapped], swapped_meeting[is_swapped])
    pairs.is_swapped[chosen[is_swapped]] = True
    pairs.label[chosen[is_swapped]] = ORDER_PREVIOUS


def _meeting_if_swapped(boundaries: np.ndarray, start: int, stop: int, bits: int) -> int:
    """Where A ends and B begins, so that the cut's own rule ends the first segment of the swapped pair.

    start, stop: of the pair; bits: 64, what A's share is drawn by. 0 where A or B has no whole sentence.
    """
    first = np.searchsorted(boundaries, start)
    last = np.searchsorted(boundaries, stop, side="right") - 1
    inner = boundaries[first : last + 1]
    head = int(inner[0]) - start  # of the sentence that the pair begins in
    shown_ends = (
        head + int(inner[-1]) - inner[::-1]
    )  # head, then the sentences from the last one on
    ends = shown_ends[0 if head else 1 :].tolist()
    share = SHARES_OF_A[bits >> 1 & 3]
    end = meeting(ends, 0, 0, stop - start, share)
    found = int(inner[-1]) + head - end
    is_inner = inner[0] < found < inner[-1] and found in inner
    return found if is_inner else 0


def _distance(labelling: _Labelling, chosen: np.ndarray, key: int) -> None:
    """A third gets a B of another document. Of A, one half is shown before B: the one that it follows, or not.

    A's sentences are as long on either side of where it is parted; B's are not, for a long one often begins it.
    """
    pairs, group, document, boundaries = labelling
    start, stop = pairs.a_start[chosen], pairs.b_start[chosen]
    is_sentence_end = boundaries[np.searchsorted(boundaries, stop)] == stop
    chosen = chosen[is_sentence_end & (num_inner_boundaries(start, stop, boundaries) > 0)]
    chosen = chosen[_has_partner(group[chosen], document[chosen])]
    hashes = hash_positions(key, len(pairs.row))[chosen]
    pairs.is_swapped[chosen] = _is_set(hashes)
    pairs.label[chosen] = np.where(_is_set(hashes), DISTANCE_LATER, DISTANCE_NEXT)
    receivers = _give_other(labelling, chosen, THIRD, stable_hash64(key, "other"))
    pairs.label[receivers] = DISTANCE_RANDOM


def _give_other(labelling: _Labelling, chosen: np.ndarray, share: float, key: int) -> np.ndarray:
    """Let a share of the chosen pairs exchange their B with pairs of other documents; those that did."""
    pairs, group, document, _ = labelling
    receivers, givers = _exchange(group[chosen], document[chosen], share, key)
    receivers, givers = chosen[receivers], chosen[givers]
    pairs.b_start[receivers], pairs.b_length[receivers] = (
        pairs.b_start[givers],
        pairs.b_length[givers],
    )
    return receivers


def _has_partner(group: np.ndarray, document: np.ndarray) -> np.ndarray:
    """bool: pairs whose group has another document. Else rare lengths would tell that B is the pair's own."""
    groups, index = np.unique(group, return_inverse=True)
    least = np.full(len(groups), np.iinfo(np.uint64).max)
    most = np.zeros(len(groups), dtype=np.uint64)
    np.minimum.at(least, index, document)
    np.maximum.at(most, index, document)
    return (least < most)[index]


def _ends(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """(start, stop): token offsets of all pairs whose B is their own."""
    return pairs.a_start, pairs.b_start + pairs.b_length


def _meet(pairs: Pairs, chosen: np.ndarray, at: np.ndarray) -> None:
    """Let A of the chosen pairs end, and B begin, elsewhere."""
    stop = pairs.b_start[chosen] + pairs.b_length[chosen]
    pairs.a_length[chosen] = at - pairs.a_start[chosen]
    pairs.b_start[chosen], pairs.b_length[chosen] = at, stop - at


def _is_set(hashes: np.ndarray) -> np.ndarray:
    return hashes & np.uint64(1) == 1


def num_inner_boundaries(start: np.ndarray, stop: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """int64: sentence ends between the first and the last one in [start, stop), where it can be parted."""
    first = np.searchsorted(boundaries, start)
    return np.searchsorted(boundaries, stop, side="right") - 2 - first


def any_inner_boundary(
    start: np.ndarray, stop: np.ndarray, boundaries: np.ndarray, hashes: np.ndarray
) -> np.ndarray:
    """One of those sentence ends, of which there must be one, all with the same chance by hash."""
    count = num_inner_boundaries(start, stop, boundaries).astype(np.uint64)
    return boundaries[np.searchsorted(boundaries, start) + 1 + (hashes % count).astype(np.int64)]


def whole_sentences(
    pairs: Pairs, chosen: np.ndarray, boundaries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(where the first sentence of A begins, where the last one of B ends): token offsets of the block."""
    b_stop = pairs.b_start[chosen] + pairs.b_length[chosen]
    first = boundaries[np.searchsorted(boundaries, pairs.a_start[chosen])]
    last = boundaries[np.searchsorted(boundaries, b_stop, side="right") - 1]
    return first, last


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
