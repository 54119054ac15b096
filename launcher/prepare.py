"""`cloze prepare DATASET TEXT...`: text in, tokenizer and shards out."""

import argparse
import dataclasses
import os
from collections import defaultdict
from typing import Any

from data.append import append
from data.executors import EXECUTORS
from data.prepare import PrepareConfig, prepare
from data.tokenizer_verify import verify_tokenizer
from data.words import WORD_STARTS

DEFAULT_SOURCE = "text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = {field.name: field.default for field in dataclasses.fields(PrepareConfig)}
    parser.add_argument("output", help="folder of the dataset")
    parser.add_argument(
        "text",
        nargs="+",
        help=".txt, .jsonl or .parquet files, each also .gz .xz .zst, folders or globs; name=path puts it "
        f"into a source of that name (default: {DEFAULT_SOURCE})",
    )

    def add(name: str, explanation: str, **more: Any) -> None:
        flag = "--" + name.replace("_", "-")
        shown = default[name]
        typed = not {"choices", "action"} & set(more) and shown is not None
        kind = {"type": type(shown)} if typed else {}
        parser.add_argument(
            flag, default=shown, help=f"{explanation} (default: %(default)s)", **kind, **more
        )

    add("vocab_size", "tokens of the tokenizer to train")
    add("tokenizer_kind", "kind of the tokenizer to train", choices=["unigram", "bpe", "wordpiece"])
    add("lowercase", "lower-case text and drop accents (wordpiece only)", action="store_true")
    add("tokenizer", "folder of an existing tokenizer to use instead", metavar="FOLDER")
    add("text_field", "jsonl key or parquet column of the text")
    add("id_field", "jsonl key or parquet column of the document's own id, if any")
    add("txt_documents", "what one document of a .txt file is", choices=["file", "blank_line"])
    add("heldout_fraction", "share of documents kept for evaluation")
    add("block_tokens", "tokens of a block, the unit of shuffling")
    add("shard_text_bytes", "text of one shard, in bytes")
    add("seed", "of the shuffle and of the held-out split")
    add("word_starts", "what tells the Chinese words of whole-word masking", choices=WORD_STARTS)
    parser.add_argument(
        "--verify-tokenizer",
        action="store_true",
        help="compare its ids with those of transformers, on a sample of the text",
    )
    add("executor", "where tasks run; --processes counts them all", choices=EXECUTORS)
    parser.add_argument(
        "--append",
        action="store_true",
        help="add new sources to a finished dataset; its tokenizer and options stay",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="worker processes (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Prepare, append to, or go on with a dataset. ValueError and OSError say what is wrong."""
    if options.append and options.verify_tokenizer:
        raise ValueError(
            "--verify-tokenizer and --append do not go together: the tokenizer is there already; "
            "verify it by the command that made the dataset"
        )
    if options.append:
        append(prepare_config(options))
    else:
        prepare(prepare_config(options), verify_tokenizer if options.verify_tokenizer else None)
    return 0


def prepare_config(options: argparse.Namespace) -> PrepareConfig:
    """The PrepareConfig of parsed `cloze prepare` arguments."""
    sources: dict[str, list[str]] = defaultdict(list)
    for text in options.text:
        name, equals, path = text.partition("=")
        named = bool(equals) and "/" not in name
        sources[name if named else DEFAULT_SOURCE].append(path if named else text)
    names = {field.name for field in dataclasses.fields(PrepareConfig)} - {
        "sources",
        "num_processes",
    }
    return PrepareConfig(
        sources={name: tuple(paths) for name, paths in sources.items()},
        num_processes=options.processes,
        **{name: value for name, value in vars(options).items() if name in names},
    )
