"""The stream with other objectives: the same rows for ever, over any phases, stops, ranks and workers."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stream_support import hashed_dataset
from test_data_rows import EVERYTHING, RECIPES
from test_data_stream import SEED, config_of, digests, fresh

from data.batch import Reader, build_loader, commit
from data.lanes import Cursor, StreamState
from data.phases import Phase, enter
from data.shards import Dataset

GOLDEN_OBJECTIVES = Path(__file__).parent / "golden" / "objectives.json"


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hashed_dataset(tmp_path_factory.mktemp("hashed") / "dataset", {"a": 5, "b": 2, "c": 1})


@pytest.mark.parametrize("name", RECIPES)
def test_rows_of_other_objectives_never_change(name: str, dataset_path: Path) -> None:
    rows = digests(fresh(config_of(dataset_path, objectives={name: 1})), range(512))
    found = hashlib.sha256(np.array(rows, dtype="<u8").tobytes()).hexdigest()
    assert found == json.loads(GOLDEN_OBJECTIVES.read_text())[name]


def test_rows_of_a_mixture_never_change(dataset_path: Path) -> None:
    rows = digests(fresh(config_of(dataset_path, objectives=EVERYTHING)), range(1024))
    found = hashlib.sha256(np.array(rows, dtype="<u8").tobytes()).hexdigest()
    assert found == json.loads(GOLDEN_OBJECTIVES.read_text())["all at once"]


def test_all_objectives_over_two_phases_and_any_stops(dataset_path: Path) -> None:
    """Two mixtures, one after the other; stops go through JSON, and other ranks and workers go on."""
    first = config_of(dataset_path, objectives=EVERYTHING)
    phases = [first, replace(first, objectives={"clm": 1, "span+reorder": 2, "rtd+sop": 3})]
    dataset = Dataset.open(dataset_path)

    def entered(state: StreamState) -> StreamState:
        old, new = (Phase.of(config, dataset, 32, 6, 192) for config in phases)
        after, notes = enter(state, old, new)
        assert notes == ["32 of 32 lanes leave the rest of their open block"]
        return after

    def read(
        state: StreamState, schedule: list[tuple[int, int, int, int]]
    ) -> tuple[list[int], dict]:
        """(sums of the digests of steps, how often each recipe's rows came); (phase, steps, ranks, workers)."""
        sums: Counter[int] = Counter()
        labels: Counter[str] = Counter()
        for place, (phase, steps, world_size, workers) in enumerate(schedule):
            if place and phase != schedule[place - 1][0]:
                state = entered(state)
            moved: dict[int, Cursor] = {}
            config = replace(phases[phase], num_workers=workers)
            end = state.row + 32 * steps
            for rank in range(world_size):
                for item in build_loader(config, Reader(rank, world_size, 4, 32, SEED), state, end):
                    sums[item.first_row // 32] += item.batch.rows_digest
                    labels.update(item.batch.num_labels)
                    moved |= item.cursors
            state = commit(state, end, moved)
            state = StreamState.from_json(json.loads(json.dumps(state.to_json())))
        return [sums[step] % 2**64 for step in sorted(sums)], dict(labels)

    start = StreamState.start(32, 1)
    unbroken = read(start, [(0, 6, 1, 0), (1, 6, 1, 0)])
    assert len(set(unbroken[0])) == 12
    # with a twentieth of a small block, these may find no partner for a B
    assert {task for task, count in unbroken[1].items() if not count} <= {
        "nsp",
        "order",
        "distance",
    }
    assert read(start, [(0, 2, 2, 0), (0, 4, 4, 0), (1, 1, 8, 0), (1, 5, 2, 0)]) == unbroken
    assert read(start, [(0, 6, 1, 3), (1, 3, 1, 2), (1, 3, 4, 0)]) == unbroken
