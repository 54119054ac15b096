"""A run or a checkpoint in, a Hugging Face folder out: what `cloze export` does."""

from pathlib import Path

from model.hf_classes import Kind, export_class
from trainer.checkpoint_files import list_checkpoints, problems_of


def export(source: Path, target: Path, kind: Kind | None = None) -> Path:
    """Write a checkpoint's model as the folder of one transformers class; returns the checkpoint.

    source: a checkpoint, or a run, whose newest intact one is taken
    kind: as in `model.hf_classes.export_class`

    ValueError when there is none that is intact, or `target` is not empty.
    """
    candidates = [source] if (source / "MANIFEST.json").exists() else list_checkpoints(source)
    if not candidates:
        raise ValueError(f"{source} is neither a checkpoint nor a run with one")
    problems: list[str] = []
    for checkpoint in reversed(candidates):
        found = problems_of(checkpoint)
        if not found:
            export_class(checkpoint / "hf", target, kind)
            return checkpoint
        problems += found
    raise ValueError(f"no checkpoint of {source} is intact: " + "; ".join(problems[:5]))
