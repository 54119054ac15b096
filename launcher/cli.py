"""The `cloze` command: arguments in, exit status out.

cloze corpus RECIPE [key=value]  raw text of any quality -> clean documents and a report
cloze prepare DATASET TEXT...    text -> tokenizer -> shards
cloze shards verify|stat DATASET all hashes; what is in it
cloze doctor DATASET|PRESET      what is wrong, before anything is trained
cloze rehearse DATASET|PRESET    the stream of 512 ranks, without reading a block
cloze plan PRESET [key=value]    memory, time and disk of a run, before it runs
cloze train PRESET [key=value]   the run, or its continuation
cloze submit PRESET              the same run on Slurm, from a frozen copy, until it is done
cloze status RUN                 how it is doing, or how it ended
cloze prove-resume PRESET        that a killed run goes on as if nothing had been
cloze checkpoints list|verify|convert  what a run has; whether it is whole; from DeepSpeed
cloze blame RUN STEP             which documents were in a step
cloze probe RUN|MODEL LABELLED   what frozen checkpoints know of labelled texts
cloze export RUN FOLDER          the newest checkpoint as a Hugging Face folder
cloze evaluate RUN|FOLDER        held-out loss and accuracy of each source, and pseudo-perplexity
"""

import argparse
import importlib
import os
import sys

from launcher.train import report

COMMANDS = {  # in launcher/: only the module of the command that was given is imported
    "prepare": ("prepare", "raw text -> tokenizer -> shards (restartable)"),
    "train": ("train_command", "train, or continue, the run of a preset"),
    "submit": ("submit", "the run on Slurm: freeze, sbatch, requeue until it is done"),
    "export": ("export", "checkpoint -> Hugging Face folder"),
    "evaluate": ("evaluate", "held-out loss and accuracy of a checkpoint or a model's folder"),
    "corpus": ("corpus", "raw text of any quality -> clean documents and a report"),
    "shards": ("shards", "verify a dataset, or count what is in it"),
    "doctor": ("doctor", "what is wrong with a dataset or a preset, before anything is trained"),
    "blame": ("blame", "which documents were in a step"),
    "probe": (
        "probe",
        "what frozen checkpoints know of labelled texts: linear and nearest neighbours",
    ),
    "status": ("status", "how a run is doing, or how it ended"),
    "checkpoints": ("checkpoints", "list or verify a run's, or convert those of DeepSpeed"),
    "prove-resume": (
        "prove_resume",
        "that a killed run of a preset goes on as if nothing had been",
    ),
    "plan": ("plan", "memory, time and disk of a run on any number of ranks, before it runs"),
    "rehearse": ("rehearse", "the stream of a run on any number of ranks, without reading a block"),
}


def build_parser(command: str) -> argparse.ArgumentParser:
    """With the arguments of one command, and the names of all."""
    parser = argparse.ArgumentParser(
        prog="cloze", description="Pretrain BERT-family encoders: text in, HF folder out."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, explanation) in COMMANDS.items():
        its_own = commands.add_parser(name, help=explanation)
        if name == command:
            importlib.import_module(f"launcher.{module}").add_arguments(its_own)
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parsed arguments; a wrong command line ends the process with a message, as argparse does."""
    parser = build_parser(arguments[0] if arguments else "")
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = hasattr(options, "overrides")
    if rest and (not takes_overrides or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if takes_overrides:
        options.overrides += rest  # argparse gives up on those that follow an option
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    module = importlib.import_module(f"launcher.{COMMANDS[options.command][0]}")
    try:
        return module.run(options)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
