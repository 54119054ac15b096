"""The tasks of `cloze prepare` that run in worker processes, beside the scan: encode a part, write a shard.

A task is a pure function of its arguments and the input files. It leaves its files under .work, the one
that tells it is complete last, so a task that was cut off is simply run again.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.documents import Part, Problem, ReadOptions, Record, read_records
from data.files import folder_digest, publishing, read_json, write_array, write_json
from data.hashing import stable_hash64
from data.inputs import InputFile
from data.scan import id_string, split_of
from data.sentences import sentence_ends
from data.shard_writer import ShardAddress, TokenisedDocument, WrittenShard, write_shard
from data.shards import TOKEN_DTYPES, Split
from data.spill import Address, SpillWriter, parse_documents, read_bucket
from data.vocab import Encoded, Tokenizer
from data.words import WordStarts

BATCH_CHARACTERS = 1 << 16  # tokenised at a time


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
    part: Part
    number: int  # of the part in its file
    work: str
    options: ReadOptions
    seed: int
    heldout_fraction: float
    buckets: Buckets
    tokenizer: str  # folder
    token_dtype: str
    word_starts: WordStarts


def spill_path(work: str, index: int, number: int) -> Path:
    return Path(work, "spill", f"{index:06d}-{number:04d}.spill")


def encode_result_path(task: EncodeTask) -> Path:
    return spill_path(task.work, task.index, task.number).with_suffix(".json")


def encode_part(task: EncodeTask) -> dict[str, int]:
    """Tokenise one part of a file into a spill file."""
    digest = folder_digest(Path(task.tokenizer))
    tokenizer = _load_tokenizer(task.tokenizer, task.word_starts, digest)
    counts = {"num_documents": 0, "num_tokens": 0, "num_without_tokens": 0}
    with publishing(spill_path(task.work, task.index, task.number)) as file:
        spill = SpillWriter(file, sum(task.buckets), TOKEN_DTYPES[task.token_dtype])
        for records in _batches(task):
            texts = [record.text for record in records]
            ends = [sentence_ends(text) for text in texts]
            for record, encoded in zip(records, tokenizer.encode_batch(texts, ends), strict=True):
                if (
                    len(encoded.ids) == 0
                ):  # characters that the normaliser removes, such as control codes
                    counts["num_without_tokens"] += 1
                    continue
                _spill(spill, task, record, encoded)
                counts["num_documents"] += 1
                counts["num_tokens"] += len(encoded.ids)
        spill.finish()
    write_json(encode_result_path(task), counts)
    return counts


def _batches(task: EncodeTask) -> Iterator[list[Record]]:
    """The records of a part that hold any text, some at a time: many short ones cost as one long one."""
    batch: list[Record] = []
    num_characters = 0
    for record in read_records(task.file.path, task.options, task.part):
        if isinstance(record, Problem):
            raise ValueError(f"{record.message} (it was sound when it was scanned)")
        if not record.text or record.text.isspace():
            continue
        batch.append(record)
        num_characters += len(record.text)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _spill(spill: SpillWriter, task: EncodeTask, record: Record, encoded: Encoded) -> None:
    source, name = task.file.source, id_string(task.file, record)
    key = stable_hash64(task.seed, source, name)
    address = Address(key, stable_hash64(source, name), record.number, record.own_id)
    split = split_of(record.text, task.seed, task.heldout_fraction)
    spill.add(task.buckets.of(split, key), address, encoded)


@functools.cache
def _load_tokenizer(folder: str, word_starts: WordStarts, digest: str) -> Tokenizer:
    """digest: of the folder, which another dataset may have used before."""
    del digest
    return Tokenizer.load(folder, word_starts)


@dataclass(frozen=True)
class ShardTask:
    address: ShardAddress
    root: str
    work: str
    spills: tuple[tuple[str, int, int], ...]  # (file, index, part) of all of the source, in order
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
    for file, index, number in task.spills:
        data = read_bucket(spill_path(task.work, index, number), bucket, sum(task.buckets))
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
