"""A small corpus in every format, and what tests of prepare share."""

import gzip
import hashlib
import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support import ROOT, document, write_corpus

from data.hashing import stable_hash64
from data.prepare import PrepareConfig, prepare
from data.shards import SPLITS, Dataset

SCRIPT = """
import json, sys
from data.prepare import PrepareConfig, prepare
if __name__ == "__main__":
    try:
        prepare(PrepareConfig(**json.loads(sys.argv[1])))
    except ValueError as error:
        print(error)
        sys.exit(3)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Every format; some empty documents; one exact copy; two documents longer than a block."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "a.jsonl", 250)
    lines = (folder / "a.jsonl").read_text().splitlines(keepends=True)
    with lzma.open(folder / "b.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("".join(lines[:3]) + '{"text": "  "}\n{"text": ""}\n')
        file.writelines(json.dumps({"text": document(n)}) + "\n" for n in range(1000, 1100))
    texts = [document(n) for n in range(2000, 2050)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "id": range(50)}), folder / "c.parquet"
    )
    (folder / "txt").mkdir()
    for n in range(3):
        long = "\n".join(document(m) for m in range(3000 + 40 * n, 3040 + 40 * n))
        (folder / "txt" / f"{n}.txt.gz").write_bytes(gzip.compress(long.encode()))
    return folder


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory) -> PrepareConfig:
    return PrepareConfig(
        output=str(tmp_path_factory.mktemp("out") / "dataset"),
        sources={
            "mixed": (f"{corpus}/*.jsonl*", f"{corpus}/c.parquet"),
            "long": (f"{corpus}/txt",),
        },
        vocab_size=350,
        heldout_fraction=0.1,
        block_tokens=4096,
        shard_text_bytes=60_000,
        num_processes=1,
    )


@pytest.fixture(scope="module")
def dataset(config) -> Dataset:
    return Dataset.open(prepare(config))


def fingerprint(root: str | Path) -> dict[str, str]:
    """File -> hash of its bytes."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file()
    }


def run(config: PrepareConfig, **options) -> subprocess.Popen:
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(settings)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def document_tokens(dataset: Dataset) -> dict[int, tuple[set[str], list[int]]]:
    """document id -> (splits it lies in, its tokens)."""
    found: dict[int, tuple[set[str], list[int]]] = {}
    for split in SPLITS:
        for index in dataset.block_indices(split).tolist():
            block = dataset.read_block(index)
            ends = np.cumsum(block.document_lengths, dtype=np.int64).tolist()
            for key, start, end in zip(block.document_ids.tolist(), [0, *ends], ends, strict=False):
                splits, tokens = found.setdefault(key, (set(), []))
                splits.add(split)
                tokens += block.tokens[start:end].tolist()
    return found


def source_documents(corpus: Path) -> dict[int, str]:
    """document id -> text, read here by other means than the readers."""
    texts = {}
    for name, opened in (("a.jsonl", open), ("b.jsonl.xz", lzma.open)):
        with opened(corpus / name, "rt", encoding="utf-8") as lines:
            for n, line in enumerate(lines):
                texts[stable_hash64("mixed", f"{name}#{n}")] = json.loads(line)["text"]
    for n in range(50):
        texts[stable_hash64("mixed", f"c.parquet#{n}")] = document(2000 + n)
    for n in range(3):
        raw = (corpus / "txt" / f"{n}.txt.gz").read_bytes()
        texts[stable_hash64("long", f"{n}.txt.gz#0")] = gzip.decompress(raw).decode()
    return {key: text for key, text in texts.items() if text.strip()}
