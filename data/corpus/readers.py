"""A corpus file of any kind in, its records out, each with a text or the reason why there is none.

    .txt                       bytes in any encoding (data/corpus/encodings.py)
    .jsonl .parquet            a field of each record, UTF-8
    .html .htm                 main text, by trafilatura
    .warc .arc .wet            web archives: HTML responses, and texts that were extracted before
    .tar                       WebDataset samples: a .txt, .html or .json member of each

Each also .gz .xz .zst. Nothing raises here but a full disk: what cannot be read is a record with a reason.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, Self

from data.corpus.encodings import decode
from data.corpus.html import main_text
from data.corpus.recipe import SourceConfig
from data.corpus.warc import read_warc
from data.documents import DAMAGE, Problem, ReadOptions, open_stream, read_records
from data.inputs import COMPRESSIONS

TABLES, HTML, WARC = (".jsonl", ".parquet"), (".html", ".htm"), (".warc", ".arc", ".wet")
KINDS = (".txt", *TABLES, *HTML, *WARC, ".tar")
SUPPORTED = f"{' '.join(KINDS)}, each also {' '.join(COMPRESSIONS)}"
MAX_BYTES = 64 << 20  # of one document
MAX_EMPTY_READS = 8
MAX_HEADER_BYTES = 1 << 20  # of a long name, or of what a PAX header says of a member
LONG_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


class Raw(NamedTuple):
    """One record as it was found. Without a text there is a reason."""

    number: int  # in its file, from 0
    text: str | None
    metadata: dict[str, str]
    reason: str | None = None
    detail: str = ""


def kind_of(path: str) -> tuple[str, str] | None:
    """(kind, compression or "") by a file's name; None if it is not supported."""
    stem, last = os.path.splitext(path.lower())
    compression = last if last in COMPRESSIONS else ""
    kind = os.path.splitext(stem)[1] if compression else last
    return (kind, compression) if kind in KINDS else None


def read_file(path: str, source: SourceConfig) -> Iterator[Raw]:
    """The records of a file, in order. A damaged file gives what comes before the damage, then a reason."""
    kind = kind_of(path)
    assert kind is not None
    number = -1
    try:
        for raw in _read(path, kind, source):
            number = raw.number
            yield raw
    except (*DAMAGE, tarfile.TarError, UnicodeDecodeError) as error:
        yield Raw(number + 1, None, {}, "damaged_file", f"{path}: {error or type(error).__name__}")


def _read(path: str, kind: tuple[str, str], source: SourceConfig) -> Iterator[Raw]:
    name, compression = kind
    if name in TABLES:
        yield from _read_table(path, source)
        return
    with open_stream(path, compression) as stream:
        if name in WARC:
            yield from (Raw(*record) for record in read_warc(stream))
        elif name == ".tar":
            yield from _read_samples(stream, source)
        elif name in HTML:
            yield _from_bytes(0, stream.read(MAX_BYTES + 1), is_html=True)
        else:
            yield from _read_txt(stream, source)


def _read_table(path: str, source: SourceConfig) -> Iterator[Raw]:
    """Records of .jsonl and .parquet. Labels are read beside, for the report alone."""
    options = ReadOptions(source.text_field, source.id_field)
    label_options = ReadOptions(source.label_field or "", source.id_field)
    labels = read_records(path, label_options) if source.label_field else None
    number = -1
    for record in read_records(path, options):
        label = next(labels, None) if labels else None
        if isinstance(record, Problem):
            number += 1
            yield Raw(number, None, {}, "unreadable_record", record.message)
            continue
        number = record.number
        metadata = {} if record.own_id is None else {"own_id": record.own_id}
        if label is not None and not isinstance(label, Problem):
            metadata["label"] = label.text
        if source.html:
            yield _from_html(number, record.text, metadata)
        else:
            yield Raw(number, record.text, metadata)


def _read_txt(stream: BinaryIO, source: SourceConfig) -> Iterator[Raw]:
    raw = _from_bytes(0, stream.read(MAX_BYTES + 1))
    if source.txt_documents == "file" or raw.text is None:
        yield raw
        return
    lines: list[str] = []
    number = 0
    for line in [*raw.text.split("\n"), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield raw._replace(number=number, text="\n".join(lines))
            number, lines = number + 1, []


def _from_bytes(number: int, data: bytes, *, is_html: bool = False, key: str = "") -> Raw:
    if len(data) > MAX_BYTES:
        return Raw(number, None, {}, "too_long", f"over {MAX_BYTES >> 20} MiB")
    decoded = decode(data)
    metadata = {"own_id": key} if key else {}
    if decoded.text is None:
        return Raw(number, None, metadata, decoded.reason, f"{key} {decoded.detail}".strip())
    if decoded.encoding and decoded.encoding != "utf-8":
        metadata["encoding"] = decoded.encoding
    if is_html:
        return _from_html(number, decoded.text, metadata)
    return Raw(number, decoded.text, metadata)


def _from_html(number: int, page: str, metadata: dict[str, str]) -> Raw:
    text = main_text(page)
    if text is None:
        return Raw(number, None, metadata, "no_main_text", f"in {len(page)} characters of HTML")
    return Raw(number, text, metadata)


class BoundedInfo(tarfile.TarInfo):
    """A member's header; tarfile would read one of any length into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in LONG_HEADERS and info.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {info.size:,} bytes")
        return info


class EndingStream:
    """A stream that is not read on for ever at its end, as tarfile would for all that a header claims."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._empty_reads = stream, 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._empty_reads += not data
        if self._empty_reads > MAX_EMPTY_READS:
            raise EOFError("the archive ends within a member")
        return data


def _read_samples(stream: BinaryIO, source: SourceConfig) -> Iterator[Raw]:
    """Members with one stem are a sample; its first text member is the document. None is ever extracted."""
    number = -1
    previous = None
    ending: Any = EndingStream(stream)  # all that mode "r|" asks for is to read
    with tarfile.open(fileobj=ending, mode="r|", tarinfo=BoundedInfo) as archive:
        for member in archive:
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue] - it would keep all
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not member.isreg() or member.issparse() or base.startswith("__") or not extension:
                continue
            ending = extension.rpartition(".")[2].lower()
            if ending not in ("txt", "html", "htm", "json") or key == previous:
                continue
            number, previous = number + 1, key
            if member.size > MAX_BYTES:
                yield Raw(number, None, {"own_id": key}, "too_long", f"over {MAX_BYTES >> 20} MiB")
                continue
            file = archive.extractfile(member)
            assert file is not None
            yield _from_member(number, key, ending, file.read(), source)


def _from_member(number: int, key: str, ending: str, data: bytes, source: SourceConfig) -> Raw:
    if ending != "json":
        return _from_bytes(number, data, is_html=ending != "txt", key=key)
    try:
        value: Any = json.loads(data)
        text = value[source.text_field]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"{key}.json: no field {source.text_field!r} in it ({type(error).__name__})"
        return Raw(number, None, {"own_id": key}, "unreadable_record", detail)
    if not isinstance(text, str):
        return Raw(number, None, {"own_id": key}, "unreadable_record", f"{key}.json: no string")
    return Raw(number, text, {"own_id": key})
