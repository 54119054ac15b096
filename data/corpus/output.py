"""Where a corpus run keeps what, and its two kinds of files: documents, and counts.

    <output>/recipe.yaml                              what decides the output; another recipe is refused
    <output>/documents/<source>/000003.jsonl.zst      what stays: id, text, url, language, ...
    <output>/dropped/<source>/000003.jsonl.zst        all else, with step, reason and detail
    <output>/report.html report.md report.json
    <output>/.work/                                   between the stages; logs/<stage>/completions: done tasks

A task is one input file; 000003 is its number. Every file is complete or absent.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, final

import zstandard

from data.documents import open_stream
from data.files import publishing

LEVEL = 3  # of zstandard
DOCUMENTS, DROPPED, WORK = "documents", "dropped", ".work"


def documents_path(output: Path, source: str, task: int) -> Path:
    return output / DOCUMENTS / source / f"{task:06d}.jsonl.zst"


def dropped_path(output: Path, source: str, task: int, stage: str = "") -> Path:
    """stage: "copies" for what the removal of copies dropped; "" for the steps before."""
    name = f"{task:06d}.{stage}.jsonl.zst" if stage else f"{task:06d}.jsonl.zst"
    return output / DROPPED / source / name


def staged_path(output: Path, task: int) -> Path:
    """Documents that the steps have kept, before copies are removed."""
    return output / WORK / "staged" / f"{task:06d}.jsonl.zst"


def counts_path(output: Path, stage: str, task: int) -> Path:
    return output / WORK / "counts" / stage / f"{task:06d}.json"


@final
class DocumentWriter:
    """Lines of JSON in one zstandard frame; the same lines give the same bytes. A context manager."""

    def __init__(self, path: Path) -> None:
        self._publishing = publishing(path)

    def __enter__(self) -> Self:
        self._file: BinaryIO = self._publishing.__enter__()
        self._frame = zstandard.ZstdCompressor(level=LEVEL).compressobj()
        return self

    def write(self, value: dict[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        self._file.write(self._frame.compress(line))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._file.write(self._frame.flush())
        self._publishing.__exit__(kind, error, trace)


def read_documents(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that `DocumentWriter` wrote."""
    with open_stream(str(path), ".zst") as stream:
        for line in stream:
            yield json.loads(line)
