"""Assembled rows in, masked rows and their labels out: which tokens are hidden, and by what.

Masks come from integer hashes of the row's address, so a row has the same mask on every machine and
after every resume, and a new one in each epoch (dynamic masking, Liu et al. 2019, section 4.1).
"""

from typing import NamedTuple

import numpy as np

from data.hashing import GOLDEN, hash_positions, mix64

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # the rest keeps its token (Devlin et al. 2019, appendix A.1)
HASH_SHIFT = 24  # tokens are chosen by the upper 40 bits of their hash; ties by position
MAX_SPAN = 10  # words (Joshi et al. 2020, 3.1)
GEOMETRIC = 0.2  # their p: a span goes on with a probability of 0.8
NGRAM_SHARES = (0.4, 0.3, 0.2, 0.1)  # of runs of 1, 2, 3 and 4 words (Cui et al. 2020, 3.2)


class Masking(NamedTuple):
    """How much of a row is hidden, and what is shown instead."""

    fraction: float  # of the tokens of a row
    mask_share: float = MASK_SHARE  # of the hidden ones, shown as [MASK]
    random_share: float = RANDOM_SHARE  # shown as another token; the rest is shown as it is


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
    ids: np.ndarray, maskable: np.ndarray, masking: Masking, vocabulary: Vocabulary, key: int
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
    num_masked = max(1, round(masking.fraction * len(candidates)))
    by_hash = np.argsort(hashes >> np.uint64(HASH_SHIFT), kind="stable")
    chosen = np.sort(by_hash[:num_masked])
    positions = candidates[chosen]
    labels = ids[positions].copy()
    ids[positions] = shown_instead(labels, hashes[chosen], masking, vocabulary)
    return positions, labels


class Text(NamedTuple):
    """The slots of some rows that may be hidden. The rows lie one after the other."""

    slots: np.ndarray  # int64 [num_text], ascending
    row_starts: np.ndarray  # int64 [num_rows + 1]: at most 256 rows of at most 65536 slots
    keys: np.ndarray  # uint64 [num_rows]: what each row's masks are drawn from

    def of_rows(self, is_chosen: np.ndarray) -> "Text":
        """The text of some of the rows. is_chosen: bool [num_rows]."""
        counts = np.diff(np.searchsorted(self.slots, self.row_starts))
        return self._replace(slots=self.slots[np.repeat(is_chosen, counts)])


def mask_rows(
    ids: np.ndarray, text: Text, masking: Masking, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """`mask_row` on many rows at once; the same result.

    ids: uint32 [num_slots], changed in place. Returns (slots int64 [num_masked], ascending; labels uint32
    [num_masked]).
    """
    slots, row_starts, keys = text
    text_starts = np.searchsorted(slots, row_starts)
    num_text = np.diff(text_starts)
    position = (slots - np.repeat(row_starts[:-1], num_text)).view(np.uint64)
    hashes = hash_slots(np.repeat(keys, num_text), position)
    # one sort for all rows: by row, then hash, then position, which it carries along
    hashes >>= np.uint64(HASH_SHIFT)
    hashes <<= np.uint64(16)
    hashes |= position
    hashes |= np.repeat(np.arange(len(num_text), dtype=np.uint64) << np.uint64(56), num_text)
    hashes.sort()
    num_masked = _budget(num_text, masking.fraction)
    ends = np.cumsum(num_masked)
    row = np.repeat(np.arange(len(num_masked)), num_masked)
    taken = np.arange(len(row)) + (text_starts[:-1] - (ends - num_masked))[row]
    masked = np.sort((hashes[taken] & np.uint64(0xFFFF)).astype(np.int64) + row_starts[row])
    labels = ids[masked]
    chosen = hash_slots(keys[row], (masked - row_starts[row]).astype(np.uint64))
    ids[masked] = shown_instead(labels, chosen, masking, vocabulary)
    return masked, labels


def _budget(num_text: np.ndarray, fraction: float) -> np.ndarray:
    """int64: how many tokens of each row are hidden, at least one where there is any."""
    return np.maximum(np.rint(fraction * num_text).astype(np.int64), np.minimum(num_text, 1))


def mask_spans(
    ids: np.ndarray,
    text: Text,
    is_word_start: np.ndarray,
    kind: str,
    masking: Masking,
    vocabulary: Vocabulary,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide whole words, or runs of them, until a row's share of tokens is reached; as `mask_rows` else.

    is_word_start: bool, for each of text.slots. kind: "wwm" one word at a time, "span" runs of geometric
    length, "ngram" runs of 1 to 4.

    Runs are drawn in the order of their first words' hashes, and may overlap; none reaches over a special
    token. The last one is hidden if that brings the row nearer to its share. What is shown is drawn for each
    token, of "span" for a whole run (Joshi et al. 2020, 3.1).
    """
    slots, row_starts, keys = text
    begins = np.ones(len(slots), dtype=bool)  # of a row, or behind a special token
    np.not_equal(slots[1:], slots[:-1] + 1, out=begins[1:])
    words = np.flatnonzero(is_word_start | begins)  # [W], into text.slots
    sizes = np.diff(words, append=len(slots))
    text_starts = np.searchsorted(slots, row_starts)
    bounds = np.searchsorted(words, text_starts)
    row = np.repeat(np.arange(len(keys)), np.diff(bounds))
    hashes = hash_slots(keys[row], (slots[words] - row_starts[row]).astype(np.uint64))
    # one sort for all rows: by row, then hash, then word, which it carries along
    by_hash = (hashes >> np.uint64(HASH_SHIFT)) << np.uint64(16)
    by_hash |= (np.arange(len(words)) - bounds[row]).astype(np.uint64)
    by_hash |= row.astype(np.uint64) << np.uint64(56)
    by_hash.sort()
    order = (by_hash & np.uint64(0xFFFF)).astype(np.int64) + bounds[row]
    # runs before one hide their first words at least: if these reach the budget, it is not hidden
    budget = _budget(np.diff(text_starts), masking.fraction)
    is_drawn = np.cumsum(sizes[order]) - sizes[order] < (budget + text_starts[:-1])[row]
    drawn = order[is_drawn]
    stretches = np.append(np.flatnonzero(begins[words]), len(words))
    left = stretches[np.searchsorted(stretches, drawn, side="right")] - drawn
    lengths = np.minimum(_run_lengths(hashes[drawn], kind), left)
    run_of = _run_of_words(drawn, lengths, len(words))
    hidden = np.flatnonzero(run_of >= 0)
    is_hidden = _first_runs(run_of[hidden], sizes[hidden], row[drawn], budget)
    hidden = hidden[is_hidden[run_of[hidden]]]
    num_tokens = sizes[hidden]
    inner = np.arange(int(num_tokens.sum())) - np.repeat(
        np.cumsum(num_tokens) - num_tokens, num_tokens
    )
    taken = slots[np.repeat(words[hidden], num_tokens) + inner]
    row = np.repeat(row[hidden], num_tokens)
    of_token = hash_slots(keys[row], (taken - row_starts[row]).astype(np.uint64))
    of_run = np.repeat(hashes[drawn[run_of[hidden]]], num_tokens) if kind == "span" else of_token
    labels = ids[taken]
    ids[taken] = shown_instead(labels, of_run, masking, vocabulary, of_token)
    return taken, labels


def _run_lengths(hashes: np.ndarray, kind: str) -> np.ndarray:
    """int64: how many words the run that begins at each word has."""
    if kind == "wwm":
        return np.ones(len(hashes), dtype=np.int64)
    draw = (mix64(hashes ^ np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(11)) * 2.0**-53
    if kind == "ngram":
        return 1 + np.searchsorted(np.cumsum(NGRAM_SHARES)[:-1], draw, side="right")
    lengths = np.arange(1, MAX_SPAN + 1)
    shares = GEOMETRIC * (1 - GEOMETRIC) ** (lengths - 1)
    return 1 + np.searchsorted(np.cumsum(shares / shares.sum())[:-1], draw, side="right")


def _run_of_words(drawn: np.ndarray, lengths: np.ndarray, num_words: int) -> np.ndarray:
    """int64 [num_words]: which run hides each word first, -1 for none.

    drawn, lengths: of the runs in their order, first words and how many.
    """
    number = np.repeat(np.arange(len(drawn)), lengths)
    word = np.repeat(drawn - np.cumsum(lengths) + lengths, lengths) + np.arange(len(number))
    run_of = np.full(num_words, -1)
    run_of[word[::-1]] = number[::-1]  # of several values, the last stays
    return run_of


def _first_runs(
    run: np.ndarray, num_tokens: np.ndarray, row: np.ndarray, budget: np.ndarray
) -> np.ndarray:
    """bool: the runs, in their order, that make up each row's budget of tokens.

    run, num_tokens: of each word that one hides; row: of each run. A run is hidden if most of it is within the
    budget; the first of a row is in any case.
    """
    size = np.bincount(run, weights=num_tokens, minlength=len(row)).astype(np.int64)
    before = np.cumsum(size) - size
    is_first = np.diff(row, prepend=-1) > 0
    before -= before[np.maximum.accumulate(np.where(is_first, np.arange(len(row)), 0))]
    return (2 * (budget[row] - before) >= size) | is_first


def mask_always(
    ids: np.ndarray,
    slots: np.ndarray,
    source: np.ndarray,
    key: int,
    masking: Masking,
    vocabulary: Vocabulary,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide each token of a block with the same chance, and the same ones in every epoch.

    slots: int64, ascending, that may be hidden; source: int64, the token of the block that each shows. key: 64
    bits of the block. Returns as `mask_rows`.
    """
    hashes = hash_slots(np.uint64(key), source.astype(np.uint64))
    chosen = (mix64(hashes) >> np.uint64(11)) * 2.0**-53 < masking.fraction
    labels = ids[slots[chosen]]
    ids[slots[chosen]] = shown_instead(labels, hashes[chosen], masking, vocabulary)
    return slots[chosen], labels


def hash_slots(keys: np.ndarray | np.uint64, positions: np.ndarray) -> np.ndarray:
    """uint64: what `hash_positions(key, ...)` gives at each position."""
    steps = positions + np.uint64(1)
    steps *= np.uint64(GOLDEN)
    steps += keys
    return mix64(steps)


def shown_instead(
    labels: np.ndarray,
    hashes: np.ndarray,
    masking: Masking,
    vocabulary: Vocabulary,
    token_hashes: np.ndarray | None = None,
) -> np.ndarray:
    """uint32: what stands in the place of each hidden token.

    hashes: uint64, what decides on [MASK], another token or none; token_hashes: what decides on which other
    token, if not these.
    """
    hashes = mix64(hashes ^ np.uint64(0x5851F42D4C957F2D))
    action = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    if token_hashes is not None:
        hashes = mix64(token_hashes ^ np.uint64(0x5851F42D4C957F2D))
    regular = vocabulary.regular_ids
    others = regular[(mix64(hashes) % np.uint64(len(regular))).astype(np.int64)]
    mask = np.uint32(vocabulary.mask_id)
    return np.where(
        action < masking.mask_share,
        mask,
        np.where(action < masking.mask_share + masking.random_share, others, labels),
    )
