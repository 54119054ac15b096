"""Pairs of a block and the recipes of their rows in, sequences of spans out: which tokens, in which order.

A pair becomes one sequence of a row (of `distance` two, of `cpc` three), laid out by the recipe of its row:

    nsp                  [CLS] A [SEP] B [SEP]
    sop, order           the same, or swapped: [CLS] a B' [SEP] A' b [SEP], where A = a A', B = B' b, and A' and
                         B' are the whole sentences
    distance             [CLS] A" [SEP] B and [CLS] a A', or [CLS] A' [SEP] B and [CLS] a A", where A = a A' A"
    reorder, relative    [CLS] a P Q R S b [SEP]: the four parts between, each of whole sentences, shuffled
    cpc                  [CLS] C, [CLS] D and [CLS] the rest, D following C
    denoise              [CLS] noised X [SEP] X [SEP], X being one half of the text, in each epoch one by hash
    else                 [CLS] A B [SEP]

Sequences of a row do not see each other. A pair that is not labelled is as of nsp (the paired), else as of
"else". Nothing takes more slots than were set aside for the pair.
"""

from typing import NamedTuple

import numpy as np

from data.hashing import GOLDEN, mix64, stable_hash64
from data.objectives import NUM_PARTS, Mixture, Recipe
from data.pairs import (
    UNLABELLED,
    Pairs,
    any_inner_boundary,
    num_inner_boundaries,
    whole_sentences,
)

# Noise of `denoise` (Lample et al. 2018, 2.3, and BART's masks): shares of tokens, places a token may move.
DELETED_SHARE, HIDDEN_SHARE, FARTHEST_MOVE = 0.1, 0.15, 3
LEAST_CONTINUED = 8  # tokens of a pair of cpc, for three sequences
CLS_BEFORE, SEP_AFTER = 1, 2


class Spans(NamedTuple):
    """The sequences of some pairs, cell by cell: n pairs, up to S spans each. An empty cell has no length."""

    starts: np.ndarray  # int64 [n, S]: token offsets of the block
    lengths: np.ndarray  # int64 [n, S]
    marks: np.ndarray  # uint8 [n, S]: CLS_BEFORE, SEP_AFTER
    types: np.ndarray  # uint8 [n, S]: token_type_ids
    parts: (
        np.ndarray
    )  # int64 [n, NUM_PARTS]: the original place of the part in span 1, 2, ...; -1: none
    noised: np.ndarray  # bool [n]: the first span is noised text

    @classmethod
    def empty(cls, num_pairs: int, num_spans: int) -> "Spans":
        shape = (num_pairs, num_spans)
        spans = cls(
            *(np.zeros(shape, dtype=dtype) for dtype in (np.int64, np.int64, np.uint8, np.uint8)),
            parts=np.full((num_pairs, NUM_PARTS), -1, dtype=np.int64),
            noised=np.zeros(num_pairs, dtype=bool),
        )
        spans.marks[:, 0] = CLS_BEFORE
        return spans


def num_spans(mixture: Mixture) -> int:
    """The most spans that a sequence of these recipes has."""
    if any(recipe.shuffled for recipe in mixture.recipes):
        return NUM_PARTS + 2
    if any(recipe.paired in ("sop", "order", "distance") for recipe in mixture.recipes):
        return 4
    return 3 if any(recipe.cpc for recipe in mixture.recipes) else 2


def lay_spans(
    pairs: Pairs,
    chosen: np.ndarray,
    recipes: np.ndarray,
    mixture: Mixture,
    boundaries: np.ndarray,
    key: int,
) -> Spans:
    """The spans of pairs `chosen`, int64 [n]; recipes: int64 [n], of the rows that they lie in.

    boundaries: of `data.pairs.sentence_boundaries`; where a recipe asks for whole sentences.
    """
    spans = Spans.empty(len(chosen), num_spans(mixture))
    for number, recipe in enumerate(mixture.recipes):
        rows = (
            np.flatnonzero(recipes == number)
            if len(mixture.recipes) > 1
            else np.arange(len(chosen))
        )
        if not len(rows):
            continue
        of = chosen[rows]
        if recipe.paired:
            _pair(spans, rows, pairs, of)
            if recipe.paired in ("sop", "order"):
                swapped = pairs.is_swapped[of]
                _swap(spans, rows[swapped], pairs, of[swapped], boundaries)
            if recipe.paired == "distance":
                asked = pairs.label[of] != UNLABELLED
                _halve(spans, rows[asked], (pairs, of[asked], boundaries), key)
        else:
            _single(spans, rows, pairs, of)
            _divide(spans, rows, recipe, (pairs, of, boundaries), key)
    return spans


def _pair(spans: Spans, rows: np.ndarray, pairs: Pairs, of: np.ndarray) -> None:
    spans.starts[rows, 0], spans.lengths[rows, 0] = pairs.a_start[of], pairs.a_length[of]
    spans.starts[rows, 1], spans.lengths[rows, 1] = pairs.b_start[of], pairs.b_length[of]
    spans.marks[rows, 0] = CLS_BEFORE | SEP_AFTER
    spans.marks[rows, 1] = np.where(pairs.b_length[of] > 0, SEP_AFTER, 0)
    spans.types[rows, 1] = 1


def _swap(
    spans: Spans, rows: np.ndarray, pairs: Pairs, of: np.ndarray, boundaries: np.ndarray
) -> None:
    first, last = whole_sentences(pairs, of, boundaries)
    a_start, b_start = pairs.a_start[of], pairs.b_start[of]
    a_stop, b_stop = a_start + pairs.a_length[of], b_start + pairs.b_length[of]
    bounds = [(a_start, first), (b_start, last), (first, a_stop), (last, b_stop)]
    for column, (start, stop) in enumerate(bounds):
        spans.starts[rows, column], spans.lengths[rows, column] = start, stop - start
    spans.marks[rows, :4] = (CLS_BEFORE, SEP_AFTER, 0, SEP_AFTER)
    spans.types[rows, :4] = (0, 0, 1, 1)


def _halve(
    spans: Spans, rows: np.ndarray, source: tuple[Pairs, np.ndarray, np.ndarray], key: int
) -> None:
    """Part each A at one of its sentence ends; the half that is not shown before B gets a [CLS] of its own."""
    pairs, of, boundaries = source
    start, stop = pairs.a_start[of], pairs.a_start[of] + pairs.a_length[of]
    hashes = mix64(start.astype(np.uint64) ^ np.uint64(stable_hash64(key, "halves")))
    first = boundaries[np.searchsorted(boundaries, start)]
    middle = any_inner_boundary(start, stop, boundaries, hashes)
    swapped = pairs.is_swapped[of]
    bounds = [
        (np.where(swapped, first, middle), np.where(swapped, middle, stop)),
        (pairs.b_start[of], pairs.b_start[of] + pairs.b_length[of]),
        (start, first),
        (np.where(swapped, middle, first), np.where(swapped, stop, middle)),
    ]
    for column, (begin, end) in enumerate(bounds):
        spans.starts[rows, column], spans.lengths[rows, column] = begin, end - begin
    spans.marks[rows, :4] = (CLS_BEFORE | SEP_AFTER, 0, CLS_BEFORE, 0)
    spans.types[rows, :4] = (0, 1, 0, 0)


def _single(spans: Spans, rows: np.ndarray, pairs: Pairs, of: np.ndarray) -> None:
    spans.starts[rows, 0] = pairs.a_start[of]
    spans.lengths[rows, 0] = pairs.a_length[of] + pairs.b_length[of]
    spans.marks[rows, 0] = CLS_BEFORE | SEP_AFTER


def _divide(
    spans: Spans,
    rows: np.ndarray,
    recipe: Recipe,
    source: tuple[Pairs, np.ndarray, np.ndarray],
    key: int,
) -> None:
    """Part the one span of each sequence that shuffled parts, a continuation or a noised copy are asked of."""
    pairs, of, boundaries = source
    if recipe.shuffled:
        stop = pairs.b_start[of] + pairs.b_length[of]
        enough = num_inner_boundaries(pairs.a_start[of], stop, boundaries) >= NUM_PARTS - 1
        _shuffle(spans, rows[enough], boundaries, key)
    if recipe.cpc:
        _continue(spans, rows[spans.lengths[rows, 0] >= LEAST_CONTINUED], key)
    if recipe.tokens == "denoise":
        length = spans.lengths[rows, 0] // 2
        rows, length = rows[length > 0], length[length > 0]
        start = spans.starts[rows, 0]
        second = mix64(start.astype(np.uint64) ^ np.uint64(stable_hash64(key, "half")))
        start = start + (second & np.uint64(1)).astype(np.int64) * length
        for column in (0, 1):
            spans.starts[rows, column], spans.lengths[rows, column] = start, length
            spans.marks[rows, column] |= SEP_AFTER
        spans.types[rows, 1] = 1
        spans.noised[rows] = True


def _continue(spans: Spans, rows: np.ndarray, key: int) -> None:
    """A context and its continuation take a quarter to a half each, drawn apart: their lengths are no match."""
    start, length = spans.starts[rows, 0], spans.lengths[rows, 0]
    hashes = mix64(start.astype(np.uint64) ^ np.uint64(stable_hash64(key, "continuation")))
    first, stop = start, start + length
    for column in range(2):
        draw = ((hashes >> np.uint64(32 * column)) & np.uint64(0xFFFFFFFF)) * 2.0**-32
        part = (length * (0.25 + 0.25 * draw)).astype(np.int64)
        spans.starts[rows, column], spans.lengths[rows, column] = first, part
        spans.marks[rows, column] = CLS_BEFORE
        first = first + part
    spans.starts[rows, 2], spans.lengths[rows, 2] = first, stop - first
    spans.marks[rows, 2] = CLS_BEFORE


def _shuffle(spans: Spans, rows: np.ndarray, boundaries: np.ndarray, key: int) -> None:
    """Four parts of whole sentences, in an order drawn by hash.

    Each has a quarter of the sentences; the one to three that are over go to parts drawn by another hash, so
    that no part's length tells its place.
    """
    start = spans.starts[rows, 0]
    stop = start + spans.lengths[rows, 0]
    first = np.searchsorted(boundaries, start)
    last = np.searchsorted(boundaries, stop, side="right") - 1
    least, over = np.divmod(last - first, NUM_PARTS)
    places, luck = (
        np.argsort(_part_hashes(start, stable_hash64(key, name)), axis=1, kind="stable")
        for name in ("parts", "part lengths")
    )  # [n, NUM_PARTS]: which part comes where; which parts have one sentence more, if few do
    steps = np.zeros((len(rows), NUM_PARTS + 1), dtype=np.int64)
    steps[:, 1:] = np.cumsum(least[:, None] + (luck < over[:, None]), axis=1)
    bounds = boundaries[first[:, None] + steps]  # [n, NUM_PARTS + 1]
    spans.parts[rows] = places
    row = np.arange(len(rows))[:, None]
    inner = slice(1, NUM_PARTS + 1)
    spans.lengths[rows, 0] = bounds[:, 0] - start
    spans.marks[rows, 0] = CLS_BEFORE
    spans.starts[rows, inner] = bounds[row, places]
    spans.lengths[rows, inner] = bounds[row, places + 1] - bounds[row, places]
    spans.starts[rows, NUM_PARTS + 1] = bounds[:, -1]
    spans.lengths[rows, NUM_PARTS + 1] = stop - bounds[:, -1]
    spans.marks[rows, NUM_PARTS + 1] = SEP_AFTER


def _part_hashes(start: np.ndarray, key: int) -> np.ndarray:
    """uint64 [n, NUM_PARTS]: one for each part of each sequence."""
    of_sequence = (start.astype(np.uint64) * np.uint64(NUM_PARTS))[:, None]
    return mix64(mix64(of_sequence + np.arange(NUM_PARTS, dtype=np.uint64)) + np.uint64(key))


class Noised(NamedTuple):
    """The noised copies of some spans, one after the other."""

    source: np.ndarray  # int64: token offsets of the block, in their new order
    is_hidden: np.ndarray  # bool: [MASK] stands there
    lengths: np.ndarray  # int64: of each copy


def noise(starts: np.ndarray, lengths: np.ndarray, key: int) -> Noised:
    """Delete, hide and move tokens of the spans. The first token of a span stays, so that none is empty.

    A token moves by sorting place + a number in [0, FARTHEST_MOVE] drawn for it (Lample et al. 2018, 2.3).
    """
    total = int(lengths.sum())
    span = np.repeat(np.arange(len(starts)), lengths)
    place = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source = np.repeat(starts, lengths) + place
    hashes = mix64(source.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(key))
    draws = [(mix64(hashes + np.uint64(number)) >> np.uint64(11)) * 2.0**-53 for number in range(3)]
    stays = (draws[0] >= DELETED_SHARE) | (place == 0)
    order = np.lexsort((place + (FARTHEST_MOVE + 1) * draws[1], span))
    order = order[stays[order]]
    return Noised(
        source[order],
        draws[2][order] < HIDDEN_SHARE,
        np.bincount(span[stays], minlength=len(starts)),
    )


def is_labelled(spans: Spans) -> np.ndarray:
    """bool [n]: sequences with shuffled parts."""
    return spans.parts[:, 0] >= 0


def relative_classes() -> tuple[np.ndarray, np.ndarray]:
    """(columns of the first parts, of the second): every two of NUM_PARTS, in the order in which they stand."""
    return np.triu_indices(NUM_PARTS, 1)


def relative_label(first_place: np.ndarray, second_place: np.ndarray) -> np.ndarray:
    """The class of how far apart two parts were: -3, -2, -1, 1, 2, 3 are 0 to 5."""
    distance = second_place - first_place
    return distance + NUM_PARTS - 1 - (distance > 0)
