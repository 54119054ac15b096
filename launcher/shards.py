"""`cloze shards verify|stat DATASET`: a dataset in, what is wrong with it, or what is in it, out."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from data.dataset_check import dataset_problems
from data.dataset_stat import SplitStat, dataset_stats
from data.shards import Dataset

MAX_SHOWN = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    verify = actions.add_parser(
        "verify", help="read every byte and compare; status 1 if any differs"
    )
    stat = actions.add_parser("stat", help="documents, tokens, lengths by source and split")
    for action in (verify, stat):
        action.add_argument("dataset", type=Path, help="folder of the dataset")
        action.add_argument(
            "--processes", type=int, default=os.cpu_count(), help="default: %(default)s"
        )
    stat.add_argument("--json", action="store_true", help="for programs")
    stat.add_argument("--tokens", type=int, help="of a run: tells how many epochs it is")


def run(options: argparse.Namespace) -> int:
    """ValueError with all that is wrong with the dataset."""
    if options.processes < 1:
        raise ValueError(f"--processes {options.processes} is below 1")
    if options.action == "verify":
        return _verify(options.dataset, options.processes)
    dataset = Dataset.open(options.dataset)
    stats = dataset_stats(dataset, options.processes, options.tokens)
    if options.json:
        print(json.dumps([stat._asdict() for stat in stats], indent=1))
    else:
        print(stat_table(stats, options.tokens))
        print(f"\n{_levels(dataset.manifest)}")
    return 0


def _levels(manifest: dict[str, Any]) -> str:
    """What a model reaches on the training text with no context, and with one token of it."""
    names = ("unigram_entropy_nats", "bigram_entropy_nats", "bigram_sample_pairs")
    unigram, bigram, num_pairs = (manifest.get(name) for name in names)
    if unigram is None or bigram is None or num_pairs is None:
        return "manifest.json says nothing of pairs of tokens: an earlier version made this dataset"
    return (
        f"nats a token of all training text: {unigram:.4f} by frequency, {bigram:.4f} given the token "
        f"before it ({num_pairs:,} pairs)"
    )


def _verify(root: Path, num_processes: int) -> int:
    if problems := dataset_problems(root, num_processes):
        shown = problems[:MAX_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ValueError(f"{root} is damaged:\n  " + "\n  ".join(shown))
    dataset = Dataset.open(root)
    num_tokens = int(dataset.blocks["num_tokens"].sum(dtype="int64"))
    print(
        f"{root} is sound: {len(dataset.blocks):,} blocks, {num_tokens:,} tokens, digest {dataset.digest}"
    )
    return 0


def stat_table(stats: list[SplitStat], num_tokens: int | None) -> str:
    """Two tables with a line for each split of each source."""
    counts = ("documents", "sentences", "tokens", "blocks", "shards")
    much = [
        ("source", "split", *counts, "MB"),
        *(
            (
                s.source,
                s.split,
                *(f"{getattr(s, name):,}" for name in counts),
                f"{s.bytes / 1e6:,.1f}",
            )
            for s in stats
        ),
    ]
    titles = {
        "tok/doc": ("tokens_per_document", ",.1f"),
        "tok/sent": ("tokens_per_sentence", ".1f"),
        "sent/doc": ("sentences_per_document", ",.1f"),
        "bytes/tok": ("bytes_per_token", ".3f"),
        "chars/tok": ("characters_per_token", ".3f"),
        "UNK": ("unknown_share", ".4%"),
        "special": ("special_share", ".4%"),
        "nats/tok": ("unigram_entropy_nats", ".4f"),
    }
    long = [
        ("source", "split", *titles),
        *(
            (s.source, s.split, *(format(getattr(s, name), how) for name, how in titles.values()))
            for s in stats
        ),
    ]
    lines = [_aligned(much), "", _aligned(long)]
    total = sum(s.tokens for s in stats if s.split == "train")
    if num_tokens is not None:
        lines += ["", f"{num_tokens:,} tokens are {num_tokens / total:.2f} epochs of {total:,}"]
    return "\n".join(lines)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest entry; the first two to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
