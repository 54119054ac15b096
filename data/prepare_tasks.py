"""The three tasks of `cloze prepare` that run in worker processes: scan a file, encode a stripe, write a shard.

A task is a pure function of its arguments and the input files. It leaves its files under .work, the one
that tells it is complete last, so a task that was cut off is simply run again.
"""

import functools
import heapq
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from data.documents import Problem, ReadOptions, Record, read_records
from data.files import publishing, read_json, write_array, write_json
from data.hashing import stable_hash64
from data.inputs import InputFile
from data.sentences import sentence_ends
from data.shard_writer import ShardAddress, TokenisedDocument, WrittenShard, write_shard
from data.shards import SPLITS, TOKEN_DTYPES, Split
from data.spill import Address, SpillWriter, parse_documents, read_bucket
from data.vocab import Tokenizer

MAX_PROBLEMS = 20  # of one file; no more are looked for


@dataclass(frozen=True)
class ScanTask:
    file: InputFile
    index: int  # of the file in the plan
    work: str  # the .work folder
    options: ReadOptions
    seed: int
    heldout_fraction: float
    sample_bytes: int  # this file's share of the tokenizer's sample; 0 when none is trained


@dataclass(frozen=True)
class Scan:
    """What a file holds, counted over documents that are not empty."""

    num_documents: dict[Split, int]
    num_bytes: dict[Split, int]  # of text, in UTF-8
    num_characters: int
    num_empty: int  # documents without a visible character
    problems: list[str]


def scan_path(work: str, index: int) -> Path:
    return Path(work, "scan", f"{index:06d}.json")


def load_scan(work: str, index: int) -> Scan | None:
    """The result of a scan that was completed before, if there is one."""
    path = scan_path(work, index)
    return Scan(**read_json(path)) if path.is_file() else None


def scan_file(task: ScanTask) -> Scan:
    """Read a whole file once: check every record, count, and draw the tokenizer's sample.

    Nothing is published when there are problems.
    """
    num_documents: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    num_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    num_characters = num_empty = 0
    problems: list[str] = []
    sample = _Sample(task.sample_bytes)
    for record in read_records(task.file.path, task.options):
        if isinstance(record, Problem):
            problems.append(record.message)
            if len(problems) == MAX_PROBLEMS:
                break
            continue
        if not record.text or record.text.isspace():
            num_empty += 1
            continue
        size = len(record.text.encode("utf-8"))
        split = split_of(record.text, task.seed, task.heldout_fraction)
        num_documents[split] += 1
        num_bytes[split] += size
        num_characters += len(record.text)
        if split == "train" and task.sample_bytes:
            key = stable_hash64(task.seed, "sample", task.file.source, id_string(task.file, record))
            sample.add(key, size, record.text)
    if not problems and not sum(num_documents.values()) and not num_empty:
        problems.append(f"{task.file.path} holds no document")
    scan = Scan(num_documents, num_bytes, num_characters, num_empty, problems)
    if not problems:
        with publishing(sample_path(task.work, task.index)) as file:
            file.write(zstandard.compress(json.dumps(sample.texts()).encode()))
        write_json(scan_path(task.work, task.index), asdict(scan))
    return scan


def split_of(text: str, seed: int, heldout_fraction: float) -> Split:
    """Decided by the text itself, so that copies of a document never lie on both sides."""
    return (
        "heldout" if stable_hash64(seed, "heldout", text) < heldout_fraction * 2.0**64 else "train"
    )


def id_string(file: InputFile, record: Record) -> str:
    """A document's name within its source, the same wherever the corpus lies."""
    return f"{file.relative}#{record.number}"


def sample_path(work: str, index: int) -> Path:
    return Path(work, "scan", f"{index:06d}.sample.zst")


def sample_texts(work: str, num_files: int) -> Iterator[str]:
    """The tokenizer's sample, file by file."""
    for index in range(num_files):
        yield from json.loads(zstandard.decompress(sample_path(work, index).read_bytes()))


class _Sample:
    """The documents with the smallest hashes, as many as fill `budget` bytes; the last one is cut."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._heap: list[
            tuple[int, int, str]
        ] = []  # (-hash, bytes, text): the largest hash is first
        self._num_bytes = 0

    def add(self, key: int, num_bytes: int, text: str) -> None:
        heapq.heappush(self._heap, (-key, num_bytes, text))
        self._num_bytes += num_bytes
        while self._num_bytes - self._heap[0][1] >= self._budget:
            self._num_bytes -= heapq.heappop(self._heap)[1]

    def texts(self) -> list[str]:
        entries = sorted(self._heap, reverse=True)
        texts = [text for _, _, text in entries]
        if self._num_bytes > self._budget:
            room = entries[-1][1] - (self._num_bytes - self._budget)
            texts[-1] = texts[-1].encode("utf-8")[:room].decode("utf-8", "ignore")
        return texts


class Buckets(NamedTuple):
    """How many shards a source has in each split. Spill files count the train ones first."""

    train: int
    heldout: int

    def of(self, split: Split, order_key: int) -> int:
        """The bucket, counted through, of a document: by the range its order key lies in."""
        if split == "train":
            return order_key * self.train >> 64
        return self.train + (order_key * self.heldout >> 64)

    def number(self, split: Split, shard: int) -> int:
        return shard if split == "train" else self.train + shard


@dataclass(frozen=True)
class EncodeTask:
    file: InputFile
    index: int
    stripe: int  # records whose number is this modulo num_stripes
    num_stripes: int
    work: str
    options: ReadOptions
    seed: int
    heldout_fraction: float
    buckets: Buckets
    tokenizer: str  # folder
    token_dtype: str


def spill_path(work: str, index: int, stripe: int) -> Path:
    return Path(work, "spill", f"{index:06d}-{stripe:02d}.spill")


def encode_result_path(task: EncodeTask) -> Path:
    return spill_path(task.work, task.index, task.stripe).with_suffix(".json")


def encode_stripe(task: EncodeTask) -> dict[str, int]:
    """Tokenise one stripe of a file into a spill file."""
    tokenizer = _load_tokenizer(task.tokenizer)
    counts = {"num_documents": 0, "num_tokens": 0, "num_without_tokens": 0}
    source = task.file.source
    with publishing(spill_path(task.work, task.index, task.stripe)) as file:
        spill = SpillWriter(file, sum(task.buckets), TOKEN_DTYPES[task.token_dtype])
        for record in read_records(
            task.file.path, task.options, stripe=task.stripe, num_stripes=task.num_stripes
        ):
            if isinstance(record, Problem):
                raise ValueError(f"{record.message} (it was sound when it was scanned)")
            if not record.text or record.text.isspace():
                continue
            encoded = tokenizer.encode(record.text, sentence_ends(record.text))
            if (
                len(encoded.ids) == 0
            ):  # characters that the normaliser removes, such as control codes
                counts["num_without_tokens"] += 1
                continue
            name = id_string(task.file, record)
            key = stable_hash64(task.seed, source, name)
            address = Address(key, stable_hash64(source, name), record.number, record.own_id)
            split = split_of(record.text, task.seed, task.heldout_fraction)
            spill.add(task.buckets.of(split, key), address, encoded)
            counts["num_documents"] += 1
            counts["num_tokens"] += len(encoded.ids)
        spill.finish()
    write_json(encode_result_path(task), counts)
    return counts


@functools.cache
def _load_tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(folder)


@dataclass(frozen=True)
class ShardTask:
    address: ShardAddress
    root: str
    work: str
    spills: tuple[tuple[str, int, int], ...]  # (file, index, stripe) of all of the source, in order
    buckets: Buckets
    block_tokens: int
    token_dtype: str
    vocab_size: int


def shard_result_path(task: ShardTask) -> Path:
    return Path(task.work, "shards", f"{task.address.name}.json")


def write_bucket(task: ShardTask) -> dict[str, Any] | None:
    """Sort a bucket and write it as a shard. Its entry for the manifest; None if it has no document."""
    dtype = TOKEN_DTYPES[task.token_dtype]
    bucket = task.buckets.number(task.address.split, task.address.shard)
    documents: list[tuple[int, int, int, TokenisedDocument]] = []
    for file, index, stripe in task.spills:
        data = read_bucket(spill_path(task.work, index, stripe), bucket, sum(task.buckets))
        for key, document in parse_documents(data, file, dtype):
            documents.append((key, index, document.record, document))
    documents.sort(key=lambda entry: entry[:3])
    result = shard_result_path(task)
    if not documents:
        write_json(result, None)
        return None
    written = write_shard(
        Path(task.root),
        task.address,
        (document for *_, document in documents),
        block_tokens=task.block_tokens,
        token_dtype=task.token_dtype,
        vocab_size=task.vocab_size,
    )
    for name, array in (("blocks", written.blocks), ("counts", written.token_counts)):
        write_array(result.with_suffix(f".{name}.npy"), array)
    write_json(result, written.entry)
    return written.entry


def load_shard(task: ShardTask) -> WrittenShard | None:
    """A shard that `write_bucket` has completed; None for an empty bucket."""
    path = shard_result_path(task)
    entry = read_json(path)
    if entry is None:
        return None
    arrays = (np.load(path.with_suffix(f".{name}.npy")) for name in ("blocks", "counts"))
    return WrittenShard(entry, *arrays)
