"""The stream's promises: the same rows for ever, each once, from any point, whatever fails on the way."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from stream_support import SPECIAL_IDS, VOCAB_SIZE, hashed_dataset
from support import ROOT, environment

from data.batch import Reader, build_loader, commit
from data.lanes import Cursor, DataConfig, Lanes, StreamState
from data.pairs import UNLABELLED
from data.phases import Phase, enter
from data.shards import BLOCK_DTYPE, DamagedBlock, Dataset
from data.sources import block_rows

SEED = 11
GOLDEN = Path(__file__).parent / "golden" / "rows.json"
WEIGHTS = {"a": 2, "b": 1}


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hashed_dataset(tmp_path_factory.mktemp("hashed") / "dataset", {"a": 5, "b": 2, "c": 1})


def config_of(path: Path, **changes: object) -> DataConfig:
    return replace(DataConfig(path=str(path), sequence_length=128, num_lanes=32), **changes)


def fresh(config: DataConfig) -> Lanes:
    num_sources = len(config.weights or [1])
    state = StreamState.start(config.num_lanes, num_sources)
    return Lanes(Dataset.open(config.path), config, SEED, state)


def digests(lanes: Lanes, numbers: Iterator[int] | range) -> list[int]:
    return [lanes.row(number).digest(number) for number in numbers]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("packed rows of 128", {}),
        ("one pair a row", {"packing": False}),
        ("packed rows of 512, weighted", {"sequence_length": 512, "weights": WEIGHTS}),
    ],
)
def test_rows_never_change(name: str, changes: dict, dataset_path: Path) -> None:
    """Every checkpoint ever written continues with these rows, on every Python and numpy."""
    rows = digests(fresh(config_of(dataset_path, **changes)), range(4096))
    found = hashlib.sha256(np.array(rows, dtype="<u8").tobytes()).hexdigest()
    assert found == json.loads(GOLDEN.read_text())[name]


def test_any_schedule_of_stops_ranks_workers_and_batches(dataset_path: Path) -> None:
    """Random schedules; at each stop the state goes through JSON."""
    config = config_of(dataset_path, weights=WEIGHTS)
    expected = digests(fresh(config), range(2600))
    for seed in range(4):
        draw = random.Random(seed)
        state = StreamState.start(32, 2)
        seen: list[int] = []
        while len(seen) < 600:
            world_size, micro = draw.choice([1, 2, 4]), draw.choice([1, 2, 4])
            batch = draw.choice([16, 32, 64])
            workers = draw.choice([0, 0, 0, 2]) if world_size == 1 else 0
            steps = draw.randint(1, 6)
            row = state.row
            moved: dict[int, Cursor] = {}
            sums: dict[int, int] = {}
            for rank in range(world_size):
                reader = Reader(rank, world_size, micro, batch, SEED)
                loader = build_loader(
                    replace(config, num_workers=workers), reader, state, row + steps * batch
                )
                for item in loader:
                    sums[item.first_row] = item.batch.rows_digest
                    moved |= item.cursors
            width = min(batch, 32) // world_size
            for first, total in sums.items():
                rows = _rows_of_micro_batch(first, micro, width, batch)
                assert total % 2**64 == sum(expected[r] for r in rows) % 2**64
                seen += rows
            state = commit(state, row + steps * batch, moved)
            state = StreamState.from_json(json.loads(json.dumps(state.to_json())))
        assert sorted(seen) == list(range(len(seen)))


def _rows_of_micro_batch(first: int, micro: int, width: int, batch: int) -> list[int]:
    """A rank's rows from `first` on: runs of `width`, one in every min(batch, lanes) rows."""
    period = min(batch, 32)
    rows, row = [], first
    while len(rows) < micro:
        rows.append(row)
        row += 1
        if row % width == 0:
            row += period - width
    return rows


KILLED = """
import itertools, json, sys
from data.batch import Reader, build_loader, commit
from data.lanes import DataConfig, StreamState
if __name__ == "__main__":
    path, workers, state = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    config = DataConfig(path=path, sequence_length=128, num_lanes=32, num_workers=workers)
    state = StreamState.from_json(state)
    loader = build_loader(config, Reader(0, 1, 8, 8, 11), state)
    for item in loader:
        state = commit(state, state.row + 8, item.cursors)
        print(json.dumps([item.batch.rows_digest, state.to_json()]), flush=True)
"""


def test_killed_while_reading_ahead(dataset_path: Path, tmp_path: Path) -> None:
    """SIGKILL with batches in flight between real processes; other numbers of workers go on."""
    script = tmp_path / "read.py"
    script.write_text(KILLED)
    state = StreamState.start(32, 1).to_json()
    seen: list[int] = []
    for workers, num_batches in ((3, 7), (0, 5), (2, 9)):
        with subprocess.Popen(
            [sys.executable, str(script), str(dataset_path), str(workers), json.dumps(state)],
            stdout=subprocess.PIPE,
            env=environment(),
            cwd=ROOT,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            for _ in range(num_batches):
                digest, state = json.loads(process.stdout.readline())
                seen.append(digest % 2**64)
            os.killpg(process.pid, signal.SIGKILL)
    expected = digests(fresh(config_of(dataset_path)), range(8 * len(seen)))
    assert seen == [sum(expected[i : i + 8]) % 2**64 for i in range(0, len(expected), 8)]


@pytest.mark.parametrize("sequence_length", [64, 512])
def test_an_epoch_has_every_token_once(sequence_length: int, dataset_path: Path) -> None:
    config = config_of(dataset_path, sequence_length=sequence_length, num_lanes=8)
    lanes, places = fresh(config), fresh(config)
    dataset = lanes.dataset
    seen = np.zeros(VOCAB_SIZE, dtype=np.int64)
    finished, number = set(), 0
    while len(finished) < 8:  # lanes in their second epoch
        if number % 8 not in finished:
            row, origin = lanes.row(number), places.origin(number)
            if origin.epoch > 0:
                finished.add(number % 8)
            else:
                ids = row.input_ids.copy()
                ids[row.masked_positions] = row.masked_labels
                seen += np.bincount(ids, minlength=VOCAB_SIZE)
        number += 1
    blocks = [dataset.read_block(int(i)) for i in dataset.block_indices("train")]
    expected = np.bincount(np.concatenate([b.tokens for b in blocks]), minlength=VOCAB_SIZE)
    assert (seen[5:] == expected[5:]).all()


def test_mixed_tokens_follow_the_weights(dataset_path: Path) -> None:
    config = config_of(dataset_path, weights=WEIGHTS, num_lanes=4)
    lanes, places = fresh(config), fresh(config)
    tokens: Counter[str] = Counter()
    for number in range(6000):
        tokens[places.origin(number).source] += len(lanes.row(number).input_ids)
    lane_blocks = sum(tokens.values()) / 8192 / 4
    assert tokens["a"] / tokens["b"] == pytest.approx(2, rel=3 / lane_blocks)


def test_resume_costs_the_same_at_any_place_of_any_dataset(tmp_path: Path) -> None:
    """Only a few rows of the block table are looked at, and no block but those that are open."""
    for num_rows in (10**6, 10**9):
        path = tmp_path / f"{num_rows}.bin"  # zeros that take no place on disk
        table = np.memmap(path, BLOCK_DTYPE, "w+", shape=(num_rows,))
        looked_at: list[int] = []

        class Table:
            def __len__(self, rows: int = num_rows) -> int:
                return rows

            def __getitem__(self, index: int, table=table, looked_at=looked_at):
                looked_at.append(index)
                return table[index]

        dataset = SimpleNamespace(
            blocks=Table(), sources=["a"], special_ids=SPECIAL_IDS, vocab_size=VOCAB_SIZE
        )
        config = DataConfig(path="none", num_lanes=1024)
        far = Cursor(10**7, 900, 0, (10**7,))
        state = StreamState(10**13, (far,) * 1024)
        assert len(json.dumps(state.to_json())) <= 40_000
        lanes = Lanes(dataset, config, SEED, StreamState.from_json(state.to_json()))  # pyright: ignore
        places = {lanes.block_of(lane, 0, 10**7) for lane in range(1024)}
        assert len(places) == 1024 and len(looked_at) <= 128
        assert len(block_rows(dataset, "train", ["a"])) == num_rows  # pyright: ignore
        del table
        path.unlink()


@pytest.fixture
def damaged_path(tmp_path: Path) -> Path:
    """A dataset with one flipped byte in each of two training blocks."""
    root = hashed_dataset(tmp_path / "damaged", {"a": 5, "b": 2, "c": 1})
    dataset = Dataset.open(root)
    for index in (3, 17):
        row = dataset.blocks[index]
        with dataset.shard_of(index).open("r+b") as file:
            file.seek(int(row["offset"]) + 4000)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    return root


def test_a_damaged_block_stops_the_stream(damaged_path: Path) -> None:
    with pytest.raises(DamagedBlock, match=r"-train-00000\d\.tar"):
        digests(fresh(config_of(damaged_path, num_lanes=4)), range(4000))


def test_damaged_blocks_are_passed_over_the_same_way_for_ever(
    damaged_path: Path, dataset_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(damaged_path, num_lanes=4, max_damaged_blocks=2)
    state, row_states = StreamState.start(4, 1), []
    rows = []
    for item in build_loader(config, Reader(0, 1, 4, 4, SEED), state, end_row=2000):
        state = commit(state, state.row + 4, item.cursors, item.damage)
        rows.append(item.batch.rows_digest)
        row_states.append(state)
    assert capsys.readouterr().out.count("passing over a damaged block") == 2
    assert sorted(d.block for d in state.damage) == [3, 17]
    lanes_hit = {d.lane for d in state.damage}
    # mended, and from the start: what was passed over stays out
    mended = replace(config, path=str(dataset_path), max_damaged_blocks=0)
    start = commit(StreamState.start(4, 1), 0, {}, state.damage)
    again = build_loader(mended, Reader(0, 1, 4, 4, SEED), start, end_row=2000)
    assert [item.batch.rows_digest for item in again] == rows
    # from a state in the middle, through JSON
    middle = StreamState.from_json(json.loads(json.dumps(row_states[99].to_json())))
    rest = build_loader(config, Reader(0, 1, 4, 4, SEED), middle, end_row=2000)
    assert [item.batch.rows_digest for item in rest] == rows[100:]
    # the other lanes have what they always had
    sound, hit = fresh(mended), Lanes(Dataset.open(mended.path), mended, SEED, start)
    others = [n for n in range(2000) if n % 4 not in lanes_hit]
    assert others and digests(sound, iter(others)) == digests(hit, iter(others))
    with pytest.raises(DamagedBlock):
        list(
            build_loader(
                replace(config, max_damaged_blocks=1), Reader(0, 1, 4, 4, SEED),
                StreamState.start(4, 1), 2000,
            )
        )  # fmt: skip


def test_workers_that_share_a_lane_may_not_pass_over_blocks(dataset_path: Path) -> None:
    config = config_of(dataset_path, max_damaged_blocks=1, num_workers=3)
    with pytest.raises(ValueError, match=r"32 lanes make 4 micro-batches .*num_workers 3"):
        build_loader(config, Reader(0, 1, 8, 32, SEED), StreamState.start(32, 1))


def _read(config: DataConfig, state: StreamState, rows: int) -> StreamState:
    for item in build_loader(config, Reader(0, 1, 4, 4, SEED), state, state.row + rows):
        state = commit(state, state.row + 4, item.cursors)
    return state


def test_another_mixture_begins_when_a_lane_is_done_with_its_block(dataset_path: Path) -> None:
    """Weights changed in mid-block: the open blocks are read to their end, nothing is lost or repeated."""
    before = config_of(dataset_path, num_lanes=4, weights=WEIGHTS)
    after = replace(before, weights={"b": 1, "a": 1, "c": 1})
    dataset = Dataset.open(dataset_path)
    state = _read(before, StreamState.start(4, 2), 200)
    phases = [Phase.of(config, dataset, 4, 50, 200) for config in (before, after)]
    entered, notes = enter(state, *phases)
    assert notes == []
    old, new = (
        Lanes(dataset, before, SEED, state),
        Lanes(dataset, after, SEED, entered),
    )
    opened = [state.cursors[lane].window for lane in range(4)]
    same = 0
    for number in range(200, 600):
        a, b = old.row(number), new.row(number)
        lane = number % 4
        if old.cursor(lane).window == opened[lane]:
            same += 1
            assert a.digest(number) == b.digest(number)
    assert same > 40


def test_an_appended_source_moves_nothing(dataset_path: Path, tmp_path: Path) -> None:
    """The dataset grew by a source: those that were there go on to the row."""
    grown = hashed_dataset(tmp_path / "grown", {"a": 5, "b": 2, "c": 1, "d": 1})
    config = config_of(dataset_path, num_lanes=4, weights=WEIGHTS)
    larger = replace(config, path=str(grown))
    state = _read(config, StreamState.start(4, 2), 200)
    phases = [Phase.of(c, Dataset.open(c.path), 4, 50, 200) for c in (config, larger)]
    entered, notes = enter(state, *phases)
    assert notes == [] and entered == state
    continued = (Lanes(Dataset.open(c.path), c, SEED, state) for c in (config, larger))
    first, second = (digests(lanes, range(200, 500)) for lanes in continued)
    assert first == second


def test_another_row_length_and_another_tokenizer(dataset_path: Path) -> None:
    config = config_of(dataset_path, num_lanes=4)
    dataset = Dataset.open(dataset_path)
    state = _read(config, StreamState.start(4, 1), 200)
    old = Phase.of(config, dataset, 4, 50, 200)
    new = Phase.of(replace(config, sequence_length=64), dataset, 4, 50, 200)
    entered, notes = enter(state, old, new)
    assert notes == ["4 of 4 lanes leave the rest of their open block"]
    for before, after in zip(state.cursors, entered.cursors, strict=True):
        assert after == Cursor(before.window + 1, 0, -1, (before.counts[0] + 1,))
    with pytest.raises(ValueError, match="the tokenizer changed"):
        enter(state, old, replace(new, tokenizer_digest="0"))


def test_labels_of_every_reading_differ_between_epochs(dataset_path: Path) -> None:
    """Masks, pairs and order are drawn anew in each epoch."""
    config = config_of(dataset_path, num_lanes=1)
    lanes, places = fresh(config), fresh(config)
    by_block: dict[int, list[tuple[int, ...]]] = {}
    for number in range(3000):
        row, origin = lanes.row(number), places.origin(number)
        if origin.row == 0:
            by_block.setdefault(origin.block, []).append(tuple(row.masked_positions.tolist()))
            assert (row.pair_labels != UNLABELLED).any()
    twice = [masks for masks in by_block.values() if len(masks) > 1]
    assert twice and all(len(set(masks)) == len(masks) for masks in twice)
