"""The `cloze` command: arguments in, exit status out.

cloze corpus RECIPE [key=value]  raw text of any quality -> clean documents and a report
cloze prepare DATASET TEXT...    text -> tokenizer -> shards
cloze shards verify|stat DATASET all hashes; what is in it
cloze doctor DATASET|PRESET      what is wrong, before anything is trained
cloze rehearse DATASET|PRESET    the stream of 512 ranks, without reading a block
cloze train PRESET [key=value]   the run, or its continuation
cloze status RUN                 how it is doing, or how it ended
cloze prove-resume PRESET        that a killed run goes on as if nothing had been
cloze checkpoints list|verify|convert  what a run has; whether it is whole; from DeepSpeed
cloze blame RUN STEP             which documents were in a step
cloze export RUN FOLDER          the newest checkpoint as a Hugging Face folder
"""

import argparse
import dataclasses
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

from data.append import append
from data.executors import EXECUTORS
from data.prepare import PrepareConfig, prepare
from data.tokenizer_verify import verify_tokenizer
from data.words import WORD_STARTS
from launcher import blame, checkpoints, corpus, doctor, prove_resume, rehearse, shards, status
from launcher.export import export
from launcher.supervise import supervise
from launcher.train import add_train_arguments, leave, report, train_here
from model.hf_classes import Kind
from trainer.config import load_config

DEFAULT_SOURCE = "text"
COMMANDS: dict[str, tuple[Any, str]] = {
    "corpus": (corpus, "raw text of any quality -> clean documents and a report"),
    "shards": (shards, "verify a dataset, or count what is in it"),
    "doctor": (doctor, "what is wrong with a dataset or a preset, before anything is trained"),
    "blame": (blame, "which documents were in a step"),
    "status": (status, "how a run is doing, or how it ended"),
    "checkpoints": (checkpoints, "list or verify a run's, or convert those of DeepSpeed"),
    "prove-resume": (prove_resume, "that a killed run of a preset goes on as if nothing had been"),
    "rehearse": (rehearse, "the stream of a run on any number of ranks, without reading a block"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cloze", description="Pretrain BERT-family encoders: text in, HF folder out."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_prepare(
        commands.add_parser("prepare", help="raw text -> tokenizer -> shards (restartable)")
    )
    train = commands.add_parser("train", help="train, or continue, the run of a preset")
    add_train_arguments(train)
    train.add_argument(
        "--processes", type=int, help="on this machine; default: one per GPU, or one"
    )
    train.add_argument(
        "--restarts",
        type=int,
        default=3,
        help="starts in a row that may fail without a new checkpoint (default: %(default)s)",
    )
    _add_export(commands.add_parser("export", help="checkpoint -> Hugging Face folder"))
    for name, (module, explanation) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=explanation))
    return parser


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="run (its newest intact checkpoint), or checkpoint"
    )
    parser.add_argument("folder", type=Path, help="new folder to write")
    what = "the transformers class it is for (default: the one with the most heads)"
    parser.add_argument("--as", dest="kind", choices=get_args(Kind), help=what)
    average = "the average of the weights over the steps (optim.ema_decay), not the last ones"
    parser.add_argument("--ema", action="store_true", help=average)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
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


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parsed arguments; a wrong command line ends the process with a message, as argparse does."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = hasattr(options, "overrides")
    if rest and (not takes_overrides or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if takes_overrides:
        options.overrides += rest  # argparse gives up on those that follow an option
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.command == "train":
        return _train(options)
    try:
        if options.command in COMMANDS:
            return COMMANDS[options.command][0].run(options)
        if options.command == "export":
            checkpoint = export(options.source, options.folder, options.kind, averaged=options.ema)
            print(f"{checkpoint} -> {options.folder}")
        else:
            _prepare(options)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return report(error)
    return 0


def _prepare(options: argparse.Namespace) -> None:
    if options.append and options.verify_tokenizer:
        raise ValueError(
            "--verify-tokenizer and --append do not go together: the tokenizer is there already; "
            "verify it by the command that made the dataset"
        )
    if options.append:
        append(prepare_config(options))
    else:
        prepare(prepare_config(options), verify_tokenizer if options.verify_tokenizer else None)


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


def _train(options: argparse.Namespace) -> int:
    if options.processes is not None and options.processes < 1:
        return report(ValueError(f"--processes {options.processes} is below 1"))
    if options.restarts < 0:
        return report(ValueError(f"--restarts {options.restarts} is negative"))
    if "RANK" in os.environ:  # started by torchrun, deepspeed or srun already
        leave(train_here(options.preset, options.overrides, new_phase=options.new_phase))
    import torch

    processes = options.processes or max(1, torch.cuda.device_count())
    try:
        run_dir = Path(load_config(options.preset, options.overrides).dir)
    except ValueError as error:
        return report(error)
    new_phase = ["--new-phase"] if options.new_phase else []
    arguments = [*new_phase, str(options.preset), *options.overrides]
    return supervise(arguments, processes, run_dir, options.restarts)


if __name__ == "__main__":
    sys.exit(main())
