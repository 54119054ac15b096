"""A file of labelled texts in, rows of label and texts out: .tsv and .jsonl, each also compressed.

.tsv: a header, fields parted by tabs, no quoting. Columns are recognised by `LABELS`, `PAIRS` and `TEXTS`, in
small letters, where they are not named.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.documents import BOM, DAMAGE, open_stream
from data.inputs import COMPRESSIONS

KINDS = (".tsv", ".jsonl", ".json")  # .json: lines, or one list
LABELS = ("label", "labels", "class", "category", "intent", "relation", "gold_label", "quality")
PAIRS = (
    ("sentence1", "sentence2"), ("text_a", "text_b"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("#1 string", "#2 string"), ("text1", "text2"),
)  # fmt: skip
TEXTS = ("sentence", "text", "text_a", "title", "review", "content", "query", "question")
WITHIN_TEXT = ("spans", "entities", "slots", "tags", "ner_tags", "answers", "paragraphs", "data")
NAMES = {*LABELS, *TEXTS, *(name for pair in PAIRS for name in pair)}
MAX_BYTES = 1 << 30  # of a file, unpacked


class OutOfScope(ValueError):
    """Sound, but no classes of sentences or pairs."""


class Table(NamedTuple):
    rows: list[tuple[str, ...]]  # label, text or texts
    columns: tuple[str, ...]
    problems: list[str]


def kind_of(path: Path) -> tuple[str, str, str]:
    """(stem, kind, compression) of a file's name, in small letters."""
    name = Path(path.name.lower())
    compression = name.suffix if name.suffix in COMPRESSIONS else ""
    plain = Path(name.stem) if compression else name
    return plain.stem, plain.suffix, compression


def read_table(path: Path, columns: Sequence[str] | None) -> Table:
    """Rows of the columns that are named, or recognised.

    columns: label, text or texts. ValueError: an empty or damaged file, a column that is not there.
    OutOfScope: labels that are no classes of whole texts.
    """
    _, kind, compression = kind_of(path)
    try:
        with open_stream(str(path), compression) as stream:
            raw = stream.read(MAX_BYTES + 1).removeprefix(BOM)
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}") from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path} holds over {MAX_BYTES:,} bytes: give a smaller set")
    if not text.strip():
        raise ValueError(f"{path} is empty")
    if kind == ".tsv":
        return _table_of_fields(path, text, columns)
    return _table_of_objects(path, _objects(path, text), columns)


def _table_of_fields(path: Path, text: str, columns: Sequence[str] | None) -> Table:
    lines = [(n, line.rstrip("\r")) for n, line in enumerate(text.split("\n"), 1)]
    fields = [(n, line.split("\t")) for n, line in lines if line.strip()]
    header = fields[0][1]
    if columns and all(name.isdecimal() for name in columns) and not set(columns) <= set(header):
        chosen, at = tuple(columns), [int(name) - 1 for name in columns]
        if wrong := [name for name in columns if not 1 <= int(name) <= len(header)]:
            raise ValueError(f"{path} has {len(header)} columns, and no {', '.join(wrong)}")
        if all(header[n].strip().lower() in NAMES for n in at):
            raise ValueError(
                f"{path} has a header, so its columns have names: --columns "
                f"{path.resolve().parent.name}={','.join(header[n] for n in at)}, not numbers, which are for "
                "files without one"
            )
    else:
        chosen = _choose(path, header, columns)
        at, fields = [header.index(name) for name in chosen], fields[1:]
    rows, problems = [], []
    for number, values in fields:
        if len(values) != len(header):
            problems.append(
                f"{path}:{number} has {len(values)} fields, the first line {len(header)}"
            )
        else:
            rows.append(tuple(values[n] for n in at))
    if not rows and not problems:
        problems.append(f"{path} has a header and no rows")
    return Table(rows, chosen, problems)


def _objects(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each line; or (number, value) of the one list that the file is."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, list):
        yield from enumerate(whole, 1)
        return
    if isinstance(whole, dict) and set(whole) & set(WITHIN_TEXT):
        raise OutOfScope(f"{path.name} has questions or labels within texts: no class of each text")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from None


def _table_of_objects(
    path: Path, objects: Iterator[tuple[int, Any]], columns: Sequence[str] | None
) -> Table:
    rows: list[tuple[str, ...]] = []
    problems: list[str] = []
    chosen: tuple[str, ...] = ()
    for number, value in objects:
        if not isinstance(value, dict):
            raise ValueError(f"{path}:{number}: no JSON object")
        chosen = chosen or _choose(path, list(value), columns)
        label, *texts = (value.get(name) for name in chosen)
        if isinstance(label, list | dict):
            raise OutOfScope(f"{path.name}: {chosen[0]} is a {type(label).__name__}, not one class")
        if label is None or not all(isinstance(text, str) for text in texts):
            problems.append(f"{path}:{number} has no {' or no '.join(chosen)}, or not as text")
        else:
            rows.append((str(label), *map(str, texts)))
    return Table(rows, chosen, problems)


def _choose(path: Path, header: list[str], columns: Sequence[str] | None) -> tuple[str, ...]:
    """Label and text or texts among the names of a header. ValueError or OutOfScope where they are not."""
    shown = ", ".join(header[:10])[:200]
    if columns:
        if absent := [name for name in columns if name not in header]:
            raise ValueError(f"{path} has no column {', '.join(absent)}; it has {shown}")
        return tuple(columns)
    known = {name.strip().lower(): name for name in reversed(header)}
    label = next((known[name] for name in LABELS if name in known), None)
    pair = next((pair for pair in PAIRS if set(pair) <= set(known)), None)
    texts = pair or next(((name,) for name in TEXTS if name in known), None)
    if label is None and set(WITHIN_TEXT) & set(known):
        raise OutOfScope(f"{path.name} has labels within texts ({shown}): no class of each text")
    missing = [what for what, found in (("label", label), ("text", texts)) if not found]
    if label is None or texts is None:
        raise ValueError(
            f"{path} has no {' and no '.join(missing)} column that is known by its name; it has {shown}. Name "
            f"them: --columns {path.resolve().parent.name}=LABEL,TEXT or LABEL,TEXT,TEXT"
        )
    return (label, *(known[name] for name in texts))
