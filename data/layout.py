"""Ranks, loader workers and lanes in, who reads what out; and what an open lane costs in memory.

The trainer's own rule is `data.lanes.rows_of_batch`; `check_owners` holds what is said here to it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from data.lanes import check_division, rows_of_batch
from data.rehearsal import Windows, estimated_pairs, estimated_rows
from data.rows import rows_at_once

PAIR_BYTES = 56  # six int64 of data.pairs.Pairs and one of RowPlan.order
ROW_BYTES = 8  # RowPlan.starts
SLOT_BYTES = 28  # of an assembled row, at most: 7 of mlm (ids, types, masks), 21 of clm, 28 of rtd
BATCH_SLOT_BYTES = 28  # of a micro-batch's tensors: three int64 and one int32
PREFETCHED = 2  # micro-batches that the loader keeps ready for each worker


@dataclass(frozen=True)
class Layout:
    """How a run's rows are dealt out. num_workers 0: rows are made in the training process."""

    num_ranks: int
    num_workers: int
    micro_batch_size: int
    global_batch_size: int
    num_lanes: int

    def problems(self) -> list[str]:
        """Why a run cannot be laid out so: the trainer would refuse it, too."""
        problems = []
        for name in ("num_ranks", "micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                problems.append(f"{name} {getattr(self, name)} is below 1")
        if problems:
            return problems
        try:
            check_division(
                world_size=self.num_ranks,
                global_batch_size=self.global_batch_size,
                num_lanes=self.num_lanes,
            )
        except ValueError as error:
            problems.append(str(error))
        slots = self.micro_batch_size * self.num_ranks
        if self.global_batch_size % slots:
            problems.append(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {self.num_ranks} ranks = {slots}"
            )
        return problems

    @property
    def lanes_per_rank(self) -> int:
        return self.num_lanes // self.num_ranks


class ReaderMemory(NamedTuple):
    """Bytes that the data of one rank takes, by estimate, beside its processes themselves."""

    lane: int  # one open lane: its block, its plan, its assembled rows
    worker: int  # the worker with most lanes; without workers, the rank
    rank: int  # all of its workers, and the micro-batches they keep ready


def possible_ranks(layout: Layout) -> list[int]:
    """Every number of ranks that this batch, micro-batch and number of lanes allow."""
    width = min(layout.global_batch_size, layout.num_lanes)
    return [
        n
        for n in range(1, width + 1)
        if width % n == 0 and layout.global_batch_size % (n * layout.micro_batch_size) == 0
    ]


def lane_owners(layout: Layout) -> np.ndarray:
    """int64 [num_lanes]: the rank that each lane belongs to."""
    width = min(layout.global_batch_size, layout.num_lanes)
    return np.arange(layout.num_lanes) % width // (width // layout.num_ranks)


def check_owners(layout: Layout) -> list[str]:
    """What is wrong with how the trainer deals the rows of a round of all lanes to the ranks.

    Every row must go to one rank, and all rows of a lane to the same. Empty when so.
    """
    owners, batch = lane_owners(layout), layout.global_batch_size
    problems: list[str] = []
    for first_row in range(0, max(batch, layout.num_lanes), batch):
        seen = np.zeros(batch, dtype=np.int64)
        for rank in range(layout.num_ranks):
            rows = rows_of_batch(
                first_row,
                rank=rank,
                world_size=layout.num_ranks,
                global_batch_size=batch,
                num_lanes=layout.num_lanes,
            )
            seen[rows - first_row] += 1
            if (owners[rows % layout.num_lanes] != rank).any():
                problems.append(f"rank {rank} reads lanes of others from row {first_row} on")
        if (seen != 1).any():
            problems.append(
                f"{(seen != 1).sum()} rows from row {first_row} on are not read just once"
            )
    return problems


def lane_readers(layout: Layout) -> np.ndarray:
    """bool [workers, lanes of a rank]: which loader workers of a rank open which of its lanes.

    A rank's rows come from its lanes in turn; micro-batch j is made by worker j mod workers. A lane that
    several workers share is opened, and its blocks are read, by each of them.
    """
    lanes, workers = layout.lanes_per_rank, max(1, layout.num_workers)
    period = math.lcm(lanes, layout.micro_batch_size * workers)
    row = np.arange(period)
    readers = np.zeros((workers, lanes), dtype=bool)
    readers[row // layout.micro_batch_size % workers, row % lanes] = True
    return readers


def readings_per_window(layout: Layout) -> float:
    """How often a rank's processes read each block that its lanes open: 1 when no lane is shared."""
    return float(lane_readers(layout).sum(axis=0).mean())


def reader_memory(
    table: np.ndarray, layout: Layout, sequence_length: int, packing: bool
) -> ReaderMemory:
    """What the blocks, plans and rows of a rank's open lanes take, with the largest of the blocks.

    lane = bytes of the block + PAIR_BYTES x pairs + ROW_BYTES x rows + rows at once x slots x SLOT_BYTES
    """
    pairs = estimated_pairs(table, sequence_length)
    rows = estimated_rows(table, sequence_length, packing)
    plan = PAIR_BYTES * pairs + ROW_BYTES * rows
    lane = (
        int((table["nbytes"] + plan).max())
        + rows_at_once(sequence_length) * sequence_length * SLOT_BYTES
    )
    readers = lane_readers(layout)
    batch = layout.micro_batch_size * sequence_length * BATCH_SLOT_BYTES
    ready = PREFETCHED * layout.num_workers * batch
    return ReaderMemory(
        lane, lane * int(readers.sum(axis=1).max()), lane * int(readers.sum()) + ready
    )


def readings_digest(windows: Windows, stretches: list[tuple[int, Layout]]) -> tuple[int, str]:
    """(number, digest) of all that is read by jobs of different layouts, one after the other.

    stretches: the row at which each job begins, ascending, and its layout. Each rank's readings are
    gathered by themselves, then brought into the run's order, as its rows are.
    """
    ends = [row for row, _ in stretches[1:]] + [int(windows.opened.max()) + 1]
    readings = np.stack(windows[:6], axis=1)
    parts = []
    for (start, layout), end in zip(stretches, ends, strict=True):
        mine = readings[(windows.opened >= start) & (windows.opened < end)]
        by_rank = np.argsort(lane_owners(layout)[mine[:, 0]], kind="stable")
        parts.append(mine[by_rank])
    merged = np.concatenate(parts)
    merged = merged[np.argsort(merged[:, 5], kind="stable")]
    return len(merged), xxhash.xxh3_128_hexdigest(merged.tobytes())
