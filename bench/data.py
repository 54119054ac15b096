"""Raw text in, what the data side does a second out, beside the usual ways on the same text.

    python -m bench.data TEXT.jsonl [...] [--only stream sharding resume cleaning]

Everything is measured in this one run, on this machine; read the ratios, not the figures. Times of one
process are its CPU seconds, which neighbours on the machine disturb least.
"""

import argparse
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import torch

from bench.data_cleaning import cleaning_table
from bench.data_resume import resume_tables
from bench.data_sharding import sharding_table
from bench.data_stream import stream_table
from bench.text import plain_jsonl
from data.prepare import PrepareConfig, prepare

SECTIONS = {
    "stream": stream_table,
    "sharding": sharding_table,
    "resume": resume_tables,
    "cleaning": cleaning_table,
}
PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "datasets", "webdataset", "torchdata")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("text", nargs="+", help=".txt, .jsonl or .parquet files, also compressed")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument(
        "--max-megabytes", type=int, default=60, help="of text, read from the start"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; "
          f"Python {platform.python_version()}, {packages}\n")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="cloze-bench-") as folder:
        text = plain_jsonl(
            options.text, Path(folder, "text.jsonl"), options.max_megabytes * 1_000_000
        )
        dataset = Path(folder, "dataset")
        prepare(
            PrepareConfig(
                output=str(dataset),
                sources={"text": (str(text),)},
                vocab_size=16384,
                tokenizer_sample_bytes=8_000_000,
                num_processes=os.cpu_count() or 1,
            )
        )
        for name in options.only:
            print(f"\n## {name}\n", flush=True)
            for line in SECTIONS[name](text, dataset):
                print(line, flush=True)


if __name__ == "__main__":
    main()
