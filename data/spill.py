"""Tokenised documents in, in any order, out again bucket by bucket: the shuffle's files on disk.

A spill file is a series of runs. A run holds the documents of some tens of megabytes, sorted by bucket,
so that memory stays the same whatever the size of the corpus. At the file's end stands a table of where
each bucket of each run begins:

    runs ... | uint64 [num_runs, num_buckets + 1] offsets | uint64 num_runs
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.shard_writer import TokenisedDocument
from data.vocab import Encoded

HEADER = struct.Struct(
    "<QQQIIi"
)  # order key, document id, record, tokens, sentences, bytes of own id
RUN_BYTES = 32 << 20
NO_ID = -1


class Address(NamedTuple):
    """What decides where a document goes, and what it is called there."""

    order_key: int  # 64 bits: documents of a bucket are sorted by it
    document_id: int  # 64 bits
    record: int
    own_id: str | None


class SpillWriter:
    """Writes one spill file. final. Call `finish` once, after the last document."""

    def __init__(self, file: BinaryIO, num_buckets: int, token_dtype: np.dtype) -> None:
        self._file, self._num_buckets, self._token_dtype = file, num_buckets, token_dtype
        self._waiting: list[tuple[int, bytes]] = []  # (bucket, document)
        self._num_waiting_bytes = 0
        self._position = 0
        self._tables: list[np.ndarray] = []

    def add(self, bucket: int, address: Address, encoded: Encoded) -> None:
        own_id = address.own_id.encode("utf-8") if address.own_id is not None else b""
        data = b"".join(
            (
                HEADER.pack(
                    address.order_key,
                    address.document_id,
                    address.record,
                    len(encoded.ids),
                    len(encoded.sentence_lengths),
                    NO_ID if address.own_id is None else len(own_id),
                ),
                encoded.ids.astype(self._token_dtype).tobytes(),
                encoded.sentence_lengths.tobytes(),
                np.packbits(encoded.word_starts, bitorder="little").tobytes(),
                own_id,
            )
        )
        self._waiting.append((bucket, data))
        self._num_waiting_bytes += len(data)
        if self._num_waiting_bytes >= RUN_BYTES:
            self._write_run()

    def finish(self) -> None:
        self._write_run()
        for table in self._tables:
            self._file.write(table.tobytes())
        self._file.write(np.array([len(self._tables)], "<u8").tobytes())

    def _write_run(self) -> None:
        if not self._waiting:
            return
        self._waiting.sort(key=lambda item: item[0])  # stable: records stay in order
        sizes = np.zeros(self._num_buckets, dtype="<u8")
        for bucket, data in self._waiting:
            sizes[bucket] += len(data)
            self._file.write(data)
        ends = self._position + np.cumsum(sizes, dtype="<u8")
        self._tables.append(np.concatenate([[self._position], ends]).astype("<u8"))
        self._position = int(ends[-1])
        self._waiting, self._num_waiting_bytes = [], 0


def read_bucket(path: Path, bucket: int, num_buckets: int) -> bytes:
    """The documents of one bucket in a spill file, back to back."""
    parts = []
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 8)
        num_runs = int.from_bytes(file.read(8), "little")
        width = (num_buckets + 1) * 8
        tables = size - 8 - num_runs * width
        for run in range(num_runs):
            file.seek(tables + run * width + bucket * 8)
            start, end = np.frombuffer(file.read(16), "<u8").tolist()
            if end > start:
                file.seek(start)
                parts.append(file.read(end - start))
    return b"".join(parts)


def parse_documents(
    data: bytes, file: str, token_dtype: np.dtype
) -> list[tuple[int, TokenisedDocument]]:
    """(order key, document) of each document in a bucket's bytes. Arrays are views of `data`."""
    documents = []
    position = 0
    while position < len(data):
        key, document_id, record, num_tokens, num_sentences, id_bytes = HEADER.unpack_from(
            data, position
        )
        position += HEADER.size
        tokens = np.frombuffer(data, token_dtype, num_tokens, position)
        position += tokens.nbytes
        lengths = np.frombuffer(data, "<u2", num_sentences, position)
        position += lengths.nbytes
        bits = np.frombuffer(data, np.uint8, (num_tokens + 7) // 8, position)
        position += bits.nbytes
        own_id = None
        if id_bytes != NO_ID:
            own_id = data[position : position + id_bytes].decode("utf-8")
            position += id_bytes
        words = np.unpackbits(bits, count=num_tokens, bitorder="little").view(np.bool_)
        document = TokenisedDocument(document_id, own_id, file, record, tokens, lengths, words)
        documents.append((key, document))
    return documents
