"""The demo's corpus, from a small tree of installed packages, and the page it prints at the end."""

import json
from pathlib import Path

import pytest

from launcher.demo_corpus import Corpus, collect, paragraphs, write_corpus
from launcher.demo_report import figures, render_curve

FIRST = '''"""Reads the entries of an archive, one after the other, without unpacking it.

Closing a reader that was closed before does nothing, and is no error.
"""
raise RuntimeError("this module must never be imported")


class Reader:
    """Gives the entries in the order in which
    they were written. See :class:`~archive.Writer`
    and ``archive.Entry`` for more.

    >>> Reader("a.zip").entries()
    [Entry("b.txt")]

    Example::

        reader = Reader("a.zip")

    Entries that are encrypted are left out."""

    def close(self):
        """Releases the file, and everything that was read from it."""
'''
METADATA = """Metadata-Version: 2.1
Name: archive
Summary: not prose

# Archive

[Archive](https://example.org) reads and writes archives of many kinds, some of them long forgotten.

```python
reader = Reader("a.zip").with_many_words_that_look_like_prose("but are none at all.")
```

It was written for people who keep old disks in a drawer, and want to know what is on them before
they throw them away. Nothing is ever written to an archive that is open for reading.
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A site-packages with one good module, its copy, a broken one, tests and a description."""
    folder = tmp_path / "site-packages"
    files = {
        "archive/reader.py": FIRST,
        "archive/copy_of_reader.py": FIRST,
        "archive/broken.py": '"""Docs of a module that Python cannot parse."""\ndef f(:\n',
        "archive/binary.py": "x = 1\0",
        "archive/short.py": '"""Says too little."""\n',
        "archive/tests/test_reader.py": FIRST.replace("archive", "tested archive"),
        "archive-1.0.dist-info/METADATA": METADATA,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def corpus(packages: Path) -> Corpus:
    return collect([packages])


def test_docstrings_and_descriptions_become_documents(corpus: Corpus) -> None:
    texts = {document.id: document.text.split("\n") for document in corpus.documents}
    readers = [texts[name] for name in texts if name.endswith("reader.py")]
    assert readers == [
        [
            "Reads the entries of an archive, one after the other, without unpacking it.",
            "Closing a reader that was closed before does nothing, and is no error.",
            "Gives the entries in the order in which they were written. See archive.Writer and "
            "archive.Entry for more.",
            "Entries that are encrypted are left out.",
            "Releases the file, and everything that was read from it.",
        ]
    ]
    described = texts["archive-1.0.dist-info/METADATA"]
    assert len(described) == 2 and described[0].startswith("Archive reads and writes")


def test_duplicates_and_unreadable_files_are_left_out(corpus: Corpus) -> None:
    assert len(corpus.documents) == 2  # one of two equal modules, and the description
    assert corpus.num_files == 6  # nothing under tests/
    assert corpus.num_unreadable == 2


def test_the_same_packages_give_the_same_corpus(packages: Path, tmp_path: Path) -> None:
    written = []
    for name in ("first.jsonl", "second.jsonl"):
        write_corpus(collect([packages]).documents, tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    lines = [json.loads(line) for line in written[0].splitlines()]
    assert [sorted(line) for line in lines] == [["id", "text"]] * 2
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == [
        "first.jsonl",
        "second.jsonl",
    ]


def test_a_cap_keeps_the_first_documents(packages: Path) -> None:
    whole, capped = collect([packages]), collect([packages], max_bytes=1)
    assert capped.documents == whole.documents[:1]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("The sum\nof all *values* in the ``table``.", ["The sum of all values in the table."]),
        (":param path: The file that is to be read.", ["The file that is to be read."]),
        (".. note::\n    This is slower than one might expect.", ["This is slower than one might expect."]),
        ("\n.. code-block:: python\n\n    print('here are some words of code.')\n", []),
        ("\nArguments\n---------\nx : int\n    Number of rows.\n", ["x : int Number of rows."]),
        ("| a | b |\n+---+---+\n", []),
        ("Half a surrogate is in this line: \ud800.", []),
    ],
)  # fmt: skip
def test_markup_and_code_are_stripped(docstring: str, expected: list[str]) -> None:
    assert list(paragraphs(docstring)) == expected


def test_the_curve_has_every_point_in_its_place() -> None:
    drawn = render_curve(
        {".": [(1, 9.0), (50, 7.0), (100, 5.0)], "o": [(100, 5.0)]}, (6.0, "entropy"),
        width=21, height=5,
    )  # fmt: skip
    rows = drawn.split("\n")
    assert [row[:7].strip() for row in rows] == [
        "9.000",
        "8.000",
        "7.000",
        "6.000",
        "5.000",
        "step",
    ]
    assert rows[0][9:].index(".") == 0 and rows[2][9:].index(".") == 10
    assert rows[3] == "  6.000 |" + "-" * 21 + "  entropy"
    assert rows[4][9:].index("o") == 20  # the held-out point hides the training point
    assert rows[5].endswith("100")


def test_a_curve_of_one_point_at_the_level_is_drawn() -> None:
    assert "o" in render_curve({"o": [(0, 6.0)]}, (6.0, "entropy"))


def test_figures_compare_with_guessing() -> None:
    train = [
        {"step": 10, "step_seconds": 0.5, "tokens_per_second": 100.0, "num_tokens": 500},
        {"step": 20, "step_seconds": 0.1, "tokens_per_second": 300.0, "num_tokens": 1000},
    ]
    heldout = {
        "step": 20, "mlm_loss": 4.25, "mlm_accuracy": 0.31, "nsp_loss": 0.6, "nsp_accuracy": 0.7,
    }  # fmt: skip
    levels = {"unigram_entropy_nats": 6.5, "context_free_loss_nats": 5.75}
    text = figures(train, heldout, levels)
    assert "4.250" in text and "6.500 by token frequency" in text
    assert "5.750 the best without context" in text
    assert "70.0%" in text and "0.693 by a coin" in text
    assert "1,000 tokens in 6 s" in text and "200 tokens/s" in text
