"""Text and its dataset in, what a stop costs out: samples lost and repeated, seconds, bytes of state.

Each library reads the same 8,000 samples, shuffled as its documentation says, with two loader workers, is
stopped once and goes on with what it can save. Counted over one epoch: samples never seen (lost), and
seen again (repeated).
"""

import io
import json
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import webdataset
from datasets import Dataset as HfDataset
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from data.batch import Reader, build_loader, commit
from data.lanes import Cursor, DataConfig, Lanes, StreamState
from data.shards import BLOCK_DTYPE

NUM_SAMPLES, BATCH, STOP_AFTER = 8000, 16, 150


def resume_tables(text: Path, dataset: Path) -> Iterator[str]:
    """Two tables: what one resume loses, and what ours costs at any size."""
    del text
    yield f"{NUM_SAMPLES} samples, two workers, one stop after {STOP_AFTER} batches of {BATCH}.\n"
    yield "| library | resumed on | lost | repeated | state |\n|---|---|---|---|---|"
    yield from ours(dataset)
    yield from theirs()
    yield "\n| rows of the block table | lanes | state, bytes | seconds to the first place |\n|---|---|---|---|"
    for num_rows in (10**6, 10**9):
        for num_lanes in (64, 1024):
            yield _cost(num_rows, num_lanes)


def ours(path: Path) -> Iterator[str]:
    """The digest of each row is its identity: rows of a run that was never stopped are the measure."""
    config = DataConfig(path=str(path), sequence_length=128, num_lanes=64, num_workers=2)
    reader = Reader(0, 1, BATCH, BATCH, seed=1)
    start, num_batches = StreamState.start(64, 1), NUM_SAMPLES // BATCH
    end = num_batches * BATCH
    expected = Counter(i.batch.rows_digest for i in build_loader(config, reader, start, end))
    for place, later, world in (("the same", 2, 1), ("2 ranks x 3 workers", 3, 2)):
        seen: Counter[int] = Counter()
        state = start
        for item in islice(build_loader(config, reader, start), STOP_AFTER):
            seen[item.batch.rows_digest] += 1
            state = commit(state, state.row + BATCH, item.cursors)
        size = len(json.dumps(state.to_json()))
        state = StreamState.from_json(json.loads(json.dumps(state.to_json())))
        halves: dict[int, int] = Counter()
        for rank in range(world):
            part = Reader(rank, world, BATCH // world, BATCH, seed=1)
            for item in build_loader(replace(config, num_workers=later), part, state, end):
                halves[item.first_row // BATCH] += item.batch.rows_digest
        seen.update((value + 2**63) % 2**64 - 2**63 for value in halves.values())
        lost, repeated = (expected - seen).total() * BATCH, (seen - expected).total() * BATCH
        yield f"| cloze | {place} | {lost} | {repeated} | {size:,} bytes |"


def theirs() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield _row("webdataset, shuffle(1000)", "the same", *_webdataset(Path(folder)))
    table = HfDataset.from_dict({"n": list(range(NUM_SAMPLES))}).to_iterable_dataset(num_shards=8)
    stream = table.shuffle(seed=1, buffer_size=1000)
    yield _row("datasets, shuffle(1000), no workers", "the same", *_datasets(stream))
    for place, workers in (("the same", 2), ("3 workers", 3)):
        yield _row(
            "StatefulDataLoader, datasets, shuffle(1000)", place, *_stateful(stream, workers)
        )
    rows = list(range(NUM_SAMPLES))
    for place, workers in (("the same", 2), ("3 workers", 3)):
        yield _row(
            "StatefulDataLoader, list in memory, shuffle=True", place, *_stateful(rows, workers)
        )


def _row(name: str, place: str, seen: "Counter[int] | str", state: Any) -> str:
    if isinstance(seen, str):
        return f"| {name} | {place} | refused: {seen} | | |"
    lost = NUM_SAMPLES - len(seen)
    size = f"{len(pickle.dumps(state)):,} bytes" if state is not None else "none"
    return f"| {name} | {place} | {lost} | {seen.total() - len(seen)} | {size} |"


def _webdataset(folder: Path) -> tuple[Counter[int], None]:
    """It has no state: the epoch begins anew."""
    per_shard = NUM_SAMPLES // 8
    for shard in range(8):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:  # pyright: ignore
            for n in range(shard * per_shard, (shard + 1) * per_shard):
                writer.write({"__key__": f"{n:06d}", "cls": n})
    shards = [str(folder / f"{shard}.tar") for shard in range(8)]

    def loader() -> Any:
        data = webdataset.WebDataset(shards, shardshuffle=100, seed=1).shuffle(1000).decode()  # pyright: ignore
        return DataLoader(data.to_tuple("cls").batched(BATCH), batch_size=None, num_workers=2)

    seen: Counter[int] = Counter()
    for (batch,) in islice(loader(), STOP_AFTER):
        seen.update(int(n) for n in batch)
    for (batch,) in loader():
        seen.update(int(n) for n in batch)
    return seen, None


def _datasets(stream: Any) -> tuple[Counter[int], Any]:
    seen = Counter(row["n"] for row in islice(stream, STOP_AFTER * BATCH))
    state = stream.state_dict()
    stream.load_state_dict(pickle.loads(pickle.dumps(state)))
    seen.update(row["n"] for row in stream)
    return seen, state


def _stateful(data: Any, workers: int) -> tuple["Counter[int] | str", Any]:
    def loader(num_workers: int) -> Any:
        shuffle = isinstance(data, list)
        return StatefulDataLoader(data, BATCH, shuffle=shuffle, num_workers=num_workers)

    def numbers(batch: Any) -> list[int]:
        return [int(n) for n in (batch["n"] if isinstance(batch, dict) else batch)]

    seen: Counter[int] = Counter()
    first = loader(2)
    for batch in islice(first, STOP_AFTER):
        seen.update(numbers(batch))
    state = first.state_dict()
    second = loader(workers)
    try:
        second.load_state_dict(pickle.loads(pickle.dumps(state)))
        for batch in second:
            seen.update(numbers(batch))
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        return type(error).__name__, state
    return seen, state


def _cost(num_rows: int, num_lanes: int) -> str:
    """Of a synthetic block table far into its epochs: a sparse file, of which hardly anything is read."""
    with tempfile.TemporaryDirectory() as folder:
        table = np.memmap(Path(folder, "blocks"), BLOCK_DTYPE, "w+", shape=(num_rows,))
        special = {"[PAD]": 0, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
        dataset: Any = SimpleNamespace(
            blocks=table, sources=["a"], special_ids=special, vocab_size=16384
        )
        far = Cursor(10**7, 900, 0, (10**7,))
        saved = json.dumps(StreamState(10**13, (far,) * num_lanes).to_json())
        start = time.perf_counter()
        state = StreamState.from_json(json.loads(io.StringIO(saved).read()))
        lanes = Lanes(dataset, DataConfig(path="", num_lanes=num_lanes), 1, state)
        for lane in range(num_lanes):
            lanes.block_of(lane, 0, 10**7)
        seconds = time.perf_counter() - start
        return f"| {num_rows:,} | {num_lanes} | {len(saved):,} | {seconds:.3f} |"
