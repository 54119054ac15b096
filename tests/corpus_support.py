"""Labelled, messy text for tests of the corpus pipeline. It is not part of the project."""

import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

CORPORA = Path(os.environ.get("CLOZE_CORPORA", ROOT.parent / "shared" / "corpora"))


def corpora(*names: str) -> list[Path]:
    """Paths of files of the corpora; skips the test when they are not there."""
    paths = [CORPORA / name for name in names]
    for path in paths:
        if not path.exists():
            pytest.skip(f"{path} is not there: set CLOZE_CORPORA to the folder of test corpora")
    return paths


def rows(name: str) -> list[dict[str, Any]]:
    """The records of a .jsonl.xz file of the corpora."""
    (path,) = corpora(name)
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]
