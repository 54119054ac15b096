"""Readers: every format and compression gives the same documents; every fault is named with its place."""

import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.documents import Part, Problem, ReadOptions, Record, find_line_parts, read_records
from data.inputs import find_files

TEXTS = ["Plain.", "两行\n中文。", "Odd\u2028break \u0085 here", "", "  \n", "Ünïcödé 🎉"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def jsonl(texts: list[str]) -> bytes:
    lines = (
        json.dumps({"text": t, "id": f"n{i}"}, ensure_ascii=False) for i, t in enumerate(texts)
    )
    return "\n".join(lines).encode() + b"\n"


def parquet(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    ids = [f"n{i}" for i in range(len(texts))]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": ids, "other": ids}), sink)
    return sink.getvalue().to_pybytes()


def records(path: Path, **options) -> list[Record | Problem]:
    return list(read_records(str(path), ReadOptions(**options)))


def only_problem(path: Path, **options) -> str:
    found = [r for r in records(path, **options) if isinstance(r, Problem)]
    assert len(found) == 1, found
    return found[0].message


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(("kind", "encode"), [(".jsonl", jsonl), (".parquet", parquet)])
def test_formats_agree(tmp_path, kind, encode, compression):
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(COMPRESS[compression](encode(TEXTS)))
    assert records(path) == [Record(i, t, f"n{i}") for i, t in enumerate(TEXTS)]
    stripes = [list(read_records(str(path), ReadOptions(), Part(i, 4))) for i in range(4)]
    assert sorted(r for stripe in stripes for r in stripe) == records(path)


@pytest.mark.parametrize("nbytes", [1, 40, 100, 1000])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_parts_of_lines_are_the_file(tmp_path, monkeypatch, nbytes, end):
    """Cut anywhere, read in pieces of any size: every record once, with its number; BOM and blank lines too."""
    monkeypatch.setattr("data.documents.READ_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + jsonl(TEXTS).strip() + b"\n \n" + jsonl(TEXTS).strip() + end.encode()
    )
    parts = find_line_parts(str(path), nbytes)
    assert (len(parts) == 1) == (nbytes == 1000)
    read = [record for part in parts for record in read_records(str(path), ReadOptions(), part)]
    assert read == records(path) and len(read) == 2 * len(TEXTS)


@pytest.mark.parametrize("compression", COMPRESS)
def test_txt(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression]("\ufeff甲\n乙\n\n \n丙\n".encode()))
    assert records(path) == [Record(0, "甲\n乙\n\n \n丙\n", None)]
    paragraphs = [Record(0, "甲\n乙\n", None), Record(1, "丙\n", None)]
    assert records(path, txt_documents="blank_line") == paragraphs


def test_several_frames_and_members(tmp_path):
    """Compressed files may be joined end to end."""
    for suffix in (".gz", ".xz", ".zst"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(COMPRESS[suffix](jsonl([t])) for t in TEXTS))
        assert [r.text for r in records(path) if isinstance(r, Record)] == TEXTS


def test_own_ids_and_other_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "x", "key": 5}\n\n{"body": "y"}\n')
    found = records(path, text_field="body", id_field="key")
    assert found == [Record(0, "x", "5"), Record(2, "y", None)]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".parquet"])
def test_truncation_is_noticed(tmp_path, kind, compression):
    whole = {".jsonl": jsonl(TEXTS * 500), ".txt": os.urandom(3000).hex().encode()}
    data = COMPRESS[compression](whole.get(kind) or parquet(TEXTS * 500))
    path = tmp_path / f"a{kind}{compression}"
    for size in (len(data) - 1, len(data) // 2, 10):
        path.write_bytes(data[:size])
        assert f"{path} is cut off or damaged" in only_problem(path)


def test_plain_parquet_cut_off(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(TEXTS)[:-20])
    assert f"{path} is cut off or damaged" in only_problem(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', ":2: not JSON"),
        (b'["text"]', ":2: a JSON list where an object is wanted"),
        (b'{"body": "a", "n": 1}', ":2: no field 'text'; this object has: body, n"),
        (b'{"text": 5}', ":2: field 'text' is a number, not a string"),
        (b'{"text": null}', ":2: field 'text' is a null, not a string"),
        (
            b'{"text": "caf\xe9"}',
            ":2: not UTF-8: byte 0xe9 at byte offset 13; convert it first: iconv",
        ),
        (b'{"text": "ab\\ud800"}', ":2: half of a surrogate pair ('\\ud800') at character 2"),
        (b'{"text": "a", "id": "\\udfff"}', ":2: half of a surrogate pair"),
        (b'{"text": "\xed\xa0\x80"}', ":2: not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "also good"}\n')
    assert f"{path}{message}" in only_problem(path)
    assert sum(isinstance(r, Record) for r in records(path)) == 2


def test_txt_of_another_encoding(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" + "中文".encode("gb18030"))
    assert f"{path}:2: not UTF-8: byte 0xd6 at byte offset 5" in only_problem(path)
    assert f"{path}:2: not UTF-8" in only_problem(path, txt_documents="blank_line")
    path.write_bytes("中文".encode("utf-16"))
    assert "it looks like UTF-16; convert it: iconv -f UTF-16" in only_problem(path)


def test_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(TEXTS))
    assert "no column 'body'; its columns are: text, id, other" in only_problem(
        path, text_field="body"
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    assert "column 'text' holds int64, not strings" in only_problem(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    assert "row 1: column 'text' is null" in only_problem(path)


def test_documents_too_long_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("data.documents.MAX_DOCUMENT_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["a", "b" * 2000]))
    assert f"{path}:2: the line is longer than" in only_problem(path)
    path = tmp_path / "a.txt"
    path.write_text("word\n" * 150 + "\n" + "word\n" * 150)
    assert "txt_documents=blank_line" in only_problem(path)
    assert len(records(path, txt_documents="blank_line")) == 2


def test_finding_files(tmp_path):
    for name in ("b.txt", "sub/a.jsonl.gz", "sub/c.parquet", "sub/notes.md", ".hidden/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, notes = find_files({"s": (str(tmp_path),), "a": (f"{tmp_path}/sub/*.gz",)})
    assert [(f.source, f.relative) for f in files] == [
        ("a", "a.jsonl.gz"),
        ("s", "b.txt"),
        ("s", "sub/a.jsonl.gz"),
        ("s", "sub/c.parquet"),
    ]
    assert len(notes) == 1 and "notes.md" in notes[0]
    twice, _ = find_files({"s": (f"{tmp_path}/*.txt", f"{tmp_path}/b.txt", str(tmp_path / "sub"))})
    assert len(twice) == 3


def test_all_missing_files_are_told_at_once(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "page.html").write_text("x")
    (tmp_path / "folder").mkdir()
    names = ("empty.txt", "page.html", "folder", "none.txt", "*.jsonl")
    with pytest.raises(ValueError) as error:
        find_files({"s": tuple(f"{tmp_path}/{name}" for name in names)})
    for part in (
        "empty.txt is empty",
        "page.html has an unknown suffix; supported are .txt .jsonl .parquet, each also .gz .xz .zst",
        "folder without any file of a supported kind",
        "none.txt does not exist",
        "no file matches",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="and 5 more"):
        find_files({"s": ("/none",) * 25})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: Permission denied"):
        find_files({"s": (str(path),)})
