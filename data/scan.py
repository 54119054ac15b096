"""A file in, what it holds out: documents counted, every record checked, the tokenizer's sample drawn."""

import heapq
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import zstandard

from data.documents import (
    Part,
    Problem,
    ReadOptions,
    Record,
    find_line_parts,
    read_records,
)
from data.files import publishing, read_json, write_json
from data.hashing import stable_hash64
from data.inputs import InputFile, suffixes_of
from data.shards import SPLITS, Split

MAX_TEXT_CHARACTERS = 20_000  # of one text of a sample to verify with
MAX_SAMPLE_CHARACTERS = 8 << 20
MAX_PROBLEMS = 20  # of one file; no more are looked for


@dataclass(frozen=True)
class ScanTask:
    file: InputFile
    index: int  # of the file in the plan
    work: str  # the .work folder
    options: ReadOptions
    seed: int
    heldout_fraction: float
    sample_bytes: int  # this file's share of the tokenizer's sample; 0 when none is drawn
    part_bytes: int  # of the file on disk: what one encoding task is to take
    num_stripes: int  # encoding tasks of a file that cannot be read from the middle


@dataclass(frozen=True)
class Scan:
    """What a file holds, counted over documents that are not empty."""

    num_documents: dict[Split, int]
    num_bytes: dict[Split, int]  # of text, in UTF-8
    num_characters: int
    num_empty: int  # documents without a visible character
    parts: list[Part]  # the file as it is shared out among encoding tasks
    problems: list[str]


def scan_path(work: str, index: int) -> Path:
    return Path(work, "scan", f"{index:06d}.json")


def load_scan(work: str, index: int) -> Scan | None:
    """The result of a scan that was completed before, if there is one."""
    path = scan_path(work, index)
    if not path.is_file():
        return None
    found = read_json(path)
    parts = [Part(a, b, tuple(lines) if lines else None) for a, b, lines in found.pop("parts")]
    return Scan(parts=parts, **found)


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
    parts = [] if problems else _parts_of(task)
    scan = Scan(num_documents, num_bytes, num_characters, num_empty, parts, problems)
    if not problems:
        with publishing(sample_path(task.work, task.index)) as file:
            file.write(zstandard.compress(json.dumps(sample.texts()).encode()))
        write_json(scan_path(task.work, task.index), asdict(scan))
    return scan


def _parts_of(task: ScanTask) -> list[Part]:
    """Lines of a plain .jsonl, each read once; of other files stripes, for each of which all is read."""
    if suffixes_of(task.file.path) == (".jsonl", ""):
        return find_line_parts(task.file.path, task.part_bytes)
    return [Part(stripe, task.num_stripes) for stripe in range(task.num_stripes)]


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


def sample_of_files(files: list[InputFile], options: ReadOptions) -> Iterator[str]:
    """Texts from the beginning of every file; MAX_SAMPLE_CHARACTERS in all, each file an equal share."""
    share = MAX_SAMPLE_CHARACTERS // len(files) + 1
    for file in files:
        left = share
        for record in read_records(file.path, options):
            if left <= 0:
                break
            if isinstance(record, Record):
                yield record.text[: min(left, MAX_TEXT_CHARACTERS)]
                left -= min(len(record.text), MAX_TEXT_CHARACTERS)
