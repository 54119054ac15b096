"""A dataset and a few integers in, the run's endless stream of rows out, from any point, on any rank.

A run has S lanes, fixed for its life. Row g of the run comes from lane g mod S. A lane is an
endless sequence of windows; a window is one reading of one block:

    source  = the weights' pick for window k of lane l      (exact counts in every period)
    q       = windows of that source this lane has had x S + l
    epoch, ordinal = divmod(q, blocks of the source)
    block   = permutation keyed by (seed, source, epoch) of the ordinal

So blocks, not shards, are dealt out, and there is no end of an epoch, no shuffle buffer, and
nothing that depends on how many ranks or workers read. A lane's whole state is its cursor.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.hashing import permute, stable_hash64
from data.masking import MASK_SHARE, RANDOM_SHARE, Masking, Vocabulary
from data.objectives import DEFAULT_RECIPE, Mixture, read_mixture
from data.rows import Row, RowPlan, Rows, make_rows, plan_rows, rows_at_once
from data.shards import Block, DamagedBlock, Dataset
from data.sources import MAX_WEIGHT_SUM, pick_source, training_sources
from data.storage import StorageOptions
from data.transfer import redact


@dataclass(frozen=True)
class DataConfig:
    """How rows are made from a prepared dataset."""

    path: str  # folder written by `cloze prepare`, or its URL (http, https, s3, gs)
    sequence_length: int = 128  # row slots, special tokens included
    packing: bool = True  # several sentence pairs in a row, or one
    num_lanes: int = (
        256  # fixed for the life of a run; ranks divide the smaller of it and the batch
    )
    # recipe -> integer share of rows: what they are made for (data/objectives.py)
    objectives: dict[str, int] = field(default_factory=lambda: {DEFAULT_RECIPE: 1})
    masked_fraction: float = 0.15  # of the tokens of a row (Devlin et al. 2019)
    mask_token_share: float = MASK_SHARE  # of the masked ones, shown as [MASK]
    random_token_share: float = RANDOM_SHARE  # shown as another token; the rest is shown as it is
    weights: dict[str, int] | None = None  # source -> integer share of windows; None: as prepared
    num_workers: int = 0  # loader processes per rank; 0: rows are made in the training process
    max_damaged_blocks: int = 0  # readings of a block that may fail and be passed over, in a run
    storage: StorageOptions = field(default_factory=StorageOptions)  # how a URL is read

    def __post_init__(self) -> None:
        problems = []
        if redact(self.path) != self.path:
            problems.append(
                f"data.path {redact(self.path)} holds a password or a query, which would be written into "
                "every checkpoint: put credentials into ~/.netrc or the store's environment variables"
            )
        if not 8 <= self.sequence_length <= 1 << 16:
            problems.append(f"data.sequence_length {self.sequence_length} is not in 8 to 65536")
        if self.num_lanes < 1:
            problems.append(f"data.num_lanes {self.num_lanes} is below 1")
        problems += self._objective_problems()
        for name in ("num_workers", "max_damaged_blocks"):
            if getattr(self, name) < 0:
                problems.append(f"data.{name} {getattr(self, name)} is negative")
        weights = self.weights or {}
        problems += [
            f"data.weights.{name} is {weight}: give an integer of at least 1, or leave {name} out"
            for name, weight in weights.items()
            if weight < 1
        ]
        if self.weights == {}:
            problems.append("data.weights is empty: name sources, or leave it out for all of them")
        if sum(weights.values()) > MAX_WEIGHT_SUM:
            problems.append(f"data.weights sum to {sum(weights.values())}, over {MAX_WEIGHT_SUM}")
        if problems:
            raise ValueError("; ".join(problems))

    def _objective_problems(self) -> list[str]:
        problems = []
        if not 0 < self.masked_fraction < 1:
            problems.append(f"data.masked_fraction {self.masked_fraction} is not between 0 and 1")
        shares = (self.mask_token_share, self.random_token_share)
        if min(shares) < 0 or sum(shares) > 1:
            problems.append(
                f"data.mask_token_share {shares[0]} and random_token_share {shares[1]} are not shares of 1"
            )
        try:
            read_mixture(self.objectives)
        except ValueError as error:
            problems.append(str(error))
        return problems

    @property
    def masking(self) -> Masking:
        return Masking(self.masked_fraction, self.mask_token_share, self.random_token_share)

    @property
    def mixture(self) -> Mixture:
        return read_mixture(self.objectives)


class Cursor(NamedTuple):
    """Where a lane stands, before the row it gives next."""

    window: int  # ordinal of the window the lane is in
    row: int  # rows of that window already given
    source: int  # that the window reads from, once a row of it was given; else -1
    counts: tuple[int, ...]  # windows finished so far, for each source


class Damage(NamedTuple):
    """A window that was passed over because its block cannot be read: part of the stream's state."""

    lane: int
    window: int
    block: int  # row of the block table


@dataclass(frozen=True)
class StreamState:
    """The whole state of the stream: row number and one cursor per lane. Written into checkpoints."""

    row: int  # the row the run takes next
    cursors: tuple[Cursor, ...]  # [num_lanes]
    damage: tuple[Damage, ...] = ()  # all that was ever passed over

    @classmethod
    def start(cls, num_lanes: int, num_sources: int) -> "StreamState":
        return cls(0, tuple(Cursor(0, 0, -1, (0,) * num_sources) for _ in range(num_lanes)))

    def to_json(self) -> dict[str, object]:
        lanes = [[c.window, c.row, c.source, *c.counts] for c in self.cursors]
        return {"row": self.row, "lanes": lanes, "damage": [list(d) for d in self.damage]}

    @classmethod
    def from_json(cls, value: dict) -> "StreamState":
        lanes = (Cursor(lane[0], lane[1], lane[2], tuple(lane[3:])) for lane in value["lanes"])
        return cls(value["row"], tuple(lanes), tuple(Damage(*d) for d in value["damage"]))


class Origin(NamedTuple):
    """Where a row comes from."""

    block: int  # row of the block table
    epoch: int  # of its source
    source: str
    key: int  # 64-bit address of this reading of the block, for `plan_rows` and `make_rows`
    row: int  # within that reading


@dataclass
class _Window:
    """A lane's open block. Its rows are assembled some at a time."""

    block: Block
    plan: RowPlan
    origin: Origin
    first: int = 0  # of the rows that are assembled
    rows: Rows | None = None


class Lanes:
    """Reads rows of the training split by their number in the run.

    Rows of one lane are asked for in ascending order (others may be left out, as when several
    workers share a lane). Only lanes that are asked for are ever opened.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, seed: int, state: StreamState) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed
        self.vocabulary = Vocabulary.of(dataset.special_ids, dataset.vocab_size)
        self.mixture, self.masking = config.mixture, config.masking
        self._at_once = rows_at_once(config.sequence_length)
        self.sources, self.blocks = training_sources(dataset, config.weights)
        self.damage = list(state.damage)
        self._check_state(state)
        self._cursors = list(state.cursors)
        self._given = [
            _rows_of_lane(lane, state.row, config.num_lanes) for lane in range(config.num_lanes)
        ]
        self._windows: dict[int, _Window] = {}

    def _check_state(self, state: StreamState) -> None:
        if len(state.cursors) != self.config.num_lanes:
            raise ValueError(
                f"the saved stream has {len(state.cursors)} lanes, data.num_lanes is {self.config.num_lanes}: "
                "the number of lanes is fixed for the life of a run"
            )
        if len(state.cursors[0].counts) != len(self.sources):
            raise ValueError(
                f"the saved stream has {len(state.cursors[0].counts)} sources, "
                f"the mixture now has {self.sources}"
            )

    def row(self, number: int) -> Row:
        """Row `number` of the run."""
        lane, window = self._pass(number)
        cursor = self._cursors[lane]
        at_once = self._at_once
        if window.rows is None or not 0 <= cursor.row - window.first < at_once:
            window.first = cursor.row - cursor.row % at_once
            stop = min(window.first + at_once, window.plan.num_rows)
            window.rows = make_rows(
                window.block,
                window.plan,
                range(window.first, stop),
                self.vocabulary,
                self.masking,
                window.origin.key,
            )
        row = window.rows.row(cursor.row - window.first)
        self._given_one(lane)
        return row

    def origin(self, number: int) -> Origin:
        """Where row `number` of the run comes from. Moves the lane on as `row` does, at less cost."""
        lane, window = self._pass(number)
        origin = window.origin._replace(row=self._cursors[lane].row)
        self._given_one(lane)
        return origin

    def cursor(self, lane: int) -> Cursor:
        return self._cursors[lane]

    def _given_one(self, lane: int) -> None:
        window, row, source, counts = self._cursors[lane]
        self._cursors[lane] = Cursor(window, row + 1, source, counts)
        self._given[lane] += 1

    def _pass(self, number: int) -> tuple[int, _Window]:
        """Move the lane of row `number` to it, past those that were not asked for: (lane, window)."""
        lane = number % self.config.num_lanes
        wanted = number // self.config.num_lanes
        assert wanted >= self._given[lane], f"row {number} of lane {lane} was already passed"
        window = self._windows.get(lane) or self._open(lane)
        if wanted == self._given[lane] and self._cursors[lane].row < window.plan.num_rows:
            return lane, window
        target = self._cursors[lane].row + wanted - self._given[lane]
        while target >= window.plan.num_rows:
            target -= window.plan.num_rows
            self._cursors[lane] = next_window(self._cursors[lane])
            window = self._open(lane)
        self._cursors[lane] = self._cursors[lane]._replace(row=target)
        self._given[lane] = wanted
        return lane, window

    def _open(self, lane: int) -> _Window:
        """Open the window a lane stands in, or the next one that is not damaged."""
        self._windows.pop(lane, None)
        while True:
            cursor = self._cursors[lane]
            source = cursor.source if cursor.source >= 0 else self._source_of(lane, cursor.window)
            epoch, ordinal = self._place(lane, source, cursor.counts[source])
            self._cursors[lane] = cursor._replace(source=source)
            block_index = self.blocks[source][ordinal]
            block = self._read(Damage(lane, cursor.window, block_index))
            if block is not None:
                break
            self._cursors[lane] = next_window(self._cursors[lane])
        name = self.sources[source]
        key = stable_hash64(self.seed, "window", name, epoch, ordinal)
        plan = plan_rows(block, self.config.sequence_length, self.config.packing, key, self.mixture)
        window = _Window(block, plan, Origin(block_index, epoch, name, key, 0))
        self._windows[lane] = window
        return window

    def _read(self, reading: Damage) -> Block | None:
        """The block of a window, None if it is to be passed over: was before, or is damaged now."""
        if reading in self.damage:
            return None
        try:
            return self.dataset.read_block(reading.block)
        except DamagedBlock as error:
            if len(self.damage) >= self.config.max_damaged_blocks:
                raise
            print(
                f"passing over a damaged block ({len(self.damage) + 1} so far): {error}", flush=True
            )
            self.damage.append(reading)
            return None

    def _source_of(self, lane: int, window: int) -> int:
        weights = list(self.config.weights.values()) if self.config.weights else [1]
        return pick_source(weights, stable_hash64(self.seed, "mix", lane), window)

    def block_of(self, lane: int, source: int, count: int) -> tuple[int, int]:
        """(epoch, row of the block table) of a lane's count-th window of a source."""
        epoch, ordinal = self._place(lane, source, count)
        return epoch, self.blocks[source][ordinal]

    def _place(self, lane: int, source: int, count: int) -> tuple[int, int]:
        """(epoch, which of the source's blocks) of a lane's count-th window of a source."""
        num_blocks = len(self.blocks[source])
        epoch, ordinal = divmod(count * self.config.num_lanes + lane, num_blocks)
        key = stable_hash64(self.seed, "epoch", self.sources[source], epoch)
        return epoch, permute(ordinal, num_blocks, key)


def next_window(cursor: Cursor) -> Cursor:
    """The cursor of a lane that is done with its window."""
    counts = tuple(n + (i == cursor.source) for i, n in enumerate(cursor.counts))
    return Cursor(cursor.window + 1, 0, -1, counts)


def _rows_of_lane(lane: int, row: int, num_lanes: int) -> int:
    """How many of the run's first `row` rows came from `lane`."""
    return (row - lane + num_lanes - 1) // num_lanes if row > lane else 0


def rows_of_batch(
    first_row: int, *, rank: int, world_size: int, global_batch_size: int, num_lanes: int
) -> np.ndarray:
    """int64 [global_batch_size / world_size]: the rows a rank trains on in a step, in order.

    first_row: of the step, over all ranks. Each lane belongs to one rank: with M = min(batch,
    lanes), row g goes to rank (g mod M) // (M / ranks). ValueError when batch, lanes and ranks do
    not divide.
    """
    check_division(world_size=world_size, global_batch_size=global_batch_size, num_lanes=num_lanes)
    rows = np.arange(first_row, first_row + global_batch_size, dtype=np.int64)
    width = min(global_batch_size, num_lanes)
    return rows[(rows % width) // (width // world_size) == rank]


def check_division(*, world_size: int, global_batch_size: int, num_lanes: int) -> None:
    """ValueError, with the numbers, unless every lane can belong to one rank."""
    if global_batch_size % num_lanes and num_lanes % global_batch_size:
        raise ValueError(
            f"global_batch_size {global_batch_size} and data.num_lanes {num_lanes}: one must divide the other"
        )
    width = min(global_batch_size, num_lanes)
    if width % world_size:
        allowed = [n for n in range(1, width + 1) if width % n == 0]
        raise ValueError(
            f"{world_size} ranks do not divide min(global_batch_size {global_batch_size}, data.num_lanes "
            f"{num_lanes}) = {width}; possible numbers of ranks: {allowed}"
        )
