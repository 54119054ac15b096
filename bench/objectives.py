"""A prepared dataset in, tokens per CPU second that one process makes batches of each objective of out.

    python -m bench.objectives DATASET [--length 512] [--rounds 7] [--batches 40]
    python -m bench.objectives DATASET --flops          what a token costs to train on, in BERT-base's shape

All objectives take turns in every round, so that neighbours on the machine disturb them alike; the ratio is the
median of the rounds' ratios to `mlm`.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.data_stream import MICRO_BATCH_SIZE, measure
from data.batch import Reader, build_loader
from data.collate import Batch
from data.lanes import DataConfig, StreamState
from data.objectives import (
    DEFAULT_RECIPE,
    SENTENCE_OBJECTIVES,
    TOKEN_OBJECTIVES,
    read_mixture,
)
from data.shards import Dataset
from model.config import ModelConfig
from trainer.task_losses import count_flops

NUM_LANES = 4  # blocks that are open at the same time
BASE = "mlm"
RECIPES = (
    *TOKEN_OBJECTIVES, DEFAULT_RECIPE, "wwm+nsp",
    *(f"mlm+{name}" for name in SENTENCE_OBJECTIVES if name != "nsp"), "span+reorder+relative",
)  # fmt: skip
MIXTURE = {"mlm+nsp": 1, "wwm+sop": 1, "rtd": 1, "clm": 1}


def objectives_table(
    dataset: Path, length: int, num_rounds: int, num_batches: int
) -> Iterator[str]:
    """A table of objectives: median of the rounds, least to most, ratio to plain masked tokens."""
    mixtures = {name: {name: 1} for name in RECIPES} | {"a mixture of four": MIXTURE}
    ways = {name: token_counts(dataset, length, mixture) for name, mixture in mixtures.items()}
    for batches in ways.values():
        measure(batches, num_batches)  # opens blocks
    rounds = [
        {name: measure(batches, num_batches)[0] for name, batches in ways.items()}
        for _ in range(num_rounds)
    ]
    yield f"Rows of {length} slots, batches of {MICRO_BATCH_SIZE}, one process, {num_rounds} rounds.\n"
    yield f"| objective | tokens/s | least to most | ratio to {BASE} |\n|---|---|---|---|"
    for name in ways:
        speeds = sorted(speed[name] for speed in rounds)
        ratio = statistics.median(speed[name] / speed[BASE] for speed in rounds)
        spread = f"{speeds[0]:,.0f} to {speeds[-1]:,.0f}"
        yield f"| {name} | {statistics.median(speeds):,.0f} | {spread} | {ratio:.2f} |"


def flops_table(dataset: Path, length: int, num_batches: int) -> Iterator[str]:
    """Of forward and backward pass, counted (`model.flops`), not measured."""
    vocab_size = Dataset.open(dataset).vocab_size
    yield f"Rows of {length} slots, {num_batches} batches of {MICRO_BATCH_SIZE}, vocabulary {vocab_size:,}.\n"
    yield f"| objective | MFLOPs a token | ratio to {BASE} |\n|---|---|---|"
    of_base = None
    for name in RECIPES:
        model = ModelConfig(tasks=read_mixture({name: 1}).tasks, max_position_embeddings=length)
        batches = list(itertools.islice(batches_of(dataset, length, {name: 1}), num_batches))
        num_tokens = sum(batch.num_tokens for batch in batches)
        flops = count_flops(model, vocab_size, batches) / num_tokens
        of_base = of_base or flops  # the first is BASE
        yield f"| {name} | {flops / 1e6:,.0f} | {flops / of_base:.2f} |"


def token_counts(dataset: Path, length: int, objectives: dict[str, int]) -> Iterator[int]:
    """Filled slots of the stream's batches."""
    return (batch.num_tokens for batch in batches_of(dataset, length, objectives))


def batches_of(dataset: Path, length: int, objectives: dict[str, int]) -> Iterator[Batch]:
    """Of the stream, without end."""
    config = DataConfig(
        path=str(dataset), sequence_length=length, num_lanes=NUM_LANES, objectives=objectives
    )
    reader = Reader(0, 1, MICRO_BATCH_SIZE, MICRO_BATCH_SIZE, seed=1)
    for item in build_loader(config, reader, StreamState.start(NUM_LANES, 1)):
        yield item.batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dataset", type=Path, help="a folder written by `cloze prepare`")
    parser.add_argument("--length", type=int, default=512, help="slots of a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=40, help="of each objective in a round")
    parser.add_argument(
        "--flops", action="store_true", help="count what the model computes instead"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = (
        flops_table(options.dataset, options.length, options.batches)
        if options.flops
        else objectives_table(options.dataset, options.length, options.rounds, options.batches)
    )
    for line in table:
        print(line, flush=True)


if __name__ == "__main__":
    main()
