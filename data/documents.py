"""A file in, its documents out: .txt, .jsonl and .parquet, each also compressed.

Bad input never raises here: it comes as a Problem among the
records, so that one pass can tell all that is wrong with a corpus.
"""

import gzip
import io
import json
import lzma
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow
import pyarrow.parquet
import zstandard

from data.files import NO_SPACE
from data.inputs import suffixes_of

MAX_DOCUMENT_BYTES = 64 << 20
READ_BYTES = 1 << 20
ZSTD_BYTES = 1 << 9  # of a .zst file at a time
BOM = b"\xef\xbb\xbf"
ICONV = "convert it first: iconv -f ITS-ENCODING -t UTF-8"
DAMAGE = (
    EOFError,
    OSError,
    lzma.LZMAError,
    zlib.error,
    zstandard.ZstdError,
    pyarrow.ArrowException,
)


@dataclass(frozen=True)
class ReadOptions:
    """How records of a file become documents."""

    text_field: str = "text"  # key or column
    id_field: str = "id"  # key or column; may be absent
    txt_documents: Literal["file", "blank_line"] = "file"


class Record(NamedTuple):
    number: int  # of the document in its file, from 0: a line of jsonl, a row of parquet
    text: str
    own_id: str | None  # the id that the file gives it


class Problem(NamedTuple):
    """Why a file or a record cannot be used; names the file and, where there is one, the line."""

    message: str


class Part(NamedTuple):
    """Some records of a file: those whose number is `stripe` modulo `num_stripes`; or lines of a .jsonl."""

    stripe: int = 0
    num_stripes: int = 1
    lines: tuple[int, int, int] | None = (
        None  # number of the first, its byte offset, that of the end
    )


WHOLE = Part()


def read_records(path: str, options: ReadOptions, part: Part = WHOLE) -> Iterator[Record | Problem]:
    """The records of a part of a file, in order.

    A damaged file gives the records before the damage, then a Problem, and ends.
    """
    suffixes = suffixes_of(path)
    assert suffixes is not None
    kind, compression = suffixes
    try:
        with open_stream(path, compression) as stream:
            if kind == ".parquet":
                records = _read_parquet(path, stream, compression, options)
            elif kind == ".jsonl":
                records = _read_jsonl(path, stream, options, part)
            elif options.txt_documents == "file":
                records = _read_txt_file(path, stream)
            else:
                records = _read_txt_paragraphs(path, stream)
            for record in records:
                if isinstance(record, Problem) or record.number % part.num_stripes == part.stripe:
                    yield record
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise  # there was no room to unpack a compressed .parquet
        reason = str(error) or type(error).__name__
        yield Problem(f"{path} is cut off or damaged: {reason}. Fetch or make it again")


def open_stream(path: str, compression: str) -> BinaryIO:
    """The decompressed bytes of a file. Reading raises one of DAMAGE if it is cut off."""
    if compression == ".gz":
        return gzip.open(path, "rb")  # pyright: ignore[reportReturnType]
    if compression == ".xz":
        return lzma.open(path, "rb")  # pyright: ignore[reportReturnType]
    file = open(path, "rb", buffering=READ_BYTES)  # noqa: SIM115  closed by the caller
    return io.BufferedReader(_ZstdFile(file), READ_BYTES) if compression == ".zst" else file


class _ZstdFile(io.RawIOBase):
    """Frames of a .zst file, read one after the other; EOFError when the last is cut off.

    zstandard's own stream_reader takes a file that was cut off for a whole one. All that a piece of the file
    unpacks to comes at once, up to 32,768 times as much: so pieces are small.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._frame_begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                data = self._frame.unused_data or self._file.read(ZSTD_BYTES)
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                self._frame_begun = False
            else:
                data = self._file.read(ZSTD_BYTES)
            if not data:
                if self._frame_begun:
                    raise EOFError("the file ends in the middle of a zstandard frame")
                return 0
            self._frame_begun = True
            self._ready = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def find_line_parts(path: str, nbytes: int) -> list[Part]:
    """A plain .jsonl file in parts of `nbytes` or little more, cut between lines."""
    starts = [(0, 0)]  # (line, byte offset)
    number = offset = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(READ_BYTES):
            begin = 0  # of what is not counted yet
            while (cut := starts[-1][1] + nbytes) < offset + len(data):
                newline = data.find(b"\n", max(begin, cut - offset))
                if newline < 0:
                    break
                number += data.count(b"\n", begin, newline + 1)
                begin = newline + 1
                starts.append((number, offset + begin))
            number += data.count(b"\n", begin)
            offset += len(data)
    ends = [start for _, start in starts[1:]] + [offset]
    return [
        Part(lines=(line, start, end))
        for (line, start), end in zip(starts, ends, strict=True)
        if start < end
    ]


def _read_jsonl(
    path: str, stream: BinaryIO, options: ReadOptions, part: Part
) -> Iterator[Record | Problem]:
    """Lines end at \\n only: a text may hold other line-break characters. Blank lines are passed over."""
    stripe, num_stripes, lines = part
    number, num_left = -1, math.inf
    if lines is not None:
        number, num_left = lines[0] - 1, lines[2] - lines[1]
        stream.seek(lines[1])
    while num_left > 0 and (line := stream.readline(MAX_DOCUMENT_BYTES + 1)):
        number += 1
        num_left -= len(line)
        if len(line) > MAX_DOCUMENT_BYTES:
            yield Problem(f"{path}:{number + 1}: the line is {_too_long()}")
            return
        if number % num_stripes != stripe:
            continue
        if number == 0:
            line = line.removeprefix(BOM)
        if not line.isspace():
            yield _parse_line(f"{path}:{number + 1}", number, line, options)


def _parse_line(place: str, number: int, line: bytes, options: ReadOptions) -> Record | Problem:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Problem(_not_utf8(place, error, line))
    except (ValueError, RecursionError) as error:
        return Problem(f"{place}: not JSON: {error}")
    if not isinstance(value, dict):
        return Problem(f"{place}: a JSON {_kind_of(value)} where an object is wanted")
    if options.text_field not in value:
        names = ", ".join(sorted(value)[:10])
        return Problem(
            f"{place}: no field {options.text_field!r}; this object has: {names or 'none'}"
        )
    text = value[options.text_field]
    if not isinstance(text, str):
        return Problem(f"{place}: field {options.text_field!r} is a {_kind_of(text)}, not a string")
    record = Record(number, text, _own_id(value.get(options.id_field)))
    return _checked(place, record) if b"\\u" in line else record  # only escapes hold surrogates


def _checked(place: str, record: Record) -> Record | Problem:
    """The record, unless its strings cannot be written as UTF-8."""
    try:
        record.text.encode("utf-8")
        (record.own_id or "").encode("utf-8")
    except UnicodeEncodeError as error:
        return Problem(
            f"{place}: half of a surrogate pair ({error.object[error.start]!a}) at character "
            f"{error.start}: this is no Unicode text; repair what wrote it, or drop the document"
        )
    return record


def _own_id(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)


def _kind_of(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return names.get(type(value), "object")


def _too_long() -> str:
    return (
        f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB, the most that one document may have: "
        "split it (a .txt file by the option txt_documents=blank_line)"
    )


def _not_utf8(place: str, error: UnicodeDecodeError, data: bytes) -> str:
    """place: the file, or file and line; offsets count from there."""
    hint = ICONV
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        hint = "it looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
    byte = error.object[error.start]
    return f"{place}: not UTF-8: byte 0x{byte:02x} at byte offset {error.start}; {hint}"


def _read_txt_file(path: str, stream: BinaryIO) -> Iterator[Record | Problem]:
    """The whole file as one document."""
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        yield Problem(f"{path}: the file is {_too_long()}")
        return
    try:
        yield Record(0, data.removeprefix(BOM).decode("utf-8"), None)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield Problem(_not_utf8(f"{path}:{line}", error, data))


def _read_txt_paragraphs(path: str, stream: BinaryIO) -> Iterator[Record | Problem]:
    """Documents are parted by blank lines."""
    number = num_bytes = 0
    lines: list[str] = []
    for line_number, line in enumerate(stream, 1):
        data = line.removeprefix(BOM) if line_number == 1 else line
        num_bytes += len(data)
        if num_bytes > MAX_DOCUMENT_BYTES:
            yield Problem(f"{path}:{line_number}: the document is {_too_long()}")
            return
        if not data.isspace():
            try:
                lines.append(data.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Problem(_not_utf8(f"{path}:{line_number}", error, data))
        elif lines:
            yield Record(number, "".join(lines), None)
            number, num_bytes, lines = number + 1, 0, []
    if lines:
        yield Record(number, "".join(lines), None)


def _read_parquet(
    path: str, stream: BinaryIO, compression: str, options: ReadOptions
) -> Iterator[Record | Problem]:
    """Rows, in batches. Parquet is read from its end, so a compressed one is unpacked first."""
    with tempfile.TemporaryFile() as unpacked:
        if compression:
            shutil.copyfileobj(stream, unpacked, READ_BYTES)
            stream = unpacked
        file = pyarrow.parquet.ParquetFile(stream)
        schema = file.schema_arrow
        if options.text_field not in schema.names:
            columns = ", ".join(schema.names)
            yield Problem(f"{path}: no column {options.text_field!r}; its columns are: {columns}")
            return
        kind = schema.field(options.text_field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            yield Problem(f"{path}: column {options.text_field!r} holds {kind}, not strings")
            return
        columns = [options.text_field]
        if options.id_field in schema.names and options.id_field != options.text_field:
            columns.append(options.id_field)
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns, use_threads=False):
            for row in range(batch.num_rows):
                values = [batch.column(name)[row] for name in columns]
                yield _parquet_record(f"{path}: row {number}", number, values, options)
                number += 1


def _parquet_record(
    place: str, number: int, values: list[Any], options: ReadOptions
) -> Record | Problem:
    try:
        text, *own_id = [value.as_py() for value in values]
    except UnicodeDecodeError as error:
        return Problem(_not_utf8(place, error, b""))
    if text is None:
        return Problem(f"{place}: column {options.text_field!r} is null")
    return _checked(place, Record(number, text, _own_id(own_id[0] if own_id else None)))
