"""A block's document and sentence lengths in, where its documents are cut into pairs, row by row, out.

Documents come in hashed order. What is longer than a row is cut into pairs that fill one each; what
is left of a document goes into the room that an earlier one has left in its row, whole if it fits,
else in two pieces. So rows are full without any search over all pairs, and a document is cut more
often than it must be only when rows would stay empty otherwise. Within a pair, A and B meet at a
sentence end; its outer ends lie wherever the room ends, as in Devlin et al. 2019 (appendix A.2).
"""

from bisect import bisect_left, bisect_right, insort
from typing import NamedTuple

import numpy as np

from data.hashing import hash_order, hash_positions, stable_hash64
from data.shards import Block

NUM_SPECIAL = 3  # [CLS] A [SEP] B [SEP]
SHARES_OF_A = (0.25, 0.5, 0.5, 0.75)  # A's share of a pair, by two bits of hash
MAX_OPEN_ROWS = 4  # more: fewer documents cut, fewer rows full


class Lengths(NamedTuple):
    """What decides where documents are cut, in tokens. All follow from the row's slots."""

    slots: int  # of a row
    grid: (
        int  # B's length is a multiple of this, or rounded up to one when room is set aside for it
    )
    least: int  # the shortest piece that is cut off on purpose, and the shortest rest

    @classmethod
    def of(cls, sequence_length: int) -> "Lengths":
        return cls(sequence_length, max(1, sequence_length // 128), max(1, sequence_length // 32))


class Cut(NamedTuple):
    """All pairs of a block before any B is exchanged. All arrays are int64 [num_pairs]."""

    a_start: np.ndarray  # token offset in the block
    a_length: np.ndarray  # at least 1
    b_length: np.ndarray  # B follows A; 0 where a document has a single token left
    group: np.ndarray  # pairs of one group may exchange their B: it fits, and no length tells of it
    row: np.ndarray  # which row the pair lies in, counted in the order of opening
    document: np.ndarray  # which document of the block


def cut_documents(block: Block, lengths: Lengths, packing: bool, key: int) -> Cut:
    """Cut every document of a block and deal the pairs to rows. Only lengths are read, no token.

    packing: several pairs may share a row, else each has its own. key: 64 bits, the address of this
    reading of the block.
    """
    document_ends = np.cumsum(block.document_lengths, dtype=np.int64).tolist()
    sentence_ends = np.cumsum(block.sentence_lengths, dtype=np.int64).tolist()
    last_sentences = np.cumsum(block.sentences_per_document, dtype=np.int64).tolist()
    order = hash_order(stable_hash64(key, "documents"), len(document_ends)).tolist()
    document_bits = hash_positions(stable_hash64(key, "shares"), len(document_ends)).tolist()
    rows = _Rows(lengths, MAX_OPEN_ROWS if packing else 0)
    pairs: list[tuple[int, int, int, int, int, int]] = []
    for index in order:
        start = document_ends[index - 1] if index else 0
        stop = document_ends[index]
        first = last_sentences[index - 1] if index else 0
        bits = document_bits[index]
        while start < stop:
            first = bisect_right(sentence_ends, start, lo=first)
            room, row, length = rows.take(stop - start)
            a_end = meeting(sentence_ends, first, start, length, SHARES_OF_A[bits & 3])
            b_length, set_aside, group = _second(
                start + length - a_end, stop == start + length, lengths
            )
            pairs.append((start, a_end - start, b_length, group, row, index))
            rows.give_back(room - (a_end - start) - set_aside - NUM_SPECIAL, row)
            start = a_end + b_length
            bits = bits >> 2 | (bits & 3) << 62
    return Cut(*np.array(pairs, dtype=np.int64).reshape(-1, 6).T)


def _second(length: int, is_tail: bool, lengths: Lengths) -> tuple[int, int, int]:
    """(length of B, slots set aside for it, group) where `length` tokens are there for B.

    The end of a document is as long as it is, and gives way to any B of its group, all of which fit
    into what is set aside. Elsewhere B is cut to the grid, so that a group has equal B's only.
    """
    if is_tail:
        steps = -(-length // lengths.grid)
        return length, steps * lengths.grid, -1 - steps
    steps = length // lengths.grid
    return steps * lengths.grid, steps * lengths.grid, steps


class _Rows:
    """Rows with room left, and the decision how much of a document goes into which. final."""

    def __init__(self, lengths: Lengths, max_open: int) -> None:
        self._lengths, self._max_open = lengths, max_open
        self._open: list[tuple[int, int]] = []  # (room in slots, row), ascending
        self._num_rows = 0

    def take(self, rest: int) -> tuple[int, int, int]:
        """(room, row, tokens to put there) for a document with `rest` tokens left."""
        slots, grid, least = self._lengths
        needed = rest + NUM_SPECIAL + grid - 1
        if needed <= slots:
            fitting = bisect_left(self._open, (needed, 0))
            if fitting < len(self._open):
                return *self._open.pop(fitting), rest
            if len(self._open) < self._max_open or not self._worthwhile(rest):
                return slots, self._new(), rest
        elif rest >= slots - NUM_SPECIAL + least:
            return slots, self._new(), slots - NUM_SPECIAL
        elif not self._worthwhile(rest):  # a little too long for a row: halve it
            return slots, self._new(), rest // 2
        room, row = self._open.pop()
        return room, row, room - NUM_SPECIAL

    def _worthwhile(self, rest: int) -> bool:
        """Whether the widest room takes a piece off `rest` that leaves neither too short."""
        least = self._lengths.least
        piece = self._open[-1][0] - NUM_SPECIAL if self._open else 0
        return piece >= least and rest - piece >= least

    def _new(self) -> int:
        self._num_rows += 1
        return self._num_rows - 1

    def give_back(self, room: int, row: int) -> None:
        """Keep a row's room for later, if it is worth it; the narrowest row is closed for it."""
        if self._max_open and room >= self._lengths.least + NUM_SPECIAL:
            insort(self._open, (room, row))
            if len(self._open) > self._max_open:
                self._open.pop(0)


def meeting(ends: list[int], first: int, start: int, length: int, share: float) -> int:
    """Where A ends and B begins: the last sentence end within A's share of a pair, else the next one.

    ends: cumulative sentence ends; first: the sentence that `start` lies in. A sentence that leaves
    no room for B behind it is cut, at A's share; a single token is all A.
    """
    if length == 1:
        return start + 1
    wanted = max(1, int(length * share))
    index = bisect_right(ends, start + wanted, lo=first)
    if index > first:
        return ends[index - 1]
    end = ends[first]
    return end if end - start <= length * SHARES_OF_A[-1] else start + wanted
