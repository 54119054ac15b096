"""What is rehearsed is what a run then reads: the same blocks, in the same order, by the same readers."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from people_support import command
from support import tiny_preset

from data.hashing import permute, stable_hash64
from data.lanes import DataConfig, Lanes, StreamState, rows_of_batch
from data.layout import (
    SLOT_BYTES,
    Layout,
    check_owners,
    lane_owners,
    lane_readers,
    possible_ranks,
    reader_memory,
    readings_digest,
    readings_per_window,
    rows_at_once,
)
from data.rehearsal import (
    Streams,
    coverage,
    epoch_rows,
    estimated_pairs,
    estimated_rows,
    keyed_permutation,
    picked_sources,
    simulate,
    state_after,
)
from data.rows import plan_rows
from data.shards import Dataset
from data.sources import pick_source
from launcher import rehearse

SEED = 3
MIXTURES = [None, {"first": 1, "second": 2}]


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> Dataset:
    return Dataset.open(tiny_dataset)


@pytest.fixture(scope="module")
def config(tiny_dataset: Path) -> DataConfig:
    return DataConfig(str(tiny_dataset), sequence_length=64, num_lanes=16)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 256, 1000, 4097])
@pytest.mark.parametrize("key", [0, 12345, 2**64 - 1])
def test_the_permutation_agrees_with_its_slow_twin(n: int, key: int) -> None:
    fast = keyed_permutation(np.arange(n), n, key)
    assert fast.tolist() == [permute(index, n, key) for index in range(n)]
    keys = [stable_hash64(key, index) for index in range(n)]
    fast = keyed_permutation(np.arange(n), n, np.array(keys, dtype=np.uint64))
    assert fast.tolist() == [permute(index, n, own) for index, own in enumerate(keys)]


@pytest.mark.parametrize("weights", [[1], [4], [3, 1, 2], [1, 99]])
def test_the_mixture_agrees_with_its_slow_twin(weights: list[int]) -> None:
    picked = picked_sources(weights, SEED, num_lanes=6, num_windows=130)
    for lane, windows in enumerate(picked.tolist()):
        key = stable_hash64(SEED, "mix", lane)
        assert windows == [pick_source(weights, key, window) for window in range(130)]


@pytest.mark.parametrize("weights", MIXTURES)
def test_windows_are_those_that_lanes_open(
    dataset: Dataset, config: DataConfig, weights: dict[str, int] | None
) -> None:
    """Real lanes, row by row, over more than an epoch; rows of a block are estimated within 3 %."""
    config = replace(config, weights=weights)
    streams = Streams.of(dataset, weights)
    num_rows = epoch_rows(streams, config)
    windows = simulate(streams, config, SEED, num_rows)
    lanes = Lanes(dataset, config, SEED, StreamState.start(config.num_lanes, len(streams.names)))
    opened: dict[int, list[tuple[int, int]]] = {lane: [] for lane in range(config.num_lanes)}
    for number in range(int(num_rows * 1.1)):
        origin = lanes.origin(number)
        if origin.row == 0:
            opened[number % config.num_lanes].append((origin.epoch, origin.block))
    for lane, real in opened.items():
        mine = windows.lane == lane
        found = list(zip(windows.epoch[mine].tolist(), windows.block[mine].tolist(), strict=True))
        assert len(found) > 8 and found == real[: len(found)]
        assert windows.window[mine].tolist() == list(range(len(found)))
    total = sum(
        plan_rows(dataset.read_block(index), 64, True, 1).num_rows
        for index in dataset.block_indices("train").tolist()
    )
    train = dataset.blocks[dataset.block_indices("train")]
    assert estimated_rows(train, 64, True).sum() == pytest.approx(total, rel=0.03)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("sequence_length", [32, 128])
def test_estimates_of_rows_pairs_and_memory(
    dataset: Dataset, sequence_length: int, packing: bool
) -> None:
    train = dataset.block_indices("train")
    table = dataset.blocks[train]
    blocks = [dataset.read_block(index) for index in train.tolist()]
    plans = [plan_rows(block, sequence_length, packing, 7) for block in blocks]
    rows = sum(plan.num_rows for plan in plans)
    pairs = sum(len(plan.order) for plan in plans)
    assert estimated_rows(table, sequence_length, packing).sum() == pytest.approx(rows, rel=0.1)
    assert estimated_pairs(table, sequence_length).sum() == pytest.approx(pairs, rel=0.2)
    real = max(
        int(row["nbytes"]) + sum(a.nbytes for a in (*plan.pairs, plan.order, plan.starts))
        for row, plan in zip(table, plans, strict=True)
    )
    layout = Layout(1, 0, 4, 16, 16)
    memory = reader_memory(table, layout, sequence_length, packing)
    assert (
        real
        <= memory.lane
        <= 1.2 * real + rows_at_once(sequence_length) * sequence_length * SLOT_BYTES
    )
    assert memory.rank == memory.worker == 16 * memory.lane


@pytest.mark.parametrize("weights", MIXTURES)
def test_an_epoch_reads_every_block_once(dataset: Dataset, weights: dict[str, int] | None) -> None:
    for found in coverage(Streams.of(dataset, weights), SEED):
        assert found.num_blocks > 60
        assert (found.num_missing, found.num_repeated) == (0, 0)


LAYOUTS = [
    Layout(1, 0, 4, 16, 16),
    Layout(2, 3, 2, 16, 16),
    Layout(4, 2, 2, 32, 16),
    Layout(2, 2, 1, 4, 16),
    Layout(4, 4, 2, 8, 16),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_readers_of_lanes_are_those_of_the_loader(layout: Layout) -> None:
    """Worker w of W makes micro-batches w, w + W, ... of the rows that the trainer deals to a rank."""
    assert layout.problems() == [] and check_owners(layout) == []
    owners, readers = lane_owners(layout), lane_readers(layout)
    workers = max(1, layout.num_workers)
    for rank in range(layout.num_ranks):
        touched: dict[int, set[int]] = {worker: set() for worker in range(workers)}
        number = 0
        for step in range(layout.num_lanes * workers):
            mine = rows_of_batch(
                step * layout.global_batch_size,
                rank=rank,
                world_size=layout.num_ranks,
                global_batch_size=layout.global_batch_size,
                num_lanes=layout.num_lanes,
            )
            for rows in mine.reshape(-1, layout.micro_batch_size):
                touched[number % workers] |= set((rows % layout.num_lanes).tolist())
                number += 1
        mine = np.flatnonzero(owners == rank)
        for worker, lanes in touched.items():
            assert lanes == set(mine[readers[worker]].tolist())
    shared = Counter(readers.sum(axis=0).tolist())
    assert readings_per_window(layout) == sum(n * c for n, c in shared.items()) / sum(
        shared.values()
    )


def test_a_resume_on_other_ranks_reads_the_same(dataset: Dataset, config: DataConfig) -> None:
    streams = Streams.of(dataset, None)
    windows = simulate(streams, config, SEED, 2000)
    expected = readings_digest(windows, [(0, LAYOUTS[0])])
    assert expected[0] == len(windows.lane)
    for layout in LAYOUTS[1:]:
        assert readings_digest(windows, [(0, LAYOUTS[0]), (960, layout)]) == expected
        assert readings_digest(windows, [(0, layout)]) == expected
    other = simulate(streams, config, SEED + 1, 2000)
    assert readings_digest(other, [(0, LAYOUTS[0])]) != expected


def test_possible_numbers_of_ranks_are_those_the_trainer_takes() -> None:
    layout = Layout(1, 0, 3, 48, 16)
    taken = [n for n in range(1, 60) if not replace(layout, num_ranks=n).problems()]
    assert possible_ranks(layout) == taken == [1, 2, 4, 8, 16]


def test_the_state_is_that_of_real_lanes(dataset: Dataset, config: DataConfig) -> None:
    """Rows within blocks are estimates, so the state's size is compared, and its sums."""
    config = replace(config, weights=MIXTURES[1])
    streams = Streams.of(dataset, config.weights)
    windows = simulate(streams, config, SEED, 1600)
    state = state_after(windows, 1600, config.num_lanes, 2)
    lanes = Lanes(dataset, config, SEED, StreamState.start(16, 2))
    for number in range(1600):
        lanes.origin(number)
    real = StreamState(1600, tuple(lanes.cursor(lane) for lane in range(16)))
    assert len(json.dumps(state.to_json())) == pytest.approx(
        len(json.dumps(real.to_json())), rel=0.05
    )
    for ours, theirs in zip(state.cursors, real.cursors, strict=True):
        assert ours.window == sum(ours.counts) and abs(ours.window - theirs.window) <= 1


def test_the_command_on_a_dataset_and_a_preset(tiny_dataset: Path, tmp_path: Path, capsys) -> None:
    lanes = ("--num-lanes", 16, "--micro-batch", 2)
    assert command(rehearse, tiny_dataset, "--ranks", 4, *lanes, "--resume-ranks", 1, 8) == 0
    text = capsys.readouterr().out
    num_blocks = len(Dataset.open(tiny_dataset).block_indices("train"))
    assert f"{num_blocks} training blocks" in text and text.count("the same") == 3
    assert command(rehearse, tiny_dataset, "--ranks", 4, *lanes, "--resume-ranks", 3) == 1
    text = capsys.readouterr().out
    assert "NOT POSSIBLE" in text and "3 ranks do not divide" in text
    assert "Possible numbers of ranks: 1, 2, 4, 8" in text
    phases = [{"first_step": 4, "global_batch_size": 8}]
    preset = tiny_preset(tmp_path, tiny_dataset, phases=phases)
    assert command(rehearse, preset, "--ranks", 2, "--workers", 4, "--steps", 100) == 0
    text = capsys.readouterr().out
    assert "Rehearsed: 100 steps = 1,600 rows" in text and "changes settings at step 4" in text
    assert "Lanes are shared by 2 workers of a rank" in text
    with pytest.raises(
        ValueError, match=r"is not a multiple of micro_batch_size 4 x 4 .* from step 4"
    ):
        command(rehearse, preset, "--ranks", 4)
    with pytest.raises(ValueError, match="give a dataset or preset, or --blocks"):
        command(rehearse, "--ranks", 4)


def test_a_dataset_that_is_not_there_yet_on_512_ranks(capsys) -> None:
    numbers = ("--ranks", 512, "--workers", 8, "--resume-ranks", 256, "--steps", 3000)
    assert command(rehearse, "--blocks", 1_000_000, *numbers) == 0
    text = capsys.readouterr().out
    assert "512 ranks x 8 workers, 32,768 lanes" in text
    assert "1,000,000  1,000,000        0         0" in text
    assert text.count("the same") == 2
