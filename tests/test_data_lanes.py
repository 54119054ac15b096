"""The stream: the same rows for any number of ranks, workers and stops; every block once per epoch."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_rows import RECIPES

from data.batch import (
    Reader,
    StreamItem,
    build_loader,
    commit,
    evaluation_batches,
    heldout_rows,
)
from data.collate import collate
from data.lanes import Cursor, DataConfig, Lanes, StreamState, rows_of_batch
from data.objectives import CAUSAL, TASKS
from data.pairs import UNLABELLED
from data.rows import plan_rows
from data.shards import Dataset
from data.sources import pick_source

SEED = 3


@pytest.fixture(scope="module")
def config(tiny_dataset: Path) -> DataConfig:
    return DataConfig(path=str(tiny_dataset), sequence_length=64, num_lanes=16)


@pytest.fixture(scope="module")
def reference(config: DataConfig) -> list[int]:
    """Digests of the first 512 rows, read one after the other."""
    dataset = Dataset.open(config.path)
    lanes = Lanes(dataset, config, SEED, StreamState.start(16, 1))
    return [lanes.row(number).digest(number) for number in range(512)]


def read_steps(
    config: DataConfig, state: StreamState, steps: int, *, world_size: int, micro: int, batch: int
) -> tuple[list[int], StreamState]:
    """(digest of each micro-batch in row order, state after `steps` steps) over all ranks."""
    digests: dict[int, int] = {}
    cursors: dict[int, Cursor] = {}
    for rank in range(world_size):
        reader = Reader(rank, world_size, micro, batch, SEED)
        loader = build_loader(config, reader, state)
        for item in itertools.islice(loader, steps * reader.accumulation):
            digests[item.first_row] = item.batch.rows_digest
            cursors |= item.cursors
    after = commit(state, state.row + steps * batch, cursors)
    return [digests[row] for row in sorted(digests)], after


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (4, 0), (2, 3), (16, 0)])
def test_ranks_and_workers_change_nothing(
    world_size: int, workers: int, config: DataConfig, reference: list[int]
) -> None:
    config = replace(config, num_workers=workers)
    state = StreamState.start(16, 1)
    digests, _ = read_steps(config, state, 8, world_size=world_size, micro=1, batch=16)
    assert [d % 2**64 for d in digests] == reference[:128]


def test_stops_at_any_step_and_changes_of_batch_size(
    config: DataConfig, reference: list[int]
) -> None:
    """State goes through JSON at every stop; batch 4 to 64 over 16 lanes; 1 to 16 ranks."""
    plan = [(4, 1, 8), (8, 2, 4), (16, 4, 4), (64, 16, 2), (32, 8, 1), (4, 4, 8), (64, 2, 3)]
    state, seen = StreamState.start(16, 1), []
    for batch, world_size, steps in plan:
        state = StreamState.from_json(json.loads(json.dumps(state.to_json())))
        digests, state = read_steps(
            config, state, steps, world_size=world_size, micro=1, batch=batch
        )
        seen += digests
    assert state.row == len(seen) >= 400
    assert [d % 2**64 for d in seen] == reference[: len(seen)]


def test_a_fetched_batch_that_was_not_trained_on_comes_again(config: DataConfig) -> None:
    reader = Reader(0, 1, 8, 16, SEED)
    loader = build_loader(replace(config, num_workers=1), reader, StreamState.start(16, 1))
    items = [next(loader) for _ in range(6)]  # three steps fetched, the loader is further ahead
    state = StreamState.start(16, 1)
    for item in items[:2]:
        state = commit(state, 16, item.cursors)
    again = build_loader(config, reader, state)
    assert next(again).batch.rows_digest == items[2].batch.rows_digest


def test_every_block_once_per_epoch(config: DataConfig) -> None:
    dataset = Dataset.open(config.path)
    lanes = Lanes(dataset, config, SEED, StreamState.start(16, 1))
    blocks = dataset.block_indices("train")
    readings: Counter[tuple[int, int]] = Counter()
    for count in range(len(blocks) * 3 // 16 + 1):
        readings.update(lanes.block_of(lane, 0, count) for lane in range(16))
    complete = [(epoch, block) for epoch in range(3) for block in blocks.tolist()]
    assert all(readings[reading] == 1 for reading in complete)
    first = [block for epoch, block in readings if epoch == 0]
    second = [block for epoch, block in readings if epoch == 1]
    assert sorted(first) == sorted(second) and first != second


def test_mixing_by_integer_weights_is_exact(config: DataConfig) -> None:
    weighted = replace(config, weights={"first": 1, "second": 3})
    dataset = Dataset.open(config.path)
    lanes = Lanes(dataset, weighted, SEED, StreamState.start(16, 2))
    assert lanes.sources == ["first", "second"]
    for lane in range(4):
        for period in range(5):
            windows = range(period * 4, period * 4 + 4)
            assert Counter(lanes._source_of(lane, window) for window in windows) == {0: 1, 1: 3}
    assert {pick_source([1, 3], 9, w) for w in range(8)} == {0, 1}
    digests, state = read_steps(
        weighted, StreamState.start(16, 2), 120, world_size=2, micro=4, batch=16
    )
    one_rank, same_state = read_steps(
        weighted, StreamState.start(16, 2), 120, world_size=1, micro=4, batch=16
    )
    assert (digests, state) == (one_rank, same_state)
    assert sum(sum(cursor.counts) for cursor in state.cursors) > 0


def test_rows_belong_to_one_rank_each() -> None:
    for batch, lanes, world_size in [(16, 64, 4), (64, 16, 8), (32, 32, 2)]:
        lane_owner: dict[int, int] = {}
        rows: list[int] = []
        for step in range(6):
            for rank in range(world_size):
                mine = rows_of_batch(
                    step * batch,
                    rank=rank,
                    world_size=world_size,
                    global_batch_size=batch,
                    num_lanes=lanes,
                )
                assert len(mine) == batch // world_size
                rows += mine.tolist()
                for row in mine.tolist():
                    assert lane_owner.setdefault(row % lanes, rank) == rank
        assert sorted(rows) == list(range(6 * batch))


@pytest.mark.parametrize(
    ("batch", "lanes", "world_size", "message"),
    [
        (24, 16, 1, "one must divide the other"),
        (
            32,
            16,
            3,
            r"3 ranks do not divide .* = 16; possible numbers of ranks: \[1, 2, 4, 8, 16\]",
        ),
    ],
)
def test_numbers_that_do_not_divide(batch: int, lanes: int, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of_batch(0, rank=0, world_size=world_size, global_batch_size=batch, num_lanes=lanes)


def test_state_of_another_shape_is_refused(config: DataConfig) -> None:
    dataset = Dataset.open(config.path)
    with pytest.raises(ValueError, match="saved stream has 8 lanes"):
        Lanes(dataset, config, SEED, StreamState.start(8, 1))
    with pytest.raises(ValueError, match="saved stream has 2 sources"):
        Lanes(dataset, config, SEED, StreamState.start(16, 2))


def test_batch_layout(config: DataConfig) -> None:
    reader = Reader(0, 1, 8, 8, SEED)
    item: StreamItem = next(build_loader(config, reader, StreamState.start(16, 1)))
    batch = item.batch
    filled = batch.sequence_ids >= 0
    assert batch.num_tokens == int(filled.sum()) and batch.input_ids.shape == (8, 64)
    assert (batch.input_ids[~filled] == 0).all()
    starts = torch.nonzero(batch.position_ids.eq(0) & filled)
    flat = batch.input_ids.flatten()
    assert (flat[starts[:, 0] * 64 + starts[:, 1]] == 2).all()  # every sequence begins with [CLS]
    assert list(batch.targets) == ["mlm", "nsp"] and batch.visible is None
    pairs, masked = batch.targets["nsp"], batch.targets["mlm"]
    assert (flat[pairs.slots] == 2).all() and len(pairs.slots) == len(pairs.labels)
    assert masked.labels.min() >= 5  # no special token is ever to be predicted
    assert len(masked.labels) / batch.num_tokens == pytest.approx(0.14, abs=0.02)
    assert batch.num_labels == {"mlm": len(masked.labels), "nsp": len(pairs.labels)}
    for row in range(8):
        of_slot = batch.sequence_ids[row][filled[row]]
        places = [int((of_slot[:slot] == own).sum()) for slot, own in enumerate(of_slot)]
        assert batch.position_ids[row][filled[row]].tolist() == places
        assert (of_slot.diff() >= 0).all() and of_slot.unique().tolist() == list(
            range(of_slot[-1] + 1)
        )
    lengths = [int((batch.sequence_ids[r] == s).sum()) for r in range(8) for s in range(64)]
    assert batch.sequence_lengths.tolist() == [length for length in lengths if length]


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_rows_are_fixed_and_complete(packing: bool, config: DataConfig) -> None:
    config = replace(config, packing=packing)
    dataset = Dataset.open(config.path)
    rows = heldout_rows(dataset, config, SEED, num_rows=10**9)
    plans = [
        plan_rows(dataset.read_block(int(i)), 64, packing, 0)
        for i in dataset.block_indices("heldout")
    ]
    assert len(rows) == pytest.approx(sum(plan.num_rows for plan in plans), rel=0.1)
    per_world = []
    for world_size in (1, 3):
        batches = [
            list(evaluation_batches(dataset, config, Reader(rank, world_size, 4, 12, SEED), 50))
            for rank in range(world_size)
        ]
        assert len({len(mine) for mine in batches}) == 1  # every rank goes round equally often
        per_world.append(
            sorted(b.rows_digest for mine in batches for _, b, counts in mine if counts)
        )
    assert per_world[0] == per_world[1]


@pytest.mark.parametrize("objectives", [
    dict.fromkeys(RECIPES, 1), {"rtd+sop": 1, "mlm": 1, "span+nsp": 0}, {"clm": 1}, {"contrastive": 1},
], ids=lambda mixture: " ".join(mixture)[:30])  # fmt: skip
def test_a_batch_asks_what_its_rows_ask(objectives: dict, config: DataConfig) -> None:
    """Every task of the mixture is there, with the rows' own labels at the rows' own slots."""
    config = replace(config, objectives=objectives)
    dataset = Dataset.open(config.path)
    lanes = Lanes(dataset, config, SEED, StreamState.start(16, 1))
    rows = [lanes.row(number) for number in range(48)]
    batch = collate(rows, list(range(48)), 64, 0, config.mixture)
    recipes = {recipe.key: recipe for recipe in config.mixture.recipes}
    expected: dict[str, list] = {task: [] for task in config.mixture.tasks}
    for number, row in enumerate(rows):
        recipe, first = recipes[int(row.recipe[0])], number * 64
        for slot, label in zip(
            row.masked_positions.tolist(), row.masked_labels.tolist(), strict=True
        ):
            expected[recipe.masked_task or ""].append((first + slot, label))
        starts = np.cumsum(row.sequence_lengths) - row.sequence_lengths
        for start, label in zip(starts.tolist(), row.pair_labels.tolist(), strict=True):
            if label != UNLABELLED:
                expected[recipe.paired or ""].append((first + start, label))
        for pair, label, task in zip(
            row.asked_slots.tolist(),
            row.asked_labels.tolist(),
            row.asked_tasks.tolist(),
            strict=True,
        ):
            name = TASKS[task]
            slots = (
                [first + pair[0], first + pair[1]]
                if name in ("relative", "cpc")
                else first + pair[0]
            )
            expected[name].append((slots, label))
        if batch.visible is not None:
            num_filled = len(row.input_ids)
            assert batch.visible[number, :num_filled].tolist() == row.seen.tolist()
            assert (batch.visible[number, num_filled:] == 63).all()
    assert list(batch.targets) == list(config.mixture.tasks)
    assert (batch.visible is not None) == any(
        recipe.tokens in CAUSAL for recipe in recipes.values()
    )
    for task, (slots, labels) in batch.targets.items():
        assert slots.dtype == labels.dtype == torch.int64
        assert slots.shape == ((len(labels), 2) if task in ("relative", "cpc") else (len(labels),))
        assert list(zip(slots.tolist(), labels.tolist(), strict=True)) == expected[task], task
    assert sum(batch.num_labels.values()) > 0


def test_stream_state_is_small() -> None:
    state = StreamState(10**12, tuple(Cursor(10**6, 500, 0, (10**6,)) for _ in range(1024)))
    assert len(json.dumps(state.to_json())) < 40_000


def test_real_text_has_both_labels_and_few_lone_tokens(config: DataConfig) -> None:
    dataset = Dataset.open(config.path)
    labels = np.concatenate(
        [
            plan_rows(dataset.read_block(int(i)), 64, True, 1).pairs.label
            for i in dataset.block_indices("train")
        ]
    )
    assert (labels == UNLABELLED).mean() < 0.01
    assert 0.38 < (labels == 1).mean() < 0.52  # blocks of a few documents cannot exchange every B
