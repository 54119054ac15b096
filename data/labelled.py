"""A folder of labelled sets in, tasks of classifying sentences or pairs out, or all that is wrong with them.

    glue/sst2/train.tsv  glue/sst2/dev.tsv        one sub-folder a task; or the folder is a task itself
    clue/ocnli/train.jsonl.xz  ...dev.jsonl.xz    also .json (lines, or one list), each .gz .xz .zst

What a file may look like: `data.label_tables`.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from data.hashing import hash_order, stable_hash64
from data.inputs import capped
from data.label_tables import KINDS, OutOfScope, kind_of, read_table

TRAIN = ("train",)
EVALUATION = {  # the first that is there is what a probe is measured on
    "dev": ("dev", "valid", "validation", "val", "dev_matched"),
    "test": ("test",),
}
OF_TOKENS = (".conll", ".bio", ".iob", ".iob2")
NO_AGREEMENT = "-"  # the label of pairs on which annotators did not agree (SNLI, OCNLI)


class Examples(NamedTuple):
    texts: list[tuple[str, ...]]  # one or two each
    labels: np.ndarray  # int64: number of the class; -1: a class that train does not have


@dataclass(frozen=True)
class LabelledTask:
    name: str
    classes: tuple[str, ...]  # of train, sorted
    train: Examples
    evaluation: Examples
    split: str  # of `EVALUATION`
    columns: tuple[str, ...]  # label, text or texts
    num_left_out: int  # rows without a label that annotators agreed on
    digest: str  # of all texts and labels that are used

    @property
    def is_unbalanced(self) -> bool:
        """Whether train's largest class has 1.5 times the rows of its smallest, or more."""
        counts = np.bincount(self.train.labels, minlength=len(self.classes))
        return bool(counts.max() >= 1.5 * counts.min())


def read_tasks(
    folder: Path, columns: Mapping[str, Sequence[str]], max_rows: int
) -> tuple[list[LabelledTask], dict[str, str]]:
    """(tasks in the order of their names, name -> why a sub-folder is none).

    columns: task -> label, text or texts, where they have other names; numbers, from 1, where a .tsv has no
    header. max_rows: of train, and of what is evaluated; of more, those with the smallest hashes are taken.
    ValueError with all problems: files that are missing, empty, damaged or ambiguous, columns that are not
    there, rows with too few fields, a single class, labels that train does not have, no task at all.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give one with a sub-folder for each task")
    folders = (
        [folder]
        if _files_of(folder, TRAIN)
        else [p for p in sorted(folder.iterdir()) if p.is_dir()]
    )
    tasks: list[LabelledTask] = []
    left_out: dict[str, str] = {}
    names = [place.resolve().name for place in folders]
    problems = [
        f"--columns names {name}, and there is no such task"
        for name in columns
        if name not in names
    ]
    for name, place in zip(names, folders, strict=True):
        try:
            tasks.append(_read_task(name, place, columns.get(name), max_rows))
        except OutOfScope as error:
            left_out[name] = str(error)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if not problems and not tasks:
        problems = [f"{name}: {reason}" for name, reason in left_out.items()] or ["it is empty"]
    if problems:
        raise ValueError(capped(f"{folder} cannot be probed with:", problems))
    return tasks, left_out


def _read_task(
    name: str, folder: Path, columns: Sequence[str] | None, max_rows: int
) -> LabelledTask:
    train_file = _one(_files_of(folder, TRAIN))
    if train_file is None:
        raise OutOfScope(_why_none(folder))
    found = {split: _one(_files_of(folder, stems)) for split, stems in EVALUATION.items()}
    split = next((split for split, path in found.items() if path), None)
    if split is None:
        raise ValueError(f"{folder} has no dev or test file beside {train_file.name}")
    files = [train_file, found[split]]
    tables = [read_table(path, columns) for path in files if path]
    problems = [problem for table in tables for problem in table.problems]
    if problems:
        raise ValueError(
            "; ".join(problems[:3]) + (f"; {len(problems) - 3} more" if len(problems) > 3 else "")
        )
    kept = [[row for row in table.rows if row[0] != NO_AGREEMENT] for table in tables]
    classes = _classes([row[0] for row in kept[0]], train_file)
    number = {label: at for at, label in enumerate(classes)}
    if not any(label in number for label, *_ in kept[1]):
        some = ", ".join(sorted({label for label, *_ in kept[1]})[:5]) or "none"
        raise ValueError(f"{files[1]}: none of its labels ({some}) is in {train_file.name}")
    train, evaluation = (
        _examples(_chosen(rows, stable_hash64("probe", name, part), max_rows), number)
        for part, rows in zip(("train", split), kept, strict=True)
    )
    left_out = sum(len(table.rows) for table in tables) - sum(map(len, kept))
    written = json.dumps(
        [classes, *((part.texts, part.labels.tolist()) for part in (train, evaluation))]
    )
    return LabelledTask(
        name, classes, train, evaluation, split, tables[0].columns, left_out,
        digest=xxhash.xxh3_64_hexdigest(written.encode("utf-8", "surrogatepass")),
    )  # fmt: skip


def _files_of(folder: Path, stems: Sequence[str]) -> list[Path]:
    found = ((path, kind_of(path)) for path in sorted(folder.iterdir()) if path.is_file())
    return [path for path, (stem, kind, _) in found if stem in stems and kind in KINDS]


def _one(files: list[Path]) -> Path | None:
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(f"{files[0].parent} has more than one file for the same: {names}")
    return files[0] if files else None


def _why_none(folder: Path) -> str:
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    some = ", ".join(files[:3]) or "nothing"
    if any(kind_of(Path(name))[1] in OF_TOKENS for name in files):
        return f"labels of tokens ({some}): only sentences and pairs with a class are probed"
    return f"no train file ({', '.join(KINDS)}) of sentences or pairs with a class; it holds {some}"


def _classes(labels: list[str], path: Path) -> tuple[str, ...]:
    """The classes of train. ValueError when there is one only; OutOfScope when these are no classes."""
    counts = Counter(labels)
    if len(counts) < 2:
        raise ValueError(f"{path}: every row has the same label, {', '.join(counts) or 'none'}")
    if any(_is_fraction(label) for label in counts):
        raise OutOfScope(f"{path.name}: labels are numbers with fractions, not classes")
    if len(counts) > 20 and len(labels) < 5 * len(counts):
        raise OutOfScope(f"{path.name}: {len(counts)} labels in {len(labels)} rows are no classes")
    return tuple(sorted(counts))


def _is_fraction(label: str) -> bool:
    try:
        return math.isfinite(value := float(label)) and not value.is_integer()
    except ValueError:
        return False


def _chosen(rows: list[tuple[str, ...]], key: int, max_rows: int) -> list[tuple[str, ...]]:
    """At most so many rows, in the order of the file."""
    return [rows[n] for n in np.sort(hash_order(key, len(rows))[:max_rows]).tolist()]


def _examples(rows: list[tuple[str, ...]], number: Mapping[str, int]) -> Examples:
    labels = np.array([number.get(label, -1) for label, *_ in rows], np.int64)
    return Examples([tuple(texts) for _, *texts in rows], labels)
