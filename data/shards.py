"""A prepared dataset's folder in, its blocks out: format v1, read and checked.

    <root>/manifest.json                                   counts, digests; written last, so its absence
                                                           means that the dataset is incomplete
    <root>/blocks.npy                                      one row (BLOCK_DTYPE) per block
    <root>/tokenizer/                                      as `AutoTokenizer.from_pretrained` wants it
    <root>/<source>/<split>/<source>-<split>-000003.tar    a shard: USTAR, one sample per block
    <root>/<source>/meta/<source>-<split>-000003.jsonl.zst one line per document, in the shard's order

Only manifest.json, blocks.npy, the tokenizer and the tars are ever read for training.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import xxhash

from data.files import file_digest, folder_digest

FORMAT = "cloze-shards-v1"
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")
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
TOKEN_DTYPES = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
MAX_SENTENCE_TOKENS = 65535  # what sentence lengths of 16 bits can hold
TAR_RECORD = 512  # bytes: header size, and what members are padded to
INDEX_MEMBER = "__index__"  # last member of a shard; webdataset passes over such names


class DamagedBlock(ValueError):
    """A block whose bytes are not those that were written."""


class Block(NamedTuple):
    """The unit of reading and shuffling: some documents, cut into sentences. Arrays are read-only."""

    tokens: np.ndarray  # [num_tokens] uint16 or uint32: documents back to back
    document_lengths: np.ndarray  # [num_documents] uint32, tokens
    sentences_per_document: np.ndarray  # [num_documents] uint32
    sentence_lengths: np.ndarray  # [num_sentences] uint16, tokens
    word_starts: np.ndarray  # [ceil(num_tokens / 8)] uint8, little-endian bits
    document_ids: np.ndarray  # [num_documents] uint64


def member_dtypes(token_dtype: str) -> dict[str, np.dtype]:
    """Extension -> dtype of a sample's members, in the fixed order they have in the tar."""
    return {
        "doc.u32": np.dtype("<u4"),
        "ids.u64": np.dtype("<u8"),
        "nse.u32": np.dtype("<u4"),
        "sen.u16": np.dtype("<u2"),
        f"tok.{token_dtype}": TOKEN_DTYPES[token_dtype],
        "wrd.bit": np.dtype("u1"),
    }


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
    """An opened dataset whose files are all there. `read_block` needs no state: any thread may call it."""

    def __init__(
        self, root: Path, manifest: dict[str, Any], digest: str, blocks: np.ndarray
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.digest = (
            digest  # xxh3_128 of manifest.json, hex: names the dataset, down to the last byte
        )
        self.blocks = blocks  # [num_blocks] BLOCK_DTYPE, memory-mapped
        self.vocab_size: int = manifest["vocab_size"]
        self.token_dtype: np.dtype = TOKEN_DTYPES[manifest["token_dtype"]]
        self.special_ids: dict[str, int] = manifest["tokenizer"]["special_ids"]
        self.sources: list[str] = list(manifest["sources"])

    @classmethod
    def open(cls, root: str | Path) -> "Dataset":
        """Open and check a dataset; the bytes of shards are checked when they are read.

        ValueError, with all problems in one message: no manifest, another format, a shard that is
        missing or has another size, a block table or tokenizer with another digest.
        """
        root = Path(root)
        path = root / "manifest.json"
        if not path.is_file():
            problem = "is not a folder" if not root.is_dir() else "has no manifest.json"
            raise ValueError(
                f"{root} {problem}: no complete dataset is there. `cloze prepare` makes one, "
                "or finishes one that it was stopped at"
            )
        raw = path.read_bytes()
        manifest = _parse_manifest(path, raw)
        problems = _table_problems(root, manifest) + _shard_problems(root, manifest)
        if problems:
            raise ValueError(f"{root} is damaged:\n  " + "\n  ".join(problems))
        blocks = np.load(root / "blocks.npy", mmap_mode="r")
        return cls(root, manifest, xxhash.xxh3_128_hexdigest(raw), blocks)

    def block_indices(self, split: Split, source: str | None = None) -> np.ndarray:
        """int64: the rows of `blocks` that belong to a split, and to one source if given."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {list(SPLITS)}")
        chosen = self.blocks["split"] == SPLITS.index(split)
        if source is not None:
            if source not in self.sources:
                raise ValueError(f"source {source!r} is none of {self.sources} in {self.root}")
            chosen &= self.blocks["source"] == self.sources.index(source)
        return np.flatnonzero(chosen).astype(np.int64)

    def shard_of(self, index: int) -> Path:
        """The shard that holds row `index` of `blocks`."""
        row = self.blocks[index]
        source, split = self.sources[int(row["source"])], SPLITS[int(row["split"])]
        return self.root / shard_path(source, split, int(row["shard"]))

    def read_block(self, index: int) -> Block:
        """Read row `index` of `blocks` and check it.

        ValueError, naming shard, block and both hashes, when its bytes are not those that were written.
        """
        row = self.blocks[index]
        path, offset, nbytes = self.shard_of(index), int(row["offset"]), int(row["nbytes"])
        place = f"block {index} ({path}, bytes {offset} to {offset + nbytes})"
        data = _read_range(path, offset, nbytes, place)
        found, expected = xxhash.xxh3_64_intdigest(data), int(row["xxh3"])
        if found != expected:
            raise ValueError(
                f"{place} is damaged: xxh3 is {found:016x}, blocks.npy says {expected:016x}. "
                "Restore the shard from a copy, or prepare the dataset again"
            )
        block = _parse_block(data, self.manifest["token_dtype"])
        problems = _block_problems(block, row, self.vocab_size)
        if problems:
            raise ValueError(f"{place} is inconsistent: " + "; ".join(problems))
        return block

    def verify(self) -> None:
        """Read every shard and compare with the manifest. ValueError naming all that differ."""
        problems = []
        for entry in _shard_entries(self.manifest):
            found = file_digest(self.root / entry["path"])
            if found != entry["xxh3"]:
                problems.append(f"{entry['path']}: xxh3 is {found}, manifest says {entry['xxh3']}")
        if problems:
            raise ValueError(f"{self.root} is damaged:\n  " + "\n  ".join(problems))


def _parse_manifest(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
    return manifest


def _table_problems(root: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with blocks.npy and with the tokenizer's files."""
    problems = []
    table, expected = root / "blocks.npy", manifest["blocks"]
    if not table.is_file():
        problems.append("blocks.npy is missing")
    elif table.stat().st_size != expected["nbytes"]:
        size = table.stat().st_size
        problems.append(f"blocks.npy has {size} bytes, manifest says {expected['nbytes']}")
    elif (found := file_digest(table)) != expected["xxh3"]:
        problems.append(f"blocks.npy: xxh3 is {found}, manifest says {expected['xxh3']}")
    folder, wanted = root / "tokenizer", manifest["tokenizer"]["digest"]
    if not folder.is_dir():
        problems.append("tokenizer/ is missing")
    elif (found := folder_digest(folder)) != wanted:
        problems.append(f"tokenizer/: the digest of its files is {found}, manifest says {wanted}")
    return problems


def _shard_entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        entry
        for splits in manifest["sources"].values()
        for split in SPLITS
        for entry in splits[split]["shards"]
    ]


def _shard_problems(root: Path, manifest: dict[str, Any]) -> list[str]:
    problems = []
    for entry in _shard_entries(manifest):
        try:
            size = (root / entry["path"]).stat().st_size
        except FileNotFoundError:
            problems.append(f"{entry['path']} is missing")
            continue
        if size != entry["nbytes"]:
            problems.append(f"{entry['path']} has {size} bytes, manifest says {entry['nbytes']}")
    return problems


def _read_range(path: Path, offset: int, nbytes: int, place: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{place} cannot be read: {error}") from error
    try:
        data = b""
        while len(data) < nbytes:  # pread may give less than asked for
            part = os.pread(descriptor, nbytes - len(data), offset + len(data))
            if not part:
                raise ValueError(f"{place} is cut off: {len(data)} of {nbytes} bytes are there")
            data += part
        return data
    finally:
        os.close(descriptor)


def _parse_block(data: bytes, token_dtype: str) -> Block:
    """The members of one sample. The bytes were checked, so their layout is as it was written."""
    arrays: dict[str, np.ndarray] = {}
    position = 0
    for extension, dtype in member_dtypes(token_dtype).items():
        header = data[position : position + TAR_RECORD]
        assert header[:100].rstrip(b"\0").endswith(b"." + extension.encode())
        size = int(header[124:136].rstrip(b"\0 "), 8)
        start = position + TAR_RECORD
        arrays[extension[:3]] = np.frombuffer(data, dtype, size // dtype.itemsize, start)
        position = start + size + -size % TAR_RECORD
    assert position == len(data)
    names = ("tok", "doc", "nse", "sen", "wrd", "ids")
    return Block(*(arrays[name] for name in names))


def _block_problems(block: Block, row: np.void, vocab_size: int) -> list[str]:
    """Sums that do not agree, ids that no vocabulary entry has."""
    num_tokens, num_documents = len(block.tokens), len(block.document_lengths)
    sums = {
        "tokens against blocks.npy": (num_tokens, row["num_tokens"]),
        "documents against blocks.npy": (num_documents, row["num_documents"]),
        "sentences against blocks.npy": (len(block.sentence_lengths), row["num_sentences"]),
        "document lengths": (block.document_lengths.sum(dtype=np.int64), num_tokens),
        "sentence lengths": (block.sentence_lengths.sum(dtype=np.int64), num_tokens),
        "sentences per document": (
            block.sentences_per_document.sum(dtype=np.int64),
            len(block.sentence_lengths),
        ),
        "document ids": (len(block.document_ids), num_documents),
        "bytes of word starts": (len(block.word_starts), (num_tokens + 7) // 8),
    }
    problems = [f"{name}: {a} and {b}" for name, (a, b) in sums.items() if int(a) != int(b)]
    if num_tokens and int(block.tokens.max()) >= vocab_size:
        problems.append(f"token id {int(block.tokens.max())} with a vocabulary of {vocab_size}")
    return problems
