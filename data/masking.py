"""One assembled row in, the masked row and its labels out: which tokens are hidden, and by what.

Masks come from integer hashes of the row's address, so a row has the same mask on every machine and
after every resume, and a new one in each epoch (dynamic masking, Liu et al. 2019, section 4.1).
"""

from typing import NamedTuple

import numpy as np

from data.hashing import hash_positions, mix64

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # the rest keeps its token (Devlin et al. 2019, appendix A.1)


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
    so that the heads see nearly equal work in every row. Returns (positions int64 [num_masked],
    ascending; labels uint32 [num_masked], the tokens that stood there). (Devlin et al. 2019,
    section 3.1.)
    """
    candidates = np.flatnonzero(maskable)
    if len(candidates) == 0:
        return candidates, ids[:0].copy()
    num_masked = max(1, round(fraction * len(candidates)))
    hashes = hash_positions(key, len(ids))[candidates]
    chosen = np.sort(np.argpartition(hashes, num_masked - 1)[:num_masked])
    positions = candidates[chosen]
    labels = ids[positions].copy()
    action_hashes = mix64(hashes[chosen] ^ np.uint64(0x5851F42D4C957F2D))
    action = (action_hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    random_index = (mix64(action_hashes) % np.uint64(len(vocabulary.regular_ids))).astype(np.int64)
    replaced = np.where(
        action < MASK_SHARE,
        np.uint32(vocabulary.mask_id),
        np.where(action < MASK_SHARE + RANDOM_SHARE, vocabulary.regular_ids[random_index], labels),
    )
    ids[positions] = replaced
    return positions, labels
