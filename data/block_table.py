"""A dataset's blocks.npy and its manifest in, the checked table out: where every block lies."""

from pathlib import Path
from typing import Any

import numpy as np

from data.blocks import TAR_RECORD, member_dtypes
from data.manifest import SPLITS

BLOCK_DTYPE = np.dtype(
    [
        ("source", "<u2"),  # index into Dataset.sources
        ("split", "<u1"),  # index into SPLITS
        ("shard", "<u4"),  # number of the shard within source and split
        ("offset", "<u8"),  # of the block's first tar header in the shard, in bytes
        ("nbytes", "<u4"),  # up to the end of the padding after its last member
        ("num_documents", "<u4"),
        ("num_tokens", "<u4"),
        ("num_sentences", "<u4"),
        ("xxh3", "<u8"),  # xxh3_64 of these bytes
    ]
)
MAX_BLOCK_TOKENS = 1 << 24
ROWS_AT_ONCE = 1 << 16
_SPLIT, _SOURCE = 1 << 32, 1 << 33  # in the number of a shard, above its own


def map_table(root: Path) -> np.ndarray:
    """[num_blocks] BLOCK_DTYPE, memory-mapped. ValueError where blocks.npy is no such table."""
    path = root / "blocks.npy"
    try:
        # unlike np.load, never a pickle or an archive
        table = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path} is no block table: {error}") from None
    if table.dtype != BLOCK_DTYPE or table.ndim != 1:
        raise ValueError(
            f"{path} is no block table: it has {table.ndim} dimensions of {str(table.dtype)[:100]}"
        )
    return table


def row_problems(table: np.ndarray, manifest: dict[str, Any]) -> list[str]:
    """What a reader must not trust: rows out of order, or of blocks that no shard of the manifest has room for.

    The rest of a row is compared with its block when that is read.
    """
    if len(table) != manifest["blocks"]["num_blocks"]:
        said = manifest["blocks"]["num_blocks"]
        return [f"blocks.npy has {len(table)} rows, the manifest says {said}"]
    shards = _shard_sizes(manifest)
    for first in range(0, len(table), ROWS_AT_ONCE):
        rows = table[first : first + ROWS_AT_ONCE + 1]  # and the next one, for the order
        if problem := _problem_of(rows, *shards, manifest["token_dtype"]):
            return [f"blocks.npy, rows from {first} on: {problem}"]
    return []


def _shard_sizes(manifest: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(which, bytes) of all shards, int64, ascending by which one it is; as `_shard_of` has it."""
    found = sorted(
        (_SOURCE * source + _SPLIT * split + shard_number(entry["path"]), entry["nbytes"])
        for source, splits in enumerate(manifest["sources"].values())
        for split, name in enumerate(SPLITS)
        for entry in splits[name]["shards"]
    )
    which, nbytes = np.array(found, np.int64).reshape(-1, 2).T
    return which, nbytes


def shard_number(path: str) -> int:
    return int(path.removesuffix(".tar").rpartition("-")[2])


def _shard_of(rows: np.ndarray) -> np.ndarray:
    """int64: source, split and shard of each row in one number, in the order of the table."""
    source, split = rows["source"].astype(np.int64), rows["split"].astype(np.int64)
    return _SOURCE * source + _SPLIT * split + rows["shard"]


def _problem_of(
    rows: np.ndarray, shards: np.ndarray, shard_nbytes: np.ndarray, token_dtype: str
) -> str | None:
    which, offset = _shard_of(rows), rows["offset"]
    if (rows["split"] >= len(SPLITS)).any() or not np.isin(which, shards).all():
        return "a shard that the manifest does not name"
    if (steps := np.diff(which)).min(initial=0) < 0 or (
        (steps == 0) & (offset[1:] < offset[:-1])
    ).any():
        return "they are not in the order of source, split, shard and offset"
    most, least = int(rows["num_tokens"].max()), int(rows["num_tokens"].min())
    if least < 1 or most > MAX_BLOCK_TOKENS:
        return f"blocks of {least:,} to {most:,} tokens: they have 1 to {MAX_BLOCK_TOKENS:,}"
    if (rows["nbytes"] != block_nbytes(rows, token_dtype)).any():
        return "the bytes of a block are not those of so many documents, sentences and tokens"
    room = shard_nbytes[np.searchsorted(shards, which)].astype(np.uint64)
    if ((offset > room) | (rows["nbytes"] > room - np.minimum(offset, room))).any():
        return "a block that ends after its shard does"
    return None


def block_nbytes(rows: np.ndarray, token_dtype: str) -> np.ndarray:
    """int64: the bytes that blocks of so many documents, sentences and tokens have in a tar."""
    documents, tokens, sentences = (
        rows[name].astype(np.int64) for name in ("num_documents", "num_tokens", "num_sentences")
    )
    lengths = dict.fromkeys(("doc", "ids", "nse"), documents)
    lengths |= {"sen": sentences, "tok": tokens, "wrd": -(-tokens // 8)}
    total = np.zeros(len(rows), np.int64)
    for extension, dtype in member_dtypes(token_dtype).items():
        size = lengths[extension[:3]] * dtype.itemsize
        total += TAR_RECORD + size + -size % TAR_RECORD
    return total
