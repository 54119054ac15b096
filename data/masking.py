"""Assembled rows in, masked rows and their labels out: which tokens are hidden, and by what.

Masks come from integer hashes of the row's address, so a row has the same mask on every machine and
after every resume, and a new one in each epoch (dynamic masking, Liu et al. 2019, section 4.1).
"""

from typing import NamedTuple

import numpy as np

from data.hashing import GOLDEN, hash_positions, mix64

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # the rest keeps its token (Devlin et al. 2019, appendix A.1)
HASH_SHIFT = 24  # tokens are chosen by the upper 40 bits of their hash; ties by position


class Vocabulary(NamedTuple):
    """What masking must know of a tokenizer."""

    mask_id: int
    cls_id: int
    sep_id: int
    pad_id: int
    regular_ids: np.ndarray  # uint32 [num_regular]: every id that is not a special token

    @classmethod
    def of(cls, special_ids: dict[str, int], vocab_size: int) -> "Vocabulary":
        regular_ids = np.setdiff1d(
            np.arange(vocab_size, dtype=np.uint32), list(special_ids.values())
        )
        return cls(
            mask_id=special_ids["[MASK]"],
            cls_id=special_ids["[CLS]"],
            sep_id=special_ids["[SEP]"],
            pad_id=special_ids["[PAD]"],
            regular_ids=regular_ids.astype(np.uint32),
        )


def mask_row(
    ids: np.ndarray, maskable: np.ndarray, fraction: float, vocabulary: Vocabulary, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hide a fixed share of a row's tokens, in place: 80 % [MASK], 10 % another token, 10 % kept.

    ids: uint32 [num_tokens], changed in place; maskable: bool [num_tokens], False at special
    tokens. Exactly round(fraction x maskable tokens) are chosen, at least one where there is any,
    so that the heads see nearly equal work in every row: those with the smallest hashes. Returns
    (positions int64 [num_masked], ascending; labels uint32 [num_masked], the tokens that stood
    there). (Devlin et al. 2019, section 3.1.)
    """
    candidates = np.flatnonzero(maskable)
    if len(candidates) == 0:
        return candidates, ids[:0].copy()
    hashes = hash_positions(key, len(ids))[candidates]
    num_masked = max(1, round(fraction * len(candidates)))
    by_hash = np.argsort(hashes >> np.uint64(HASH_SHIFT), kind="stable")
    chosen = np.sort(by_hash[:num_masked])
    positions = candidates[chosen]
    labels = ids[positions].copy()
    ids[positions] = _shown(labels, hashes[chosen], vocabulary)
    return positions, labels


def mask_rows(
    ids: np.ndarray,
    text: np.ndarray,
    row_starts: np.ndarray,
    fraction: float,
    vocabulary: Vocabulary,
    keys: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`mask_row` on many rows at once, which lie one after the other; the same result.

    ids: uint32 [num_slots], changed in place; text: int64 [num_text], ascending, the slots that may
    be masked; row_starts: int64 [num_rows + 1], at most 256 rows of at most 65536 slots; keys:
    uint64 [num_rows]. Returns (slots int64 [num_masked], ascending; labels uint32 [num_masked];
    how many are in each row, int64 [num_rows]).
    """
    text_starts = np.searchsorted(text, row_starts)
    num_text = np.diff(text_starts)
    position = (text - np.repeat(row_starts[:-1], num_text)).view(np.uint64)
    hashes = _hashes(np.repeat(keys, num_text), position)
    # one sort for all rows: by row, then hash, then position, which it carries along
    hashes >>= np.uint64(HASH_SHIFT)
    hashes <<= np.uint64(16)
    hashes |= position
    hashes |= np.repeat(np.arange(len(num_text), dtype=np.uint64) << np.uint64(56), num_text)
    hashes.sort()
    num_masked = np.maximum(np.rint(fraction * num_text).astype(np.int64), np.minimum(num_text, 1))
    ends = np.cumsum(num_masked)
    row = np.repeat(np.arange(len(num_masked)), num_masked)
    taken = np.arange(len(row)) + (text_starts[:-1] - (ends - num_masked))[row]
    slots = np.sort((hashes[taken] & np.uint64(0xFFFF)).astype(np.int64) + row_starts[row])
    labels = ids[slots]
    chosen = _hashes(keys[row], (slots - row_starts[row]).astype(np.uint64))
    ids[slots] = _shown(labels, chosen, vocabulary)
    return slots, labels, num_masked


def _hashes(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint64: what `hash_positions(key, ...)` gives at each position."""
    steps = positions + np.uint64(1)
    steps *= np.uint64(GOLDEN)
    steps += keys
    return mix64(steps)


def _shown(labels: np.ndarray, hashes: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """uint32: what stands in the place of each chosen token."""
    hashes = mix64(hashes ^ np.uint64(0x5851F42D4C957F2D))
    action = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    regular = vocabulary.regular_ids
    others = regular[(mix64(hashes) % np.uint64(len(regular))).astype(np.int64)]
    mask = np.uint32(vocabulary.mask_id)
    return np.where(
        action < MASK_SHARE, mask, np.where(action < MASK_SHARE + RANDOM_SHARE, others, labels)
    )
