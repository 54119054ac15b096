"""Nothing in, a trained BERT out: no network, no GPU, no corpus needed. `make demo` runs it.

The documentation inside the installed Python packages becomes a corpus, a tokenizer and shards, and
two processes train on them for some minutes. Stopped at any moment, the same command goes on.
"""

import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from launcher.demo_corpus import collect, installed_folders, write_corpus
from launcher.demo_report import report

CORPUS = Path("demo/corpus/python_docs.jsonl")
DATASET = Path("demo/dataset")
RUN = Path("demo/run")
PRESET = Path("configs/tiny.yaml")

PREPARE = [
    "prepare", str(DATASET), f"python_docs={CORPUS}",
    "--vocab-size", "4096", "--block-tokens", str(1 << 15), "--heldout-fraction", "0.02",
]  # fmt: skip
TRAIN = ["train", str(PRESET), f"dir={RUN}", f"data.path={DATASET}", "--processes", "2"]

NEXT = """\
Next, after `source {activate}`:

  tensorboard --logdir {run}
      all curves, in the browser.

  {train}
      the training again: kill it at any moment, start it again, and it goes on from its last
      checkpoint as if nothing had happened (after `rm -r {run}` it starts over).

Your own text (.txt, .jsonl or .parquet files, folders, globs) in three commands:

  cloze prepare datasets/mine TEXT...
  cloze train {preset} dir=runs/mine data.path=datasets/mine --processes 2
  tensorboard --logdir runs/mine
"""


def main() -> int:
    if not PRESET.is_file():
        print(
            f"demo: {PRESET} is not here: run this in the folder of the repository", file=sys.stderr
        )
        return 78
    print(
        f"1 of 4: a corpus from the documentation of the installed packages -> {CORPUS}", flush=True
    )
    make_corpus()
    steps = (
        (f"2 of 4: tokenizer and shards -> {DATASET}", PREPARE),
        (f"3 of 4: two processes train a small BERT -> {RUN}", TRAIN),
    )
    for title, arguments in steps:
        print(f"\n{title}\n$ {as_typed(arguments)}\n", flush=True)
        status = run_cloze(arguments)
        if status:
            print(
                f"demo: stopped with status {status}. Run `make demo` again and it goes on from here; "
                "`rm -r demo` starts over.",
                file=sys.stderr,
            )
            return status
    print("\n4 of 4: what it has learned\n", flush=True)
    print(report(RUN, DATASET))
    activate = Path(sys.executable).with_name("activate")
    with suppress(ValueError):
        activate = activate.relative_to(Path.cwd())
    print(NEXT.format(activate=activate, run=RUN, train=as_typed(TRAIN), preset=PRESET))
    return 0


def make_corpus() -> None:
    """Write CORPUS, unless an earlier demo has."""
    if CORPUS.exists():
        print(f"{CORPUS} is there already", flush=True)
        return
    corpus = collect(installed_folders())
    write_corpus(corpus.documents, CORPUS)
    print(
        f"{len(corpus.documents):,} documents, {corpus.num_bytes / 1e6:.1f} MB of text from "
        f"{corpus.num_files:,} files ({corpus.num_unreadable} could not be parsed)",
        flush=True,
    )


def as_typed(arguments: list[str]) -> str:
    """The command line of `run_cloze`, as a person types it."""
    hidden = "CUDA_VISIBLE_DEVICES= " if arguments[0] == "train" else ""
    return f"{hidden}cloze {shlex.join(arguments)}"


def run_cloze(arguments: list[str]) -> int:
    """Run a `cloze` command to its end, on the CPU. Returns its exit status."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    status = None
    while status is None:
        with suppress(KeyboardInterrupt):  # the command has got the signal too, and is cleaning up
            status = process.wait()
    return status


if __name__ == "__main__":
    sys.exit(main())
