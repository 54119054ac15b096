"""Tokenised documents in their final order in, one shard out: a tar, its metadata, its block rows."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
import zstandard

from data.files import file_digest, publishing, write_array, write_json
from data.manifest import sealed
from data.shards import (
    BLOCK_DTYPE,
    FORMAT,
    INDEX_MEMBER,
    MAX_SENTENCE_TOKENS,
    SPLITS,
    Split,
    cut_sentence_lengths,
    member_dtypes,
    meta_path,
    shard_name,
    shard_path,
)


class TokenisedDocument(NamedTuple):
    """A document ready to be written. n tokens, k sentences."""

    document_id: int  # 64 bits
    own_id: str | None  # the id that its file gives it
    file: str  # relative to the common parent of the source's files
    record: int  # its number in that file, from 0
    tokens: np.ndarray  # [n] uint16 or uint32
    sentence_lengths: np.ndarray  # [k], tokens, sums to n
    word_starts: np.ndarray  # [n] bool


class ShardAddress(NamedTuple):
    source: str
    source_index: int
    split: Split
    shard: int

    @property
    def name(self) -> str:
        return shard_name(self.source, self.split, self.shard)


class WrittenShard(NamedTuple):
    """What the manifest and the block table need to know of a shard."""

    entry: dict[str, Any]  # {"path", "nbytes", "xxh3"}
    blocks: np.ndarray  # [num_blocks] BLOCK_DTYPE
    token_counts: np.ndarray  # [vocab_size] int64


class Part(NamedTuple):
    """A document, or a part of one that is longer than a block."""

    document: TokenisedDocument
    tokens: np.ndarray
    sentence_lengths: np.ndarray
    word_starts: np.ndarray


def document_parts(document: TokenisedDocument, block_tokens: int) -> list[Part]:
    """A document in parts of at most `block_tokens`, cut at sentence ends.

    Only a sentence that is itself longer than a block, or than 65535 tokens, is cut inside.
    """
    lengths = cut_sentence_lengths(
        document.sentence_lengths, min(block_tokens, MAX_SENTENCE_TOKENS)
    )
    if len(document.tokens) <= block_tokens:
        return [Part(document, document.tokens, lengths, document.word_starts)]
    parts, first, start = [], 0, 0
    ends = np.cumsum(lengths)
    while first < len(lengths):
        last = int(np.searchsorted(ends, start + block_tokens, side="right"))
        stop = int(ends[last - 1])
        tokens, words = document.tokens[start:stop], document.word_starts[start:stop]
        parts.append(Part(document, tokens, lengths[first:last], words))
        first, start = last, stop
    return parts


def cut_blocks(parts: Iterable[Part], block_tokens: int) -> Iterator[list[Part]]:
    """Consecutive parts, as many as fit into `block_tokens`."""
    block: list[Part] = []
    num_tokens = 0
    for part in parts:
        if block and num_tokens + len(part.tokens) > block_tokens:
            yield block
            block, num_tokens = [], 0
        block.append(part)
        num_tokens += len(part.tokens)
    if block:
        yield block


def write_shard(
    root: Path,
    address: ShardAddress,
    documents: Iterable[TokenisedDocument],
    *,
    block_tokens: int,
    token_dtype: str,
    vocab_size: int,
) -> WrittenShard:
    """Write a shard's tar and metadata under `root`; each gets its name when it is complete.

    The bytes depend on nothing but the arguments. Documents without tokens must not be given.
    """
    meta_name = meta_path(address.source, address.split, address.shard)
    path = shard_path(address.source, address.split, address.shard)
    counts = np.zeros(vocab_size, dtype=np.int64)
    rows: list[tuple[int, ...]] = []
    split = SPLITS.index(address.split)
    whole = xxhash.xxh3_128()
    offset = 0
    parts = (part for document in documents for part in document_parts(document, block_tokens))
    with publishing(root / meta_name) as meta_file, publishing(root / path) as tar_file:
        meta = zstandard.ZstdCompressor(level=3).stream_writer(meta_file, closefd=False)
        for number, block in enumerate(cut_blocks(parts, block_tokens)):
            data = tar_sample(f"{address.name}-{number:05d}", block_members(block, token_dtype))
            sizes = (len(block), _num_tokens(block), sum(len(p.sentence_lengths) for p in block))
            place = (address.source_index, split, address.shard, offset, len(data))
            rows.append((*place, *sizes, xxhash.xxh3_64_intdigest(data)))
            whole.update(data)
            tar_file.write(data)
            offset += len(data)
            tokens = np.concatenate([part.tokens for part in block])
            counts += np.bincount(tokens, minlength=vocab_size)
            meta.write(b"".join(map(_meta_line, block)))
        ending = tar_ending(address.name, len(rows), whole.hexdigest())
        whole.update(ending)
        tar_file.write(ending)
        meta.close()
    entry = {"path": path, "nbytes": offset + len(ending), "xxh3": whole.hexdigest()}
    return WrittenShard(entry, np.array(rows, dtype=BLOCK_DTYPE), counts)


def block_members(block: list[Part], token_dtype: str) -> dict[str, bytes]:
    """The members of a block's sample: extension -> bytes."""
    arrays = {
        "doc.u32": [len(part.tokens) for part in block],
        "ids.u64": [part.document.document_id for part in block],
        "nse.u32": [len(part.sentence_lengths) for part in block],
        "sen.u16": np.concatenate([part.sentence_lengths for part in block]),
        f"tok.{token_dtype}": np.concatenate([part.tokens for part in block]),
        "wrd.bit": np.packbits(
            np.concatenate([part.word_starts for part in block]), bitorder="little"
        ),
    }
    dtypes = member_dtypes(token_dtype)
    return {name: np.asarray(array, dtypes[name]).tobytes() for name, array in arrays.items()}


def tar_sample(key: str, members: dict[str, bytes]) -> bytes:
    """One sample, members by extension; without the end of the archive.

    The bytes are those of webdataset's TarWriter, whose import would bring torch into every worker.
    """
    parts = []
    for extension in sorted(members):
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size, member.mode = len(members[extension]), 0o444
        padding = bytes(-member.size % tarfile.BLOCKSIZE)
        parts += [member.tobuf(tarfile.USTAR_FORMAT), members[extension], padding]
    return b"".join(parts)


def tar_ending(shard: str, num_blocks: int, digest: str) -> bytes:
    """The index member and the end of the archive: a shard without them was cut off.

    digest: xxh3_128 of all bytes before the index member, hex.
    """
    index = {"format": FORMAT, "shard": shard, "num_blocks": num_blocks, "digest": digest}
    data = json.dumps(index).encode() + b"\n"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(INDEX_MEMBER)
        member.size, member.mode = len(data), 0o444
        tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _num_tokens(block: list[Part]) -> int:
    return sum(len(part.tokens) for part in block)


def _meta_line(part: Part) -> bytes:
    document = part.document
    line = {
        "document_id": f"{document.document_id:016x}",
        "id": document.own_id,
        "file": document.file,
        "record": document.record,
        "num_tokens": len(part.tokens),
        "num_sentences": len(part.sentence_lengths),
    }
    return json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n"


def publish_dataset(
    root: Path,
    facts: dict[str, Any],
    sources: list[str],
    written: list[tuple[ShardAddress, WrittenShard]],
) -> None:
    """Write blocks.npy, then manifest.json: with its rename the dataset is complete.

    facts: the manifest's keys that do not come from the shards. Token counts are not used here.
    """
    path = root / "blocks.npy"
    write_array(path, table_of(written))
    contents = contents_of(sources, written)
    manifest = {"format": FORMAT, **facts, "sources": contents, "blocks": table_facts(path)}
    write_json(root / "manifest.json", sealed(manifest))


def table_of(written: list[tuple[ShardAddress, WrittenShard]]) -> np.ndarray:
    """[num_blocks] BLOCK_DTYPE, by source, split and shard."""
    ordered = sorted(
        written, key=lambda item: (item[0].source_index, item[0].split != "train", item[0].shard)
    )
    return np.concatenate([shard.blocks for _, shard in ordered])


def table_facts(path: Path) -> dict[str, Any]:
    """What the manifest says of a block table's file."""
    num_blocks = len(np.load(path, mmap_mode="r"))
    return {"nbytes": path.stat().st_size, "xxh3": file_digest(path), "num_blocks": num_blocks}


def contents_of(
    sources: list[str], written: list[tuple[ShardAddress, WrittenShard]]
) -> dict[str, dict[str, Any]]:
    """What the manifest says of sources: source -> split -> counts and shards."""
    return {
        source: {
            split: _contents(
                [shard for a, shard in written if (a.source, a.split) == (source, split)]
            )
            for split in SPLITS
        }
        for source in sources
    }


def _contents(shards: list[WrittenShard]) -> dict[str, Any]:
    """The manifest's entry for one split of one source."""
    names = ("num_documents", "num_tokens", "num_sentences")
    totals = {name: sum(int(s.blocks[name].sum(dtype=np.int64)) for s in shards) for name in names}
    return {**totals, "shards": [shard.entry for shard in shards]}
