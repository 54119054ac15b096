"""Rows in, tensors out: collation, the loader of a training run, and the fixed batches of evaluation.

Every training batch carries the cursors of the lanes it used. The trainer commits them when the
optimizer step is complete, so prefetching and gradient accumulation can never lose or repeat a
row.
"""

# B rows, L slots of a row, M masked slots of the batch, P sequence pairs of the batch

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.hashing import stable_hash64
from data.lanes import (
    Cursor,
    Damage,
    DataConfig,
    Lanes,
    StreamState,
    check_division,
    rows_of_batch,
)
from data.loader_workers import follow_rank, start_fork_server
from data.masking import Vocabulary
from data.pairs import UNLABELLED
from data.rows import ROWS_AT_ONCE, Row, make_rows, plan_rows
from data.shards import Dataset

STARTS_AT_ONCE = 64  # Batch.sequence_starts is as long as a multiple of this


class Batch(NamedTuple):
    """One micro-batch. The tensors are the model's inputs."""

    input_ids: torch.Tensor  # int64 [B, L]
    token_type_ids: torch.Tensor  # int64 [B, L]
    position_ids: torch.Tensor  # int64 [B, L], from 0 in every sequence
    sequence_ids: torch.Tensor  # int32 [B, L]: 0, 1, ... along the row, -1 at padding
    masked_index: torch.Tensor  # int64 [M], into the B * L slots
    masked_labels: torch.Tensor  # int64 [M]
    cls_index: torch.Tensor  # int64 [P], into the B * L slots: [CLS] of each labelled pair
    nsp_labels: torch.Tensor  # int64 [P]: 0 is next, 1 random
    sequence_starts: (
        torch.Tensor
    )  # int32: slots of B * L at which sequences and padding begin, then B * L
    sequence_lengths: np.ndarray  # int64 [number of sequences]
    rows_digest: int  # int64: sum of the rows' digests, modulo 2^64

    @property
    def num_tokens(self) -> int:
        """Filled slots."""
        return int(self.sequence_lengths.sum())

    def model_inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The model's keyword arguments, on `device`."""
        return {
            name: value.to(device, non_blocking=True)
            for name, value in zip(self._fields, self, strict=True)
            if isinstance(value, torch.Tensor)
        }


@dataclass(frozen=True)
class StreamItem:
    """What the loader yields: a micro-batch, its first row, and where its lanes stand after it."""

    batch: Batch
    first_row: int
    cursors: dict[int, Cursor]
    damage: tuple[Damage, ...] = ()  # of the whole stream, as far as its reader knows


def collate(rows: list[Row], numbers: list[int], sequence_length: int, pad_id: int) -> Batch:
    """Pad rows to `sequence_length` and lay them side by side. numbers: each row's place in the run."""
    joined = Row(*map(np.concatenate, zip(*rows, strict=True)))
    num_filled = np.array([len(row.input_ids) for row in rows])
    filled = np.arange(sequence_length) < num_filled[:, None]

    def padded(values: np.ndarray, padding: int, dtype: type = np.int64) -> torch.Tensor:
        slots = np.full(filled.shape, padding, dtype=dtype)
        slots[filled] = values
        return torch.from_numpy(slots)

    offsets = np.arange(len(rows)) * sequence_length
    masked = joined.masked_positions
    masked += np.repeat(offsets, [len(row.masked_positions) for row in rows])
    lengths = joined.sequence_lengths
    shift = offsets - (np.cumsum(num_filled) - num_filled)
    starts = np.cumsum(lengths) - lengths
    starts += np.repeat(shift, [len(row.sequence_lengths) for row in rows])
    labelled = joined.nsp_labels != UNLABELLED
    return Batch(
        padded(joined.input_ids, pad_id),
        padded(joined.token_type_ids, 0),
        padded(joined.position_ids, 0),
        padded(joined.sequence_ids, -1, np.int32),
        torch.from_numpy(masked),
        torch.from_numpy(joined.masked_labels.astype(np.int64)),
        torch.from_numpy(starts[labelled]),
        torch.from_numpy(joined.nsp_labels[labelled]),
        _segment_starts(starts, num_filled, sequence_length),
        sequence_lengths=lengths,
        rows_digest=wrap_int64(sum(map(Row.digest, rows, numbers))),
    )


def _segment_starts(
    starts: np.ndarray, num_filled: np.ndarray, sequence_length: int
) -> torch.Tensor:
    """Where each sequence, and the padding of each row, begins; the end as often as fills up a round number.

    So the tensor has few different lengths, and what is compiled for one fits the next batch.
    """
    num_rows = len(num_filled)
    padding = (np.arange(num_rows) * sequence_length + num_filled)[num_filled < sequence_length]
    bounds = np.sort(np.concatenate([starts, padding]))
    num_bounds = -(-(len(bounds) + 1) // STARTS_AT_ONCE) * STARTS_AT_ONCE
    padded = np.full(num_bounds, num_rows * sequence_length, dtype=np.int32)
    padded[: len(bounds)] = bounds
    return torch.from_numpy(padded)


def wrap_int64(value: int) -> int:
    """`value` modulo 2^64, as a signed 64-bit integer."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


@dataclass(frozen=True)
class Reader:
    """Which part of the run's rows a process reads, and how many at a time."""

    rank: int
    world_size: int
    micro_batch_size: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        slots = self.micro_batch_size * self.world_size
        if self.global_batch_size % slots:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {self.world_size} ranks = {slots}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in an optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)


class MicroBatches(IterableDataset[StreamItem]):
    """The micro-batches of one rank, from a stream state (a step boundary) to a row, or without end.

    With loader workers, worker w of W makes micro-batches w, w + W, ...: the DataLoader puts them
    back in order, so the number of workers changes nothing but speed.
    """

    def __init__(
        self, config: DataConfig, reader: Reader, state: StreamState, end_row: int | None = None
    ) -> None:
        check_division(
            world_size=reader.world_size,
            global_batch_size=reader.global_batch_size,
            num_lanes=config.num_lanes,
        )
        _check_workers(config, reader)
        self.config, self.reader, self.state, self.end_row = config, reader, state, end_row

    def __iter__(self) -> Iterator[StreamItem]:
        worker = get_worker_info()
        index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        dataset = Dataset.open(self.config.path, self.config.storage)
        lanes = Lanes(dataset, self.config, self.reader.seed, self.state)
        number, size = 0, self.reader.global_batch_size
        for first_row in itertools.count(self.state.row, size):
            if self.end_row is not None and first_row >= self.end_row:
                return
            for rows in self._micro_batches_at(first_row):
                if number % num_workers == index:
                    yield self._make(lanes, rows)
                number += 1

    def _micro_batches_at(self, first_row: int) -> np.ndarray:
        """int64 [accumulation, micro batch]: this rank's row numbers in the step that begins there."""
        rows = rows_of_batch(
            first_row,
            rank=self.reader.rank,
            world_size=self.reader.world_size,
            global_batch_size=self.reader.global_batch_size,
            num_lanes=self.config.num_lanes,
        )
        return rows.reshape(self.reader.accumulation, self.reader.micro_batch_size)

    def _make(self, lanes: Lanes, numbers: np.ndarray) -> StreamItem:
        rows = [lanes.row(number) for number in numbers.tolist()]
        batch = collate(
            rows, numbers.tolist(), self.config.sequence_length, lanes.vocabulary.pad_id
        )
        touched = {number % self.config.num_lanes for number in numbers.tolist()}
        cursors = {lane: lanes.cursor(lane) for lane in touched}
        return StreamItem(batch, int(numbers[0]), cursors, tuple(lanes.damage))


def _check_workers(config: DataConfig, reader: Reader) -> None:
    """Where damaged blocks are passed over, a lane must have one reader, which alone decides on it."""
    per_round = max(1, config.num_lanes // (reader.world_size * reader.micro_batch_size))
    workers = config.num_workers
    if config.max_damaged_blocks and workers > 1 and per_round % workers:
        raise ValueError(
            f"with data.max_damaged_blocks {config.max_damaged_blocks} each lane must be read by one worker: "
            f"{config.num_lanes} lanes make {per_round} micro-batches of a rank, which data.num_workers "
            f"{workers} does not divide"
        )


def build_loader(
    config: DataConfig, reader: Reader, state: StreamState, end_row: int | None = None
) -> Iterator[StreamItem]:
    """StreamItems for one rank, from `state` up to `end_row`, or without end."""
    micro_batches = MicroBatches(config, reader, state, end_row)
    if config.num_workers == 0:
        return iter(micro_batches)
    start_fork_server()
    loader = DataLoader(
        micro_batches,
        batch_size=None,
        num_workers=config.num_workers,
        prefetch_factor=2,
        multiprocessing_context="forkserver",
        pin_memory=False,
        worker_init_fn=partial(follow_rank, os.getpid()),
    )
    return iter(loader)


def commit(
    state: StreamState, row: int, cursors: dict[int, Cursor], damage: Iterable[Damage] = ()
) -> StreamState:
    """The state after a completed step: now at `row`, with the lanes that moved and what they passed over."""
    moved = list(state.cursors)
    for lane, cursor in cursors.items():
        moved[lane] = cursor
    return replace(
        state, row=row, cursors=tuple(moved), damage=tuple(sorted({*state.damage, *damage}))
    )


def evaluation_batches(
    dataset: Dataset, config: DataConfig, reader: Reader, num_rows: int
) -> Iterator[tuple[Batch, bool]]:
    """This rank's share of the first `num_rows` held-out rows, the same at every evaluation.

    Held-out rows are dealt from all held-out blocks in turn, so every source is there. All ranks
    yield equally often (ZeRO-3's forward is collective): a rank whose share is used up yields the
    first rows once more, with False, which says that they do not count.
    """
    rows = heldout_rows(dataset, config, reader.seed, num_rows)
    size = reader.micro_batch_size
    pad_id = dataset.special_ids["[PAD]"]
    num_batches = -(-len(rows) // size)
    for round_number in range(-(-num_batches // reader.world_size)):
        start = (round_number * reader.world_size + reader.rank) * size
        counts = start < len(rows)
        start = start if counts else 0
        part = rows[start : start + size]
        numbers = list(range(start, start + len(part)))
        yield collate(part, numbers, config.sequence_length, pad_id), counts


def heldout_rows(dataset: Dataset, config: DataConfig, seed: int, num_rows: int) -> list[Row]:
    """The first `num_rows` rows of the held-out split, one block after the other in turn."""
    vocabulary = Vocabulary.of(dataset.special_ids, dataset.vocab_size)
    queues: list[Iterator[Row]] = []

    def rows_of(index: int) -> Iterator[Row]:
        key = stable_hash64(seed, "heldout", index)
        block = dataset.read_block(index)
        plan = plan_rows(block, config.sequence_length, config.packing, key)
        for first in range(0, plan.num_rows, ROWS_AT_ONCE):
            numbers = range(first, min(first + ROWS_AT_ONCE, plan.num_rows))
            rows = make_rows(block, plan, numbers, vocabulary, config.masked_fraction, key)
            yield from map(rows.row, range(len(numbers)))

    queues = [rows_of(int(index)) for index in dataset.block_indices("heldout")]
    rows: list[Row] = []
    while queues and len(rows) < num_rows:
        still_open = []
        for queue in queues:
            row = next(queue, None)
            if row is not None and len(rows) < num_rows:
                rows.append(row)
                still_open.append(queue)
        queues = still_open
    return rows
