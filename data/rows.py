"""A block and its address in, rows out: sequences packed into row slots, hidden in part, ready to batch.

A block's rows are a pure function of (block, mixture, seed, epoch): pairs are cut and dealt to rows
(data/cutting.py), each row gets a recipe (data/objectives.py), which decides what is asked of its
pairs (data/pairs.py), how they are laid out (data/sequences.py) and what is hidden of them
(data/masking.py, data/corruption.py). Any rank can compute any row, and nothing about rows is ever stored.
"""

from typing import NamedTuple

import numpy as np
import xxhash

from data.asking import Asking, ask, hide
from data.assembly import assemble
from data.cutting import Lengths, cut_documents
from data.hashing import hash_order, mix64, stable_hash64
from data.masking import Masking, Text, Vocabulary
from data.objectives import DEFAULT_MIXTURE, PAIRED, Mixture
from data.pairs import UNLABELLED, Pairs, label_pairs, sentence_boundaries
from data.sequences import lay_spans
from data.shards import Block

ROWS_AT_ONCE = 32  # assembled together: numpy calls cost the same for one row and for many


class RowPlan(NamedTuple):
    """Which pairs share a row, and what it is made for. Row r holds pairs order[starts[r]:starts[r + 1]]."""

    pairs: Pairs
    order: np.ndarray  # int64 [num_pairs]
    starts: np.ndarray  # int64 [num_rows + 1]
    recipes: np.ndarray  # int64 [num_rows], into mixture.recipes
    mixture: Mixture
    boundaries: np.ndarray  # of sentences; empty where no recipe asks for them
    word_starts: np.ndarray  # bool [num_tokens]; empty where no recipe asks for them

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1


class Row(NamedTuple):
    """One row without its padding: n slots, s sequences, m hidden tokens, e labels of other kinds."""

    input_ids: np.ndarray  # uint32 [n], hidden in part
    token_type_ids: np.ndarray  # uint8 [n]: 0 in [CLS] A [SEP], 1 in B [SEP]
    sequence_lengths: np.ndarray  # int64 [s], sums to n
    masked_positions: (
        np.ndarray
    )  # int64 [m], ascending: slots whose token, or next token, is asked for
    masked_labels: np.ndarray  # uint32 [m]
    pair_labels: np.ndarray  # int64 [s]: class of what is asked of the pair, or UNLABELLED
    position_ids: np.ndarray  # int32 [n], from 0 in every sequence
    sequence_ids: np.ndarray  # int32 [n]: 0, 1, ... along the row
    asked_slots: np.ndarray  # int64 [e, 2]: a slot, or two, of which a task of its own asks
    asked_labels: np.ndarray  # uint32 [e]
    asked_tasks: np.ndarray  # uint8 [e], into data.objectives.TASKS
    seen: (
        np.ndarray
    )  # int32 [n], the last slot that each attends to; empty where no recipe is causal
    recipe: np.ndarray  # uint64 [1]: Recipe.key

    def digest(self, row_number: int) -> int:
        """64-bit hash of the row's content and its place in the run: equal streams, equal digests."""
        digest = xxhash.xxh3_64(row_number.to_bytes(8, "little"))
        for array in self[:6]:  # what follows from the lengths is left out
            digest.update(array.data)
        if self.recipe[0]:
            for array in (self.recipe, self.asked_slots, self.asked_labels, self.asked_tasks):
                digest.update(np.ascontiguousarray(array).data)
        return digest.intdigest()


class Rows(NamedTuple):
    """Consecutive rows of a block, one after the other in each array."""

    joined: Row  # each field of all rows
    starts: list[int]  # [num_rows + 1], slots
    sequence_starts: list[int]  # [num_rows + 1], sequences
    masked_starts: list[int]  # [num_rows + 1], masked slots
    asked_starts: list[int]  # [num_rows + 1], of what is asked otherwise

    def row(self, index: int) -> Row:
        """One of them; its arrays are views."""
        slots = slice(self.starts[index], self.starts[index + 1])
        sequences = slice(self.sequence_starts[index], self.sequence_starts[index + 1])
        masked = slice(self.masked_starts[index], self.masked_starts[index + 1])
        asked = slice(self.asked_starts[index], self.asked_starts[index + 1])
        joined = self.joined
        return Row(
            joined.input_ids[slots],
            joined.token_type_ids[slots],
            joined.sequence_lengths[sequences],
            joined.masked_positions[masked],
            joined.masked_labels[masked],
            joined.pair_labels[sequences],
            joined.position_ids[slots],
            joined.sequence_ids[slots],
            joined.asked_slots[asked],
            joined.asked_labels[asked],
            joined.asked_tasks[asked],
            joined.seen[slots] if len(joined.seen) else joined.seen,
            joined.recipe[index : index + 1],
        )


def plan_rows(
    block: Block,
    sequence_length: int,
    packing: bool,
    key: int,
    mixture: Mixture = DEFAULT_MIXTURE,
) -> RowPlan:
    """Choose the pairs and the recipe of every row of a block. Only lengths are read, no token.

    packing: several pairs may share a row, else each pair has its own. Rows come in hashed order,
    because in the order of their making the last would be the emptiest.
    """
    cut = cut_documents(block, Lengths.of(sequence_length), packing, key)
    counts = np.bincount(cut.row)
    place = np.empty(len(counts), dtype=np.int64)
    row_order = hash_order(stable_hash64(key, "rows"), len(counts))
    place[row_order] = np.arange(len(counts))
    recipes = mixture.of_rows(key, len(counts))
    asked = np.array([PAIRED.index(r.paired) if r.paired else -1 for r in mixture.recipes])
    needs_sentences = any(
        r.shuffled or r.paired in ("sop", "order", "distance") for r in mixture.recipes
    )
    boundaries = sentence_boundaries(block) if needs_sentences else np.empty(0, dtype=np.int64)
    pairs = label_pairs(block, cut, asked[recipes[place[cut.row]]], boundaries, key)
    word_starts = np.empty(0, dtype=bool)
    if any(r.tokens in ("wwm", "span", "ngram") for r in mixture.recipes):
        bits = np.unpackbits(block.word_starts, count=len(block.tokens), bitorder="little")
        word_starts = bits.view(bool)
    order = np.argsort(place[pairs.row], kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts[row_order], dtype=np.int64)])
    return RowPlan(pairs, order, starts, recipes, mixture, boundaries, word_starts)


def make_rows(
    block: Block,
    plan: RowPlan,
    numbers: range,
    vocabulary: Vocabulary,
    masking: Masking,
    key: int,
) -> Rows:
    """Assemble and mask rows `numbers` of a planned block, all at once.

    numbers: at most 256, step 1. key: the same as given to `plan_rows`.
    """
    pair_starts = plan.starts[numbers.start : numbers.stop + 1]
    chosen = plan.order[pair_starts[0] : pair_starts[-1]]
    pair_starts = pair_starts - pair_starts[0]
    row_recipes = plan.recipes[numbers.start : numbers.stop]
    row_of_pair = np.repeat(np.arange(len(numbers)), np.diff(pair_starts))
    spans = lay_spans(
        plan.pairs, chosen, row_recipes[row_of_pair], plan.mixture, plan.boundaries, key
    )
    slots = assemble(block, spans, pair_starts, vocabulary, key)
    lengths = np.diff(np.append(slots.sequence_starts, len(slots.ids)))
    row_of_sequence = row_of_pair[slots.sequence_pair]
    sequence_starts = np.searchsorted(row_of_sequence, np.arange(len(numbers) + 1))
    in_row = np.arange(len(lengths)) - sequence_starts[row_of_sequence]
    positions = np.arange(len(slots.ids), dtype=np.int32)
    positions -= np.repeat(slots.sequence_starts.astype(np.int32), lengths)
    asking = Asking(block, plan.mixture.recipes, row_recipes, masking, vocabulary)
    text = Text(slots.text, slots.row_starts, _mask_keys(key, numbers))
    hidden, seen = hide(asking, slots, spans, text, plan.word_starts)
    asked = ask(asking, slots, spans, text, hidden)
    masked_starts = np.searchsorted(hidden.slots, slots.row_starts)
    asked_starts = np.searchsorted(asked.slots[:, 0], slots.row_starts)
    in_rows = slots.row_starts[:-1]
    joined = Row(
        slots.ids, slots.types, lengths,
        hidden.slots - np.repeat(in_rows, np.diff(masked_starts)), hidden.labels,
        _sequence_labels(plan.pairs.label[chosen], slots.sequence_pair),
        positions, np.repeat(in_row.astype(np.int32), lengths),
        asked.slots - np.repeat(in_rows, np.diff(asked_starts))[:, None], asked.labels, asked.tasks,
        seen, asking.recipe_keys,
    )  # fmt: skip
    return Rows(
        joined, slots.row_starts.tolist(), sequence_starts.tolist(), masked_starts.tolist(),
        asked_starts.tolist(),
    )  # fmt: skip


def _sequence_labels(labels: np.ndarray, sequence_pair: np.ndarray) -> np.ndarray:
    """int64 [number of sequences]: the first of a pair has the pair's label, others have none."""
    is_first = np.diff(sequence_pair, prepend=-1) > 0
    return np.where(is_first, labels[sequence_pair], UNLABELLED)


def _mask_keys(key: int, numbers: range) -> np.ndarray:
    """uint64 [len(numbers)]: what the masks of each row are drawn from."""
    return mix64(np.array(numbers, dtype=np.uint64) + np.uint64(stable_hash64(key, "mask")))
