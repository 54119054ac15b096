"""A block and its address in, rows out: sequences packed into row slots, masked, ready to batch.

A block's rows are a pure function of (block, seed, epoch): pairs are cut and dealt to rows
(data/cutting.py, data/pairs.py), assembled here, and masked (data/masking.py). Any rank can compute
any row, and nothing about rows is ever stored.
"""

from typing import NamedTuple

import numpy as np
import xxhash

from data.cutting import NUM_SPECIAL
from data.hashing import hash_order, mix64, stable_hash64
from data.masking import Vocabulary, mask_row, mask_rows
from data.pairs import UNLABELLED, Pairs, make_pairs
from data.shards import Block

ROWS_AT_ONCE = 32  # assembled together: numpy calls cost the same for one row and for many


class RowPlan(NamedTuple):
    """Which pairs share a row. Row r holds pairs order[starts[r]:starts[r + 1]]."""

    pairs: Pairs
    order: np.ndarray  # int64 [num_pairs]
    starts: np.ndarray  # int64 [num_rows + 1]

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1


class Row(NamedTuple):
    """One row without its padding. n slots are filled, with s sequences, m of the slots are masked."""

    input_ids: np.ndarray  # uint32 [n], masked
    token_type_ids: np.ndarray  # uint8 [n]: 0 in [CLS] A [SEP], 1 in B [SEP]
    sequence_lengths: np.ndarray  # int64 [s], sums to n
    masked_positions: np.ndarray  # int64 [m], ascending
    masked_labels: np.ndarray  # uint32 [m]
    nsp_labels: np.ndarray  # int64 [s]: IS_NEXT, IS_RANDOM or UNLABELLED
    position_ids: np.ndarray  # int32 [n], from 0 in every sequence
    sequence_ids: np.ndarray  # int32 [n]: 0, 1, ... along the row

    def digest(self, row_number: int) -> int:
        """64-bit hash of the row's content and its place in the run: equal streams, equal digests."""
        digest = xxhash.xxh3_64(row_number.to_bytes(8, "little"))
        for array in self[:6]:  # the others follow from the lengths
            digest.update(array.data)
        return digest.intdigest()


class Rows(NamedTuple):
    """Consecutive rows of a block, one after the other in each array."""

    joined: Row  # each field of all rows
    starts: list[int]  # [num_rows + 1], slots
    sequence_starts: list[int]  # [num_rows + 1], sequences
    masked_starts: list[int]  # [num_rows + 1], masked slots

    def row(self, index: int) -> Row:
        """One of them; its arrays are views."""
        slots = slice(self.starts[index], self.starts[index + 1])
        sequences = slice(self.sequence_starts[index], self.sequence_starts[index + 1])
        masked = slice(self.masked_starts[index], self.masked_starts[index + 1])
        joined = self.joined
        return Row(
            joined.input_ids[slots],
            joined.token_type_ids[slots],
            joined.sequence_lengths[sequences],
            joined.masked_positions[masked],
            joined.masked_labels[masked],
            joined.nsp_labels[sequences],
            joined.position_ids[slots],
            joined.sequence_ids[slots],
        )


def plan_rows(block: Block, sequence_length: int, packing: bool, key: int) -> RowPlan:
    """Choose the pairs of every row of a block. Only lengths are read, no token.

    packing: several pairs may share a row, else each pair has its own. Rows come in hashed order,
    because in the order of their making the last would be the emptiest.
    """
    pairs = make_pairs(block, sequence_length, packing, key)
    counts = np.bincount(pairs.row)
    place = np.empty(len(counts), dtype=np.int64)
    row_order = hash_order(stable_hash64(key, "rows"), len(counts))
    place[row_order] = np.arange(len(counts))
    order = np.argsort(place[pairs.row], kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts[row_order], dtype=np.int64)])
    return RowPlan(pairs, order, starts)


def make_rows(
    block: Block,
    plan: RowPlan,
    numbers: range,
    vocabulary: Vocabulary,
    masked_fraction: float,
    key: int,
) -> Rows:
    """Assemble and mask rows `numbers` of a planned block, all at once; as `make_row` does each.

    numbers: at most 256, step 1. key: the same as given to `plan_rows`.
    """
    sequence_starts = plan.starts[numbers.start : numbers.stop + 1]
    chosen = plan.order[sequence_starts[0] : sequence_starts[-1]]
    sequence_starts = sequence_starts - sequence_starts[0]
    pairs = plan.pairs
    a_length, b_length = pairs.a_length[chosen], pairs.b_length[chosen]
    lengths = a_length + b_length + np.where(b_length > 0, NUM_SPECIAL, 2)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    row_starts = np.concatenate([[0], ends])[sequence_starts]
    ids = np.empty(int(row_starts[-1]), dtype=np.uint32)
    is_text = np.ones(len(ids), dtype=bool)
    is_text[starts] = is_text[starts + a_length + 1] = is_text[ends - 1] = False
    text = np.flatnonzero(is_text)
    ids.fill(vocabulary.sep_id)
    ids[starts] = vocabulary.cls_id
    ids[text] = _text_of(block, pairs, chosen)
    two = np.stack([a_length + 2, lengths - a_length - 2], axis=1).ravel()
    types = np.repeat(np.tile(np.array([0, 1], dtype=np.uint8), len(chosen)), two)
    positions = np.arange(len(ids), dtype=np.int32)
    positions -= np.repeat(starts.astype(np.int32), lengths)
    in_row = np.arange(len(chosen)) - np.repeat(sequence_starts[:-1], np.diff(sequence_starts))
    keys = _mask_keys(key, numbers)
    slots, labels, num_masked = mask_rows(ids, text, row_starts, masked_fraction, vocabulary, keys)
    slots -= np.repeat(row_starts[:-1], num_masked)
    joined = Row(
        ids, types, lengths, slots, labels, pairs.nsp_label[chosen],
        positions, np.repeat(in_row.astype(np.int32), lengths),
    )  # fmt: skip
    masked_starts = np.concatenate([[0], np.cumsum(num_masked)])
    return Rows(joined, row_starts.tolist(), sequence_starts.tolist(), masked_starts.tolist())


def _text_of(block: Block, pairs: Pairs, chosen: np.ndarray) -> np.ndarray:
    """The tokens of A, B, A, B, ... of the chosen pairs."""
    starts = np.stack([pairs.a_start[chosen], pairs.b_start[chosen]], axis=1).ravel()
    stops = starts + np.stack([pairs.a_length[chosen], pairs.b_length[chosen]], axis=1).ravel()
    tokens = block.tokens
    return np.concatenate(
        [tokens[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    )


def _mask_keys(key: int, numbers: range) -> np.ndarray:
    """uint64 [len(numbers)]: what the masks of each row are drawn from."""
    return mix64(np.array(numbers, dtype=np.uint64) + np.uint64(stable_hash64(key, "mask")))


def make_row(
    block: Block,
    plan: RowPlan,
    number: int,
    vocabulary: Vocabulary,
    masked_fraction: float,
    key: int,
) -> Row:
    """One row, assembled piece by piece: the slow twin of `make_rows`."""
    pairs = plan.pairs
    chosen = plan.order[plan.starts[number] : plan.starts[number + 1]].tolist()
    sequences, types, positions = [], [], []
    for pair in chosen:
        a = block.tokens[pairs.a_start[pair] :][: pairs.a_length[pair]].tolist()
        b = block.tokens[pairs.b_start[pair] :][: pairs.b_length[pair]].tolist()
        sequence = [vocabulary.cls_id, *a, vocabulary.sep_id]
        types += [0] * len(sequence)
        if pairs.nsp_label[pair] != UNLABELLED:
            sequence += [*b, vocabulary.sep_id]
            types += [1] * (len(b) + 1)
        sequences.append(sequence)
        positions += range(len(sequence))
    input_ids = np.array([token for sequence in sequences for token in sequence], dtype=np.uint32)
    maskable = (input_ids != vocabulary.cls_id) & (input_ids != vocabulary.sep_id)
    row_key = int(_mask_keys(key, range(number, number + 1))[0])
    masked_positions, labels = mask_row(input_ids, maskable, masked_fraction, vocabulary, row_key)
    return Row(
        input_ids,
        np.array(types, dtype=np.uint8),
        np.array([len(sequence) for sequence in sequences], dtype=np.int64),
        masked_positions,
        labels,
        pairs.nsp_label[chosen],
        np.array(positions, dtype=np.int32),
        np.repeat(np.arange(len(sequences), dtype=np.int32), [len(s) for s in sequences]),
    )
