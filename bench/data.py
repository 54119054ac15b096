"""A prepared dataset in, rows per second of the stream out, beside the usual way on the same tokens.

    python -m bench.data DATASET [--rows 4000]

The usual way: token ids read with `webdataset`, cut into rows of L, masked by transformers'
`DataCollatorForLanguageModeling` (no sentence pairs). Both run in this process on one core.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from data.batch import Reader, build_loader
from data.lanes import DataConfig, StreamState
from data.shards import Dataset

MICRO_BATCH_SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = Dataset.open(options.dataset)
    print("| row slots | way | tokens/s | fill | ratio |\n|---|---|---|---|---|")
    for length in (128, 512):
        usual, _ = measure(usual_way(dataset, length), options.rows // MICRO_BATCH_SIZE)
        print(
            f"| {length} | webdataset + DataCollatorForLanguageModeling | {usual:,.0f} | 1.000 | 1.0 |"
        )
        for packing in (True, False):
            stream = lanes_way(options.dataset, length, packing)
            speed, tokens = measure(stream, options.rows // MICRO_BATCH_SIZE)
            fill = tokens / (options.rows // MICRO_BATCH_SIZE * MICRO_BATCH_SIZE * length)
            name = f"lanes, NSP pairs, {'packed' if packing else 'one pair a row'}"
            print(f"| {length} | {name} | {speed:,.0f} | {fill:.3f} | {speed / usual:.1f} |")


def measure(batches: Iterator[int], num_batches: int) -> tuple[float, int]:
    """(tokens per CPU second of this process, tokens). The first batch, which opens files, is left out."""
    next(batches)
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


def usual_way(dataset: Dataset, length: int) -> Iterator[int]:
    """Token counts of batches as they are commonly made."""
    tokenizer = AutoTokenizer.from_pretrained(dataset.root / "tokenizer")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    shards = [str(path) for path in sorted(dataset.root.glob("*/train/*.tar"))]
    rows: list[dict[str, Any]] = []
    while True:
        samples: Any = webdataset.WebDataset(shards, shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
        for sample in samples:
            (name,) = (key for key in sample if key.startswith("tok."))
            ids = np.frombuffer(sample[name], dataset.token_dtype).astype(np.int64)
            for start in range(0, len(ids) - length + 1, length):
                rows.append({"input_ids": ids[start : start + length].tolist()})
                if len(rows) == MICRO_BATCH_SIZE:
                    yield int(collator(rows)["input_ids"].numel())
                    rows = []


if __name__ == "__main__":
    main()
