"""`cloze export RUN FOLDER`: a run or a checkpoint in, a Hugging Face folder out."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import get_args

from model.hf import export_hf
from model.hf_classes import Kind, export_class
from model.weights import parameter_shapes
from trainer.checkpoint_files import list_checkpoints, problems_of, read_state
from trainer.config import config_from
from trainer.partitions import EMA
from trainer.saved_tensors import SavedPart, SavedTensors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="run (its newest intact checkpoint), or checkpoint"
    )
    parser.add_argument("folder", type=Path, help="new folder to write")
    what = "the transformers class it is for (default: the one with the most heads)"
    parser.add_argument("--as", dest="kind", choices=get_args(Kind), help=what)
    average = "the average of the weights over the steps (optim.ema_decay), not the last ones"
    parser.add_argument("--ema", action="store_true", help=average)


def run(options: argparse.Namespace) -> int:
    """ValueError and OSError say what is wrong."""
    checkpoint = export(options.source, options.folder, options.kind, averaged=options.ema)
    print(f"{checkpoint} -> {options.folder}")
    return 0


def export(source: Path, target: Path, kind: Kind | None = None, *, averaged: bool = False) -> Path:
    """Write a checkpoint's model as the folder of one transformers class; returns the checkpoint.

    source: a checkpoint, or a run, whose newest intact one is taken
    kind: as in `model.hf_classes.export_class`
    averaged: the average of the weights over the steps (optim.ema_decay) instead of the last ones

    ValueError when there is none that is intact, or `target` is not empty.
    """
    candidates = [source] if (source / "MANIFEST.json").exists() else list_checkpoints(source)
    if not candidates:
        raise ValueError(f"{source} is neither a checkpoint nor a run with one")
    problems: list[str] = []
    for checkpoint in reversed(candidates):
        found = problems_of(checkpoint)
        if not found:
            if averaged:
                _export_average(checkpoint, target, kind)
            else:
                export_class(checkpoint / "hf", target, kind)
            return checkpoint
        problems += found
    raise ValueError(f"no checkpoint of {source} is intact: " + "; ".join(problems[:5]))


def _export_average(checkpoint: Path, target: Path, kind: Kind | None) -> None:
    run = config_from(read_state(checkpoint)["config"], source=str(checkpoint / "state.json"))
    if run.optim.ema_decay is None:
        raise ValueError(
            f"{checkpoint} has no average of the weights: its run had no optim.ema_decay. Leave out --ema"
        )
    hf = checkpoint / "hf"
    vocab_size = json.loads((hf / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    shapes = parameter_shapes(run.model, vocab_size)
    card = (hf / "README.md").read_text(encoding="utf-8")
    card += f"\nThese weights are an average over the steps, exponential, with decay {run.optim.ema_decay}.\n"
    with SavedTensors(checkpoint) as saved, tempfile.TemporaryDirectory() as folder:
        weights = SavedPart(saved, EMA, shapes)
        export_hf(
            weights,
            run.model,
            vocab_size,
            Path(folder),
            tokenizer_folder=hf,
            model_card=card,
        )
        export_class(Path(folder), target, kind)
