"""A block table and a run's numbers in, every block reading to come out: a run rehearsed without reading.

A window is one reading of a block by one lane (data/lanes.py). Which blocks the lanes read, and in
which order, follows from the block table and the seed; when, from how many rows a block gives, which
is estimated from its counts. `keyed_permutation` and `picked_sources` are array twins of
`data.hashing.permute` and `data.sources.pick_source`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.cutting import NUM_SPECIAL
from data.hashing import GOLDEN, MASK64, hash_positions, mix64, stable_hash64
from data.lanes import Cursor, DataConfig, StreamState
from data.shards import BLOCK_DTYPE, Dataset
from data.sources import training_sources

MAX_WINDOWS = 1 << 23  # of one rehearsal: some 500 MB of arrays
BLOCK_TOKENS, DOCUMENT_TOKENS, SENTENCE_TOKENS = 1 << 18, 600, 24  # of an imagined dataset
FULL = 0.99  # of a packed row's slots hold tokens (docs/data-format.md)


@dataclass(frozen=True)
class Streams:
    """The streams that a run mixes, and the blocks of each."""

    table: np.ndarray  # [num_blocks] BLOCK_DTYPE
    names: list[str]
    blocks: list[np.ndarray]  # int64: rows of `table`, by ordinal
    weights: list[int]

    @classmethod
    def of(cls, dataset: Dataset, weights: dict[str, int] | None) -> "Streams":
        """ValueError when a weight names no source, or one without training blocks."""
        names, rows = training_sources(dataset, weights)
        empty = [name for name, blocks in zip(names, rows, strict=True) if not len(blocks)]
        if empty:
            raise ValueError(f"{dataset.place} has no training blocks")
        blocks = [part[np.arange(len(part))] for part in rows]
        shares = list(weights.values()) if weights else [1]
        return cls(np.asarray(dataset.blocks), names, blocks, shares)

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def shares(self) -> list[float]:
        """Of the windows, for each stream."""
        return [weight / sum(self.weights) for weight in self.weights]


class Windows(NamedTuple):
    """Windows in the order in which the run opens them. All arrays are int64 [num_windows]."""

    lane: np.ndarray
    window: np.ndarray  # ordinal within the lane
    source: np.ndarray
    epoch: np.ndarray  # of the source
    block: np.ndarray  # row of the block table
    opened: np.ndarray  # the run's row at which the lane opens it
    num_rows: np.ndarray  # that it gives, by estimate


class Coverage(NamedTuple):
    """How often the blocks of a source are read in its first epoch."""

    source: str
    num_blocks: int
    num_missing: int
    num_repeated: int


def keyed_permutation(index: np.ndarray, n: int, key: int | np.ndarray) -> np.ndarray:
    """int64: `permute(index, n, key)` of each element; key: 64 bits, one or one of each element."""
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape)
    result = index.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        value, own = result[walking], keys[walking]
        left, right = value >> half_bits, value & half_mask
        for round_number in range(4):
            step = np.uint64(GOLDEN * (round_number + 1) & MASK64)
            mixed = mix64(own + step + (right << np.uint64(3)))
            left, right = right, left ^ (mixed & half_mask)
        value = left << half_bits | right
        result[walking] = value
        walking = walking[value >= np.uint64(n)]
    return result.astype(np.int64)


def picked_sources(weights: list[int], seed: int, num_lanes: int, num_windows: int) -> np.ndarray:
    """int64 [num_lanes, num_windows]: what each lane's windows read from, as `pick_source` has it."""
    period = sum(weights)
    if period == 1:
        return np.zeros((num_lanes, num_windows), dtype=np.int64)
    num_cycles = -(-num_windows // period)
    cycle_keys = [
        [stable_hash64(key, cycle) for cycle in range(num_cycles)]
        for key in (stable_hash64(seed, "mix", lane) for lane in range(num_lanes))
    ]
    keys = np.repeat(np.array(cycle_keys, dtype=np.uint64), period, axis=1)[:, :num_windows]
    positions = np.broadcast_to(np.arange(num_windows) % period, keys.shape)
    slots = keyed_permutation(positions.ravel(), period, keys.ravel())
    return np.searchsorted(np.cumsum(weights), slots, side="right").reshape(keys.shape)


def estimated_pairs(table: np.ndarray, sequence_length: int) -> np.ndarray:
    """float64 [len(table)]: pairs that a block is cut into, from its counts alone.

    A document gives one pair for each row it fills, and one or two for what is left of it.
    """
    full = table["num_tokens"] / (sequence_length - NUM_SPECIAL)
    return table["num_documents"] + full


def estimated_rows(table: np.ndarray, sequence_length: int, packing: bool) -> np.ndarray:
    """int64 [len(table)]: rows that a block gives, from its counts alone; at least 1.

    Packed rows are FULL: tokens and the special tokens of all pairs over their slots. Else a row is one
    pair, and the end of a document is a row of its own.
    """
    pairs = estimated_pairs(table, sequence_length)
    if packing:
        rows = (table["num_tokens"] + NUM_SPECIAL * pairs) / (FULL * sequence_length)
    else:
        rows = pairs - table["num_documents"] / 2
    return np.maximum(1, np.rint(rows)).astype(np.int64)


def epoch_rows(streams: Streams, config: DataConfig) -> int:
    """Rows, by estimate, until every source has been read once."""
    means = [
        float(estimated_rows(streams.table[rows], config.sequence_length, config.packing).mean())
        for rows in streams.blocks
    ]
    mean = sum(share * rows for share, rows in zip(streams.shares, means, strict=True))
    passes = max(len(b) / share for b, share in zip(streams.blocks, streams.shares, strict=True))
    return round(passes * mean)


def simulate(streams: Streams, config: DataConfig, seed: int, num_rows: int) -> Windows:
    """Every window that is opened within the first `num_rows` rows of a run.

    ValueError when there are more than MAX_WINDOWS.
    """
    num_lanes = config.num_lanes
    rows_per_lane = -(-num_rows // num_lanes)
    num_windows = 2
    while True:
        grid = _window_grid(streams, config, seed, num_windows)
        ends = np.cumsum(grid.num_rows, axis=1)
        if int(ends[:, -1].min()) >= rows_per_lane:
            break
        slowest = max(1.0, float(ends[:, -1].min()))
        num_windows = 1 + max(
            num_windows + 1, int(1.05 * num_windows * rows_per_lane / slowest) + 1
        )
        if num_windows * num_lanes > MAX_WINDOWS:
            raise ValueError(
                f"{num_rows:,} rows open over {MAX_WINDOWS:,} windows: rehearse fewer steps (--steps)"
            )
    starts = ends - grid.num_rows
    opened = starts * num_lanes + np.arange(num_lanes)[:, None]
    within = np.flatnonzero(opened.ravel() < num_rows)
    order = within[np.argsort(opened.ravel()[within], kind="stable")]
    return Windows(
        *(np.broadcast_to(field, opened.shape).ravel()[order] for field in grid[:5]),
        opened=opened.ravel()[order],
        num_rows=grid.num_rows.ravel()[order],
    )


def _window_grid(streams: Streams, config: DataConfig, seed: int, num_windows: int) -> Windows:
    """The first windows of every lane: arrays [num_lanes, num_windows], `opened` empty."""
    num_lanes = config.num_lanes
    source = picked_sources(streams.weights, seed, num_lanes, num_windows)
    lanes = np.arange(num_lanes)[:, None]
    block, epochs = np.zeros_like(source), np.zeros_like(source)
    for index in range(len(streams.names)):
        here = source == index
        count = np.cumsum(here, axis=1) - 1
        q = (count * num_lanes + lanes)[here]
        epochs[here], block[here] = _blocks_of(streams, seed, index, q)
    rows = estimated_rows(streams.table[block], config.sequence_length, config.packing)
    window = np.arange(num_windows)[None, :]
    return Windows(lanes, window, source, epochs, block, block[:0], rows)


def _blocks_of(
    streams: Streams, seed: int, source: int, q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, row of the block table) of the q-th windows of a source, over all lanes."""
    blocks = streams.blocks[source]
    epoch, ordinal = np.divmod(q, len(blocks))
    epochs, which = np.unique(epoch, return_inverse=True)
    keys = [stable_hash64(seed, "epoch", streams.names[source], e) for e in epochs.tolist()]
    own = np.array(keys, dtype=np.uint64)[which]
    return epoch, blocks[keyed_permutation(ordinal, len(blocks), own)]


def coverage(streams: Streams, seed: int) -> list[Coverage]:
    """Whether the first epoch of every source reads each of its blocks once."""
    found = []
    for index, name in enumerate(streams.names):
        blocks = streams.blocks[index]
        _, read = _blocks_of(streams, seed, index, np.arange(len(blocks)))
        times = np.bincount(np.searchsorted(blocks, read), minlength=len(blocks))
        found.append(Coverage(name, len(blocks), int((times == 0).sum()), int((times > 1).sum())))
    return found


def state_after(windows: Windows, num_rows: int, num_lanes: int, num_sources: int) -> StreamState:
    """The stream's state once `num_rows` rows are given: what a checkpoint would hold."""
    order = np.lexsort((windows.window, windows.lane))
    lane = windows.lane[order]
    last = np.flatnonzero(np.append(lane[1:] != lane[:-1], True))
    finished = np.ones(len(order), dtype=bool)
    finished[last] = False
    counts = np.zeros((num_lanes, num_sources), dtype=np.int64)
    np.add.at(counts, (lane[finished], windows.source[order][finished]), 1)
    cursors = [Cursor(0, 0, -1, (0,) * num_sources)] * num_lanes
    for place in order[last].tolist():
        own = int(windows.lane[place])
        given = (num_rows - int(windows.opened[place]) + num_lanes - 1) // num_lanes
        cursors[own] = Cursor(
            int(windows.window[place]),
            given,
            int(windows.source[place]),
            tuple(counts[own].tolist()),
        )
    return StreamState(num_rows, tuple(cursors))


def imagined_dataset(num_blocks: int) -> Dataset:
    """A block table without blocks: full ones of 2^18 tokens of u16, in documents of 600 tokens."""
    table = np.zeros(num_blocks, dtype=BLOCK_DTYPE)
    lack = hash_positions(0, num_blocks) % np.uint64(DOCUMENT_TOKENS)
    tokens = BLOCK_TOKENS - lack.astype(np.int64)  # the next document did not fit
    table["num_tokens"] = tokens
    table["num_documents"] = tokens // DOCUMENT_TOKENS
    table["num_sentences"] = tokens // SENTENCE_TOKENS
    sizes = tokens * 2 + tokens // 8 + 16 * table["num_documents"] + 2 * table["num_sentences"]
    table["nbytes"] = sizes + 6 * 768  # headers, and padding to 512 bytes
    manifest: dict[str, Any] = {
        "vocab_size": 1 << 15,
        "token_dtype": "u16",
        "tokenizer": {"special_ids": {}},
        "sources": {"imagined": {}},
    }
    return Dataset(Path("imagined"), manifest, "", table)
