"""Text and its dataset in, tokens per CPU second of one process that makes training batches out.

Ours makes sentence pairs, packs, masks and digests; the usual ways make no pairs: they join texts, cut
them into rows and mask with transformers' `DataCollatorForLanguageModeling`.
"""

import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from datasets import Dataset as HfDataset
from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from data.batch import Reader, build_loader
from data.lanes import DataConfig, StreamState
from data.shards import Dataset

MICRO_BATCH_SIZE = 32
LENGTH = 512
ROUNDS = 3


def stream_table(text: Path, dataset_path: Path) -> Iterator[str]:
    """A table of ways: median of three rounds, spread, ratios to ours."""
    dataset = Dataset.open(dataset_path)
    tokenizer = AutoTokenizer.from_pretrained(dataset_path / "tokenizer", trust_remote_code=False)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    ways = {
        "lanes, NSP pairs, packed": (lanes_way(dataset_path, LENGTH, True), 400),
        "lanes, NSP pairs, one pair a row": (lanes_way(dataset_path, LENGTH, False), 400),
        "webdataset blocks of ids + collator": (webdataset_way(dataset, collator), 60),
        "datasets, rows of ready ids + collator": (ready_ids_way(dataset, collator), 60),
        "datasets streaming text + tokenizer + collator": (
            text_way(text, tokenizer, collator),
            120,
        ),
    }
    yield f"Rows of {LENGTH} slots, batches of {MICRO_BATCH_SIZE}, one process.\n"
    yield "| way | tokens/s | least to most | fill | ours is faster by |\n|---|---|---|---|---|"
    ours = 0.0
    for name, (batches, num_batches) in ways.items():
        next(batches)  # opens files
        results = [measure(batches, num_batches) for _ in range(ROUNDS)]
        speeds = sorted(speed for speed, _ in results)
        ours = ours or speeds[1]
        fill = np.mean([tokens for _, tokens in results]) / (
            num_batches * MICRO_BATCH_SIZE * LENGTH
        )
        spread = f"{speeds[0]:,.0f} to {speeds[-1]:,.0f}"
        yield f"| {name} | {speeds[1]:,.0f} | {spread} | {fill:.3f} | {ours / speeds[1]:.1f} x |"


def measure(batches: Iterator[int], num_batches: int) -> tuple[float, int]:
    """(tokens per CPU second of this process, tokens)."""
    start, tokens = time.process_time(), 0
    for _ in range(num_batches):
        tokens += next(batches)
    return tokens / (time.process_time() - start), tokens


def lanes_way(path: Path, length: int, packing: bool) -> Iterator[int]:
    """Token counts of the stream's batches."""
    config = DataConfig(path=str(path), sequence_length=length, packing=packing, num_lanes=32)
    reader = Reader(0, 1, MICRO_BATCH_SIZE, MICRO_BATCH_SIZE, seed=1)
    for item in build_loader(config, reader, StreamState.start(32, 1)):
        yield item.batch.num_tokens


def webdataset_way(dataset: Dataset, collator: Any) -> Iterator[int]:
    """Our own shards, read with `webdataset`, cut into rows."""
    shards = [str(path) for path in sorted(Path(dataset.root).glob("*/train/*.tar"))]
    rows: list[dict[str, Any]] = []
    while True:
        samples: Any = webdataset.WebDataset(shards, shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
        for sample in samples:
            (name,) = (key for key in sample if key.startswith("tok."))
            ids = np.frombuffer(sample[name], dataset.token_dtype).astype(np.int64)
            for start in range(0, len(ids) - LENGTH + 1, LENGTH):
                rows.append({"input_ids": ids[start : start + LENGTH].tolist()})
                if len(rows) == MICRO_BATCH_SIZE:
                    yield int(collator(rows)["input_ids"].numel())
                    rows = []


def ready_ids_way(dataset: Dataset, collator: Any) -> Iterator[int]:
    """An Arrow table whose rows are ready: the fastest that `datasets` can do."""
    blocks = [dataset.read_block(int(i)).tokens for i in dataset.block_indices("train")[:16]]
    ids = np.concatenate(blocks).astype(np.int32)
    table: Any = HfDataset.from_dict(
        {"input_ids": ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)}
    )
    while True:
        for rows in table.iter(MICRO_BATCH_SIZE):
            features = [{"input_ids": row} for row in rows["input_ids"]]
            yield int(collator(features)["input_ids"].numel())


def text_way(text: Path, tokenizer: Any, collator: Any) -> Iterator[int]:
    """As transformers' language-modelling examples do it: stream, tokenize, join, cut, mask."""

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer(batch["text"])["input_ids"]}

    def cut(batch: dict[str, Any]) -> dict[str, Any]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        end = len(ids) // LENGTH * LENGTH
        return {"input_ids": [ids[i : i + LENGTH] for i in range(0, end, LENGTH)]}

    while True:
        stream: Any = load_dataset("json", data_files=str(text), split="train", streaming=True)
        stream = stream.map(encode, batched=True, remove_columns=["text"]).map(cut, batched=True)
        rows: list[Any] = []
        for row in stream:
            rows.append(row)
            if len(rows) == MICRO_BATCH_SIZE:
                yield int(collator(rows)["input_ids"].numel())
                rows = []
