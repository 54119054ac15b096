"""Labelled sets of every layout are read; what cannot be is told together, what is none is left out."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus_support import corpora

from data.labelled import read_tasks

TSV = "sentence\tlabel\ngood one\t1\nbad one\t0\n"


def write(folder: Path, name: str, text: str) -> None:
    """A file of a task; its suffix says how it is packed."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    openers: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
    with openers.get(path.suffix, open)(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_every_layout_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [("1", "好 \u2028 one"), ("0", 'a "bad" one'), ("1", "fine")]
    objects = [{"label": int(label), "text": text, "x": 1} for label, text in rows]
    tsv = "".join(f"{text}\t{label}\n" for label, text in rows)
    layouts = {
        "plain": ("train.tsv", "sentence\tlabel\n" + tsv),
        "windows": ("train.tsv", "\ufeffSentence\tLabel\r\n" + tsv.replace("\n", "\r\n")),
        "packed": ("train.tsv.xz", "sentence\tlabel\n" + tsv),
        "objects": ("train.jsonl.gz", lines(*objects)),
        "lines": ("train.json", lines(*objects)),
        "list": ("train.json", json.dumps(objects, indent=1)),
        "bare": ("train.tsv", tsv),
        "named": ("train.jsonl", lines(*({"y": o["label"], "words": o["text"]} for o in objects))),
    }
    for task, (name, text) in layouts.items():
        write(tmp_path / task, name, text)
        write(tmp_path / task, name.replace("train", "validation"), text)
    columns = {"bare": ["2", "1"], "named": ["y", "words"]}
    tasks, left_out = read_tasks(tmp_path, columns, 100)
    assert left_out == {}
    assert [task.name for task in tasks] == sorted(layouts)
    for task in tasks:
        assert task.classes == ("0", "1") and task.split == "dev"
        for part in (task.train, task.evaluation):
            assert part.texts == [(text,) for _, text in rows]
            assert part.labels.tolist() == [1, 0, 1]
    assert len({task.digest for task in tasks}) == 1


def test_pairs_splits_and_labels(tmp_path: Path) -> None:
    """A pair by its columns; test where there is no dev; no agreement; a class that train lacks."""
    header = "Quality\t#1 ID\t#1 String\t#2 String\n"
    write(
        tmp_path / "mrpc", "train.tsv", header + "1\t7\ta\tb\n0\t8\tc\td\n-\t9\te\tf\n0\t9\tg\th\n"
    )
    write(tmp_path / "mrpc", "test.tsv", header + "1\t7\tx\ty\n2\t8\tz\tz\n")
    (task,), _ = read_tasks(tmp_path, {}, 100)
    assert task.columns == ("Quality", "#1 String", "#2 String") and task.split == "test"
    assert task.train.texts == [("a", "b"), ("c", "d"), ("g", "h")] and task.num_left_out == 1
    assert task.evaluation.labels.tolist() == [1, -1]
    assert task.is_unbalanced
    (alone,), _ = read_tasks(tmp_path / "mrpc", {}, 100)
    assert alone.digest == task.digest
    (fewer,), _ = read_tasks(tmp_path, {}, 2)
    assert len(fewer.train.texts) == len(fewer.evaluation.texts) == 2
    assert set(fewer.train.texts) < set(task.train.texts) and fewer.digest != task.digest


def test_all_problems_are_told_together(tmp_path: Path) -> None:
    broken = {
        "absent": ("a\tb\nx\t1\n", "has no label and no text column that is known by its name; it has a, b"),
        "bytes": (TSV, "not UTF-8 at byte 0"),
        "cut": (TSV, "cannot be read"),
        "empty": ("", "train.tsv is empty"),
        "fields": ("sentence\tlabel\nx\t1\ty\n", "train.tsv:2 has 3 fields, the first line 2"),
        "hidden": (TSV, "none of its labels (-1) is in train.tsv"),
        "numbered": (TSV, "numbered=label,sentence, not numbers"),
        "lonely": (TSV, "has no dev or test file beside train.tsv"),
        "rowless": ("sentence\tlabel\n", "has a header and no rows"),
        "same": ("sentence\tlabel\nx\t1\ny\t1\n", "every row has the same label, 1"),
        "twice": (TSV, "more than one file for the same: train.jsonl, train.tsv"),
        "wrong": (TSV, "has no column class; it has sentence, label"),
    }  # fmt: skip
    for task, (text, _) in broken.items():
        write(tmp_path / task, "train.tsv", text)
        if task != "lonely":
            write(tmp_path / task, "dev.tsv", TSV)
    write(tmp_path / "hidden", "dev.tsv", "sentence\tlabel\nx\t-1\n")
    write(tmp_path / "twice", "train.jsonl", "{}")
    (tmp_path / "bytes" / "train.tsv").write_bytes(b"\xff\xfe")
    (tmp_path / "cut" / "train.tsv").unlink()
    (tmp_path / "cut" / "train.tsv.gz").write_bytes(gzip.compress(TSV.encode())[:-9])
    columns = {"wrong": ["class", "sentence"], "nothing": ["a", "b"], "numbered": ["2", "1"]}
    with pytest.raises(ValueError) as error:
        read_tasks(tmp_path, columns, 100)
    message = str(error.value)
    assert "--columns names nothing, and there is no such task" in message
    told = {line.strip().split(":")[0]: line for line in message.splitlines()}
    for task, (_, expected) in broken.items():
        assert expected in told[task], task


def test_what_is_no_task_is_left_out(tmp_path: Path) -> None:
    others = {
        "ner": ("train.conll", "He\tO\n", "labels of tokens"),
        "spans": ("train.jsonl", lines({"text": "x", "spans": [[0, 1, "A"]]}), "labels within texts"),
        "tagged": ("train.jsonl", lines({"text": "x", "label": ["O"]}), "label is a list, not one class"),
        "squad": ("train.json", json.dumps({"data": [{"paragraphs": []}]}), "questions or labels within"),
        "scores": ("train.tsv", "text\tlabel\nx\t1.5\ny\t2\n", "numbers with fractions"),
        "ids": ("train.tsv", "text\tlabel\n" + "".join(f"x\t{n}\n" for n in range(50)), "50 labels in 50 rows"),
        "readme": ("README.md", "x", "no train file"),
    }  # fmt: skip
    for task, (name, text, _) in others.items():
        write(tmp_path / task, name, text)
        write(tmp_path / task, name.replace("train", "dev"), text)
    with pytest.raises(ValueError, match="cannot be probed with"):
        read_tasks(tmp_path, {}, 100)
    write(tmp_path / "good", "train.tsv", TSV)
    write(tmp_path / "good", "dev.tsv", TSV)
    tasks, left_out = read_tasks(tmp_path, {}, 100)
    assert [task.name for task in tasks] == ["good"]
    assert set(left_out) == set(others)
    for task, (_, _, reason) in others.items():
        assert reason in left_out[task], task


def test_published_sets_are_recognised() -> None:
    found = {}
    for language in ("en", "zh"):
        (folder,) = corpora(f"downstream/{language}")
        tasks, left_out = read_tasks(folder, {}, 500)
        found |= {task.name: (len(task.classes), len(task.train.texts[0])) for task in tasks}
        assert {"xquad"} < set(left_out)
    assert found == {
        "cola": (2, 1), "mrpc": (2, 2), "semeval2010_task8": (19, 1), "snips": (7, 1), "sst2": (2, 1),
        "chnsenticorp": (2, 1), "ocnli": (3, 2), "thucnews_titles": (10, 1),
    }  # fmt: skip
