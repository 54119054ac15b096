"""What the tests of remote datasets share: options of little patience, and blocks compared."""

from pathlib import Path

import numpy as np

from data.shards import Block, Dataset, StorageOptions

SHARD = "src/train/src-train-000000.tar"
RETRIES = 3


def quick_options(folder: Path) -> StorageOptions:
    """The cache in `folder`; three retries that follow at once."""
    return StorageOptions(
        cache_dir=str(folder / "cache"),
        num_retries=RETRIES,
        num_refetches=2,
        timeout_seconds=20,
        first_backoff_seconds=0.001,
        max_backoff_seconds=0.01,
    )


def blocks_of(root: Path) -> list[Block]:
    dataset = Dataset.open(root)
    return [dataset.read_block(index) for index in range(len(dataset.blocks))]


def equal(first: Block, second: Block) -> bool:
    return all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(first, second, strict=True)
    )


def same_blocks(dataset: Dataset, expected: list[Block]) -> bool:
    return all(equal(dataset.read_block(i), block) for i, block in enumerate(expected))
