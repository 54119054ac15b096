"""Commands for people, called as the command line calls them; and real text to try them on."""

import argparse
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support import ROOT

CORPORA = Path(os.environ.get("CLOZE_CORPORA", ROOT.parent / "shared" / "corpora"))


def command(module: ModuleType, *arguments: object) -> int:
    """The exit status of a command's `run` with these arguments."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(list(map(str, arguments))))


def corpus_texts(name: str, num_documents: int) -> Iterator[str]:
    """The first documents of one of the development corpora; skips the test where it is not there."""
    path = CORPORA / f"{name}.jsonl.xz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: set CLOZE_CORPORA")
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        for _, line in zip(range(num_documents), lines, strict=False):
            yield json.loads(line)["text"]


def write_texts(path: Path, texts: Iterator[str] | list[str]) -> Path:
    lines = (json.dumps({"id": f"t{n}", "text": text}) + "\n" for n, text in enumerate(texts))
    path.write_text("".join(lines), encoding="utf-8")
    return path
