"""A prepared dataset's folder in, its blocks out: format v1, read and checked.

    <root>/manifest.json                                   counts, digests; written last, so its absence
                                                           means that the dataset is incomplete
    <root>/blocks.npy                                      one row (BLOCK_DTYPE) per block
    <root>/tokenizer/                                      as `AutoTokenizer.from_pretrained` wants it
    <root>/<source>/<split>/<source>-<split>-000003.tar    a shard: USTAR, one sample per block
    <root>/<source>/meta/<source>-<split>-000003.jsonl.zst one line per document, in the shard's order

Only manifest.json, blocks.npy, the tokenizer and the tars are ever read for training.
"""

from pathlib import Path
from typing import Any, final

import numpy as np
import xxhash

from data.block_table import BLOCK_DTYPE, map_table, row_problems
from data.blocks import TOKEN_DTYPES, Block, block_problems, member_dtypes, parse_block
from data.manifest import (
    FORMAT,
    SPLITS,
    Split,
    parse_manifest,
    read_manifest,
    shard_entries,
    shard_problems,
    table_problems,
)
from data.storage import (
    RESTORE,
    BlockAddress,
    DamagedBlock,
    LocalShards,
    Shards,
    StorageOptions,
    Unreachable,
    UnreachableBlock,
    block_place,
)
from data.transfer import is_url

__all__ = [
    "BLOCK_DTYPE",
    "FORMAT",
    "INDEX_MEMBER",
    "MAX_SENTENCE_TOKENS",
    "SPLITS",
    "TOKEN_DTYPES",
    "Block",
    "DamagedBlock",
    "Dataset",
    "Split",
    "StorageOptions",
    "Unreachable",
    "UnreachableBlock",
    "cut_sentence_lengths",
    "member_dtypes",
    "meta_path",
    "shard_name",
    "shard_path",
    "token_dtype_for",
]

MAX_SENTENCE_TOKENS = 65535  # what sentence lengths of 16 bits can hold
INDEX_MEMBER = "__index__"  # last member of a shard; webdataset passes over such names


def token_dtype_for(vocab_size: int) -> str:
    """ "u16" while every id fits, else "u32"."""
    return "u16" if vocab_size <= 1 << 16 else "u32"


def cut_sentence_lengths(lengths: np.ndarray, limit: int = MAX_SENTENCE_TOKENS) -> np.ndarray:
    """uint16 sentence lengths: those above `limit` tokens are stored as several sentences."""
    if len(lengths) == 0 or lengths.max() <= limit:
        return lengths.astype(np.uint16)
    pieces = [min(limit, n - start) for n in lengths.tolist() for start in range(0, n, limit)]
    return np.array(pieces, dtype=np.uint16)


def shard_name(source: str, split: Split, shard: int) -> str:
    return f"{source}-{split}-{shard:06d}"


def shard_path(source: str, split: Split, shard: int) -> str:
    """Where a shard lies, relative to the dataset's root."""
    return f"{source}/{split}/{shard_name(source, split, shard)}.tar"


def meta_path(source: str, split: Split, shard: int) -> str:
    return f"{source}/meta/{shard_name(source, split, shard)}.jsonl.zst"


@final
class Dataset:
    """An opened dataset. `read_block` needs no state: any thread may call it. May be pickled.

    Of a remote dataset `root` is the local folder that holds its small files, and no shards.
    """

    def __init__(
        self,
        root: Path,
        manifest: dict[str, Any],
        digest: str,
        blocks: np.ndarray,
        shards: Shards | None = None,
    ) -> None:
        self.root = root
        self.manifest = manifest
        # xxh3_128 of manifest.json, hex: names the dataset, down to the last byte
        self.digest = digest
        self.blocks = blocks  # [num_blocks] BLOCK_DTYPE, memory-mapped
        self.shards: Shards = shards or LocalShards(root)
        self.vocab_size: int = manifest["vocab_size"]
        self.token_dtype: np.dtype = TOKEN_DTYPES[manifest["token_dtype"]]
        self.special_ids: dict[str, int] = manifest["tokenizer"]["special_ids"]
        self.sources: list[str] = list(manifest["sources"])

    @classmethod
    def open(cls, root: str | Path, storage: StorageOptions | None = None) -> "Dataset":
        """Open and check a dataset: a folder, or a URL (http, https, s3, gs).

        Block table and tokenizer are compared with the manifest. So are the sizes of a local
        dataset's shards; no remote shard is looked at. The bytes of blocks are checked when read.

        storage: how to read a URL; of no meaning for a folder.
        ValueError, with all problems in one message: no manifest, another format, a shard that is
        missing or has another size, a block table or tokenizer with another digest, a URL whose
        kind of storage needs a package that is not installed. Unreachable (an OSError) when a
        server does not give what it has.
        """
        if is_url(root):
            return cls._open_url(str(root), storage or StorageOptions())
        root = Path(root)
        path = root / "manifest.json"
        if not path.is_file():
            problem = "is not a folder" if not root.is_dir() else "has no manifest.json"
            raise ValueError(
                f"{root} {problem}: no complete dataset is there. `cloze prepare` makes one, "
                "or finishes one that it was stopped at"
            )
        raw, manifest = read_manifest(path)
        problems = table_problems(root, manifest) + shard_problems(root, manifest)
        if problems:
            raise ValueError(f"{root} is damaged:\n  " + "\n  ".join(problems))
        return cls(root, manifest, xxhash.xxh3_128_hexdigest(raw), _checked_table(root, manifest))

    @classmethod
    def _open_url(cls, url: str, options: StorageOptions) -> "Dataset":
        from data.remote import RemoteShards  # local datasets need none of it
        from data.remote_tables import fetch_tables, read_manifest

        shards = RemoteShards(url, options)
        raw = read_manifest(shards)
        manifest = parse_manifest(shards.place("manifest.json"), raw)
        root = fetch_tables(shards, raw, manifest)
        digest = xxhash.xxh3_128_hexdigest(raw)
        return cls(root, manifest, digest, _checked_table(root, manifest), shards)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "blocks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.blocks = map_table(self.root)

    @property
    def place(self) -> str:
        """Where the dataset lies, for people: its folder, or its URL without secrets."""
        return self.shards.place("").rstrip("/")

    def block_indices(self, split: Split, source: str | None = None) -> np.ndarray:
        """int64: the rows of `blocks` that belong to a split, and to one source if given."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {list(SPLITS)}")
        chosen = self.blocks["split"] == SPLITS.index(split)
        if source is not None:
            if source not in self.sources:
                raise ValueError(f"source {source!r} is none of {self.sources} in {self.place}")
            chosen &= self.blocks["source"] == self.sources.index(source)
        return np.flatnonzero(chosen).astype(np.int64)

    def shard_of(self, index: int) -> Path:
        """The shard that holds row `index` of `blocks`; of a remote dataset no such file is there."""
        return self.root / self.address_of(index).shard

    def address_of(self, index: int) -> BlockAddress:
        """Where the bytes of row `index` of `blocks` lie."""
        row = self.blocks[index]
        source, split = self.sources[int(row["source"])], SPLITS[int(row["split"])]
        path = shard_path(source, split, int(row["shard"]))
        return BlockAddress(index, path, int(row["offset"]), int(row["nbytes"]), int(row["xxh3"]))

    def read_block(self, index: int) -> Block:
        """Read row `index` of `blocks` and check it.

        DamagedBlock (a ValueError), naming shard, block and both hashes, when its bytes are not those
        that were written; UnreachableBlock (an OSError) when they cannot be had.
        """
        address = self.address_of(index)
        data = self.shards.read(address)
        try:
            block = parse_block(data, self.manifest["token_dtype"])
            problems = block_problems(block, self.blocks[index], self.vocab_size)
        except ValueError as error:
            block, problems = None, [str(error)]
        if block is None or problems:
            reason = "; ".join(problems)
            raise DamagedBlock(
                f"{block_place(self.shards, address)} is inconsistent: {reason}. {RESTORE}",
                address,
                shard=self.shards.place(address.shard),
                reason=reason,
            )
        return block

    def verify(self) -> None:
        """Read every shard and compare with the manifest. ValueError naming all that differ."""
        problems = []
        for entry in shard_entries(self.manifest):
            try:
                found = self.shards.digest(entry["path"], entry["nbytes"])
            except (ValueError, FileNotFoundError) as error:
                problems.append(f"{entry['path']}: {error}")
                continue
            if found != entry["xxh3"]:
                problems.append(f"{entry['path']}: xxh3 is {found}, manifest says {entry['xxh3']}")
        if problems:
            raise ValueError(f"{self.place} is damaged:\n  " + "\n  ".join(problems))


def _checked_table(root: Path, manifest: dict[str, Any]) -> np.ndarray:
    """The block table, mapped. ValueError where its rows are not what the manifest has room for."""
    table = map_table(root)
    if problems := row_problems(table, manifest):
        raise ValueError(f"{root} is damaged:\n  " + "\n  ".join(problems))
    return table
