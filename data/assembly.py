"""Spans of a block in, slots out: the tokens of some rows with their special tokens, nothing hidden yet."""

from typing import NamedTuple

import numpy as np

from data.hashing import stable_hash64
from data.masking import Vocabulary
from data.sequences import CLS_BEFORE, SEP_AFTER, Spans, noise
from data.shards import Block


class Slots(NamedTuple):
    """The slots of some rows before anything is hidden. n pairs, S spans of each at most."""

    ids: np.ndarray  # uint32 [num_slots]
    types: np.ndarray  # uint8 [num_slots]
    text: np.ndarray  # int64 [num_text], ascending: slots of text
    source: np.ndarray  # int64 [num_text]: the token of the block that each shows
    span_starts: np.ndarray  # int64 [n, S]: the first slot of text of each span
    first_sizes: np.ndarray  # int64 [n]: slots of the first span with its special tokens
    row_starts: np.ndarray  # int64 [num_rows + 1]
    sequence_starts: np.ndarray  # int64 [number of sequences]: slots of [CLS]
    sequence_pair: np.ndarray  # int64 [number of sequences]: which of the n pairs each is of


def assemble(
    block: Block, spans: Spans, pair_starts: np.ndarray, vocabulary: Vocabulary, key: int
) -> Slots:
    """pair_starts: int64 [num_rows + 1], the pairs of each row."""
    num_columns = spans.starts.shape[1]
    lengths = spans.lengths.ravel()
    own = np.flatnonzero(spans.noised) * num_columns  # cells that are noised copies
    noised = None
    if len(own):
        noised = noise(spans.starts.ravel()[own], lengths[own], stable_hash64(key, "noise"))
        lengths = lengths.copy()
        lengths[own] = noised.lengths
    marks = spans.marks.ravel()
    has_cls = (marks & CLS_BEFORE).astype(bool)
    sizes = lengths + has_cls + (marks >= SEP_AFTER)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    text_starts = starts + has_cls
    before = np.cumsum(lengths) - lengths
    counter = np.arange(int(lengths.sum()))
    text = counter + np.repeat(text_starts - before, lengths)
    source = counter + np.repeat(spans.starts.ravel() - before, lengths)
    ids = np.full(int(ends[-1]), vocabulary.sep_id, dtype=np.uint32)
    sequence_starts = starts[has_cls]
    ids[sequence_starts] = vocabulary.cls_id
    if noised is None:
        ids[text] = block.tokens[source]
    else:
        is_noised = np.zeros(len(lengths), dtype=bool)
        is_noised[own] = True
        copied = np.repeat(is_noised, lengths)
        source[copied] = noised.source
        ids[text] = block.tokens[source]
        ids[text[copied][noised.is_hidden]] = vocabulary.mask_id
    first_of_row = np.append(starts.reshape(-1, num_columns)[:, 0], len(ids))
    return Slots(
        ids,
        np.repeat(spans.types.ravel(), sizes),
        text,
        source,
        text_starts.reshape(-1, num_columns),
        sizes.reshape(-1, num_columns)[:, 0],
        first_of_row[pair_starts],
        sequence_starts,
        np.flatnonzero(has_cls) // num_columns,
    )
