"""Rows of any mixture, from blocks in which every token is another one: rows tell where each is from."""

from typing import NamedTuple

import numpy as np
from test_data_rows import make_block, random_documents

from data.hashing import hash_positions, stable_hash64
from data.masking import Masking, Vocabulary
from data.objectives import TASKS, Recipe, read_mixture
from data.rows import Row, RowPlan, make_rows, plan_rows
from data.shards import Block

SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
CLS, SEP, MASK, FIRST = 2, 3, 4, 5  # FIRST: the id of token 0 of a block
MASKING = Masking(0.15)


class Made(NamedTuple):
    """A block and all its rows."""

    block: Block
    plan: RowPlan
    rows: list[Row]

    def recipe(self, number: int) -> Recipe:
        return self.plan.mixture.recipes[self.plan.recipes[number]]

    @property
    def documents(self) -> np.ndarray:
        """The document of each token."""
        return np.repeat(np.arange(len(self.block.document_lengths)), self.block.document_lengths)

    @property
    def begins_sentence(self) -> np.ndarray:
        """bool, one more than tokens: the last one is the end of the block."""
        begins = np.zeros(len(self.block.tokens) + 1, dtype=bool)
        begins[np.cumsum(self.block.sentence_lengths, dtype=np.int64)] = begins[0] = True
        return begins


def word_starts(num_tokens: int, mean: int) -> np.ndarray:
    """bool: words of 1 to 2 * mean - 1 tokens."""
    lengths = 1 + hash_positions(stable_hash64("words"), num_tokens) % np.uint64(2 * mean - 1)
    starts = np.zeros(num_tokens, dtype=bool)
    begins = np.cumsum(lengths.astype(np.int64)) - lengths.astype(np.int64)
    starts[begins[begins < num_tokens]] = True
    return starts


def unique_block(documents: list[list[int]], seed: int = 0, word_mean: int = 2) -> Block:
    """Token n is FIRST + n. documents: sentence lengths of each."""
    num_tokens = sum(map(sum, documents))
    block = make_block(documents, seed, word_starts(num_tokens, word_mean))
    return block._replace(tokens=FIRST + np.arange(num_tokens, dtype=np.uint32))


def rows_of(
    block: Block,
    objectives: str | dict[str, int],
    length: int = 128,
    masking: Masking = MASKING,
    key: int = 0,
) -> Made:
    """All rows of a block."""
    mixture = read_mixture({objectives: 1} if isinstance(objectives, str) else objectives)
    plan = plan_rows(block, length, True, key, mixture)
    vocabulary = Vocabulary.of(SPECIAL_IDS, len(block.tokens) + FIRST)
    rows: list[Row] = []
    for first in range(0, plan.num_rows, 32):
        numbers = range(first, min(first + 32, plan.num_rows))
        made = make_rows(block, plan, numbers, vocabulary, masking, key)
        rows += map(made.row, range(len(numbers)))
    return Made(block, plan, rows)


def make(
    objectives: str | dict[str, int],
    seed: int = 0,
    *,
    length: int = 128,
    num_documents: int = 60,
    masking: Masking = MASKING,
    word_mean: int = 2,
) -> Made:
    """All rows of a block made from a seed."""
    block = unique_block(random_documents(seed, num_documents), seed, word_mean)
    return rows_of(block, objectives, length, masking, seed)


def clean_ids(row: Row) -> np.ndarray:
    """int64: the row before anything was hidden or moved. Not of causal rows."""
    ids = row.input_ids.astype(np.int64)
    ids[row.masked_positions] = row.masked_labels
    moved = row.asked_tasks == TASKS.index("word_order")
    ids[row.asked_slots[moved, 0]] = row.asked_labels[moved]
    return ids


def asked(row: Row, task: str) -> tuple[np.ndarray, np.ndarray]:
    """(slots [e, 2], labels [e]) of one task."""
    own = row.asked_tasks == TASKS.index(task)
    return row.asked_slots[own], row.asked_labels[own]


class Segments(NamedTuple):
    """A labelled sequence: token numbers of what stands before and behind its first [SEP]."""

    label: int
    first: np.ndarray
    second: np.ndarray


def segments(made: Made, number: int) -> list[Segments]:
    """The labelled sequences of a row."""
    row, found = made.rows[number], []
    clean = clean_ids(row)
    stops = np.cumsum(row.sequence_lengths)
    for start, stop, label in zip(
        stops - row.sequence_lengths, stops, row.pair_labels, strict=True
    ):
        if label >= 0:
            ids = clean[start + 1 : stop]
            middle = int(np.flatnonzero(ids == SEP)[0])
            second = ids[middle + 1 :]
            found.append(Segments(int(label), ids[:middle] - FIRST, second[second != SEP] - FIRST))
    return found
