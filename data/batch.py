"""Rows in, micro-batches out: the loader of a training run, and the fixed batches of evaluation.

Every training batch carries the cursors of the lanes it used. The trainer commits them when the
optimizer step is complete, so prefetching and gradient accumulation can never lose or repeat a
row.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.collate import Batch, collate
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
from data.rows import Row, make_rows, plan_rows, rows_at_once
from data.shards import Dataset

Item = TypeVar("Item")


@dataclass(frozen=True)
class StreamItem:
    """What the loader yields: a micro-batch, its first row, and where its lanes stand after it."""

    batch: Batch
    first_row: int
    cursors: dict[int, Cursor]
    damage: tuple[Damage, ...] = ()  # of the whole stream, as far as its reader knows

    def pin_memory(self) -> "StreamItem":
        """Called by the DataLoader, in a thread of its own."""
        return replace(self, batch=self.batch.pin_memory())


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
            rows,
            numbers.tolist(),
            self.config.sequence_length,
            lanes.vocabulary.pad_id,
            lanes.mixture,
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
        pin_memory=torch.cuda.is_available(),
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
) -> Iterator[tuple[str, Batch, bool]]:
    """(source, batch, counts): this rank's share of the first `num_rows` held-out rows, always the same.

    Held-out rows are dealt from all held-out blocks in turn, so every source is there; the rows of a batch
    are of one source. All ranks yield equally often (ZeRO-3's forward is collective): a rank whose share is
    used up yields the first batch once more, with False, which says that it does not count.
    """
    blocks = dataset.block_indices("heldout").tolist()
    rows = rows_in_turn(dataset, config, reader.seed, blocks)
    of_sources: dict[int, list[tuple[int, Row]]] = {}
    for number, (block, row) in enumerate(itertools.islice(rows, num_rows)):
        of_sources.setdefault(int(dataset.blocks["source"][block]), []).append((number, row))
    size = reader.micro_batch_size
    batches = [
        (dataset.sources[source], numbered[first : first + size])
        for source, numbered in sorted(of_sources.items())
        for first in range(0, len(numbered), size)
    ]
    pad_id, mixture = dataset.special_ids["[PAD]"], config.mixture
    for round_number in range(-(-len(batches) // reader.world_size)):
        place = round_number * reader.world_size + reader.rank
        counts = place < len(batches)
        source, numbered = batches[place if counts else 0]
        numbers, part = [number for number, _ in numbered], [row for _, row in numbered]
        yield source, collate(part, numbers, config.sequence_length, pad_id, mixture), counts


def heldout_rows(dataset: Dataset, config: DataConfig, seed: int, num_rows: int) -> list[Row]:
    """The first `num_rows` rows of the held-out split, one block after the other in turn."""
    blocks = dataset.block_indices("heldout").tolist()
    in_turn = rows_in_turn(dataset, config, seed, blocks)
    return [row for _, row in itertools.islice(in_turn, num_rows)]


def rows_in_turn(
    dataset: Dataset, config: DataConfig, seed: int, blocks: list[int]
) -> Iterator[tuple[int, Row]]:
    """(block, row) of some held-out blocks: a row of each in turn, until all are used up.

    A block is read when its first row is asked for, and held until its last.
    """
    vocabulary = Vocabulary.of(dataset.special_ids, dataset.vocab_size)
    mixture, masking = config.mixture, config.masking

    def rows_of(index: int) -> Iterator[Row]:
        key = stable_hash64(seed, "heldout", index)
        block = dataset.read_block(index)
        plan = plan_rows(block, config.sequence_length, config.packing, key, mixture)
        at_once = rows_at_once(config.sequence_length)
        for first in range(0, plan.num_rows, at_once):
            numbers = range(first, min(first + at_once, plan.num_rows))
            rows = make_rows(block, plan, numbers, vocabulary, masking, key)
            yield from map(rows.row, range(len(numbers)))

    return in_turn([zip(itertools.repeat(index), rows_of(index)) for index in blocks])


def in_turn(queues: list[Iterator[Item]]) -> Iterator[Item]:
    """One item of each queue in turn, until all are used up; none is begun before its turn."""
    while queues:
        still_open = []
        for queue in queues:
            for item in itertools.islice(queue, 1):
                yield item
                still_open.append(queue)
        queues = still_open
