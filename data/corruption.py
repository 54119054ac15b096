"""Assembled rows in, what else is asked of their tokens out: moved tokens, and those that come next."""

from typing import NamedTuple

import numpy as np

from data.hashing import mix64, stable_hash64
from data.masking import Text, hash_slots

WORD_ORDER_SHARE = 0.05  # of the runs of three (Wang et al. 2020, 2.1)
RUN = 3
MOVES = np.array([(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])  # all but leaving it


def move_tokens(
    ids: np.ndarray, text: Text, share: np.ndarray, is_free: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reorder the tokens of some runs of three, in place (Wang et al. 2020, 2.1).

    share: float64 [num_rows], of the runs of each row. is_free: bool, for each of text.slots: may be moved.
    Runs lie side by side, never across a special token. Returns (slots int64, three of each run; labels uint32:
    what stood there).
    """
    slots, row_starts, keys = text
    num_text = np.diff(np.searchsorted(slots, row_starts))
    row = np.repeat(np.arange(len(num_text)), num_text)
    begins = np.ones(len(slots), dtype=bool)
    begins[1:] = (slots[1:] != slots[:-1] + 1) | (row[1:] != row[:-1])
    place = np.arange(len(slots)) - np.maximum.accumulate(
        np.where(begins, np.arange(len(slots)), 0)
    )
    firsts = np.flatnonzero(place % RUN == 0)
    firsts = firsts[firsts + RUN <= len(slots)]
    # all three in one stretch of text, and free
    firsts = firsts[place[firsts + RUN - 1] == place[firsts] + RUN - 1]
    runs = firsts[:, None] + np.arange(RUN)
    runs = runs[is_free[runs].all(axis=1)]
    row_of = row[runs[:, 0]]
    hashes = hash_slots(
        keys[row_of] ^ np.uint64(stable_hash64("word order")),
        (slots[runs[:, 0]] - row_starts[row_of]).astype(np.uint64),
    )
    moved = (hashes >> np.uint64(11)) * 2.0**-53 < share[row_of]
    at = slots[runs[moved]]  # [number of runs, RUN]
    moves = MOVES[(mix64(hashes[moved]) % np.uint64(len(MOVES))).astype(np.int64)]
    labels = ids[at]
    ids[at] = np.take_along_axis(labels, moves, axis=1)
    return at.ravel(), labels.ravel()


class Causal(NamedTuple):
    """What sequences predict token by token, and how far each slot sees."""

    slots: np.ndarray  # int64, ascending: where the next token is asked for
    labels: np.ndarray  # uint32: that token
    seen: (
        np.ndarray
    )  # int64 [num_slots]: the last slot that each one attends to, in its own sequence


def next_tokens(
    ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, prefixes: np.ndarray
) -> Causal:
    """Ask for the next token behind the prefix of every sequence; what follows a prefix sees no later token.

    ids: uint32 [num_slots]; starts, lengths: int64 [number of sequences], in slots, side by side. prefixes:
    int64 [number of sequences], the last slot of each prefix, counted in its sequence; -1: nothing is asked,
    and all is seen.
    """
    place = np.arange(len(ids)) - np.repeat(starts, lengths)
    last = np.repeat(lengths - 1, lengths)
    prefix = np.repeat(prefixes, lengths)
    asked = (prefix >= 0) & (place >= prefix) & (place < last)
    slots = np.flatnonzero(asked)
    seen = np.where(prefix >= 0, np.maximum(place, prefix), last) + np.repeat(starts, lengths)
    return Causal(slots, ids[slots + 1], seen)
