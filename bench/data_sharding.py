"""Text and its dataset in, megabytes of text a second out, from text to ids on disk.

Wall-clock seconds over all processes: `cloze prepare` with a given tokenizer (scan, encode, shuffle,
shards, digests), beside `datasets.map` with the same tokenizer as a fast Hugging Face one (ids only, in
the order of the file, in Arrow files; reading the JSON beforehand is not counted).
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoTokenizer

from data.prepare import PrepareConfig, prepare


def sharding_table(text: Path, dataset: Path) -> Iterator[str]:
    """MB/s with one process and with one for each core."""
    tokenizer_folder = dataset / "tokenizer"
    megabytes = text.stat().st_size / 1e6
    yield f"{megabytes:.0f} MB of jsonl.\n"
    yield "| processes | cloze prepare, MB/s | datasets.map, MB/s | ratio |\n|---|---|---|---|"
    for processes in sorted({1, os.cpu_count() or 1}):
        ours = megabytes / seconds_of_prepare(text, tokenizer_folder, processes)
        theirs = megabytes / seconds_of_map(text, tokenizer_folder, processes)
        yield f"| {processes} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.1f} x |"


def seconds_of_prepare(text: Path, tokenizer: Path, processes: int) -> float:
    output = text.parent / "again"
    shutil.rmtree(output, ignore_errors=True)
    config = PrepareConfig(
        output=str(output),
        sources={"text": (str(text),)},
        tokenizer=str(tokenizer),
        num_processes=processes,
    )
    start = time.perf_counter()
    prepare(config)
    return time.perf_counter() - start


def seconds_of_map(text: Path, tokenizer_folder: Path, processes: int) -> float:
    cache = text.parent / "hf-cache"
    shutil.rmtree(cache, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    table: Any = load_dataset("json", data_files=str(text), split="train", cache_dir=str(cache))

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer(batch["text"])["input_ids"]}

    start = time.perf_counter()
    table.map(encode, batched=True, remove_columns=["text"], num_proc=processes)
    return time.perf_counter() - start
