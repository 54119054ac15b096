"""What `cloze evaluate` was told in, the model's folder and the rows to measure it on out, checked."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from data.lanes import DataConfig
from data.objectives import DEFAULT_RECIPE
from data.shards import Dataset
from model.hf_config import read_config, read_object
from trainer.checkpoint_files import list_checkpoints, problems_of, read_state, step_of
from trainer.config import config_from
from trainer.phases import settings_at

SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and on which rows."""

    folder: Path  # in Hugging Face layout
    step: int | None  # of a run
    data: DataConfig
    seed: int
    micro_batch_size: int


def find_subject(options: argparse.Namespace) -> Subject:
    """What the command line names. ValueError when it is neither a run, a checkpoint, nor a model."""
    source: Path = options.source
    if (source / "config.json").is_file():
        if options.step is not None:
            raise ValueError(f"--step is of a run, and {source} is the folder of a model")
        if options.dataset is None:
            raise ValueError(f"{source} is the folder of a model: name the dataset after it")
        config, _ = read_config(source)
        length = min(DataConfig.sequence_length, config.max_position_embeddings)
        objectives = objectives_for(config.tasks)
        data = DataConfig(options.dataset, sequence_length=length, objectives=objectives)
        subject = Subject(source, None, data, seed=1, micro_batch_size=8)
    else:
        subject = _of_checkpoint(find_checkpoint(source, options.step))
    data = replace(
        subject.data,
        path=options.dataset or subject.data.path,
        sequence_length=options.sequence_length or subject.data.sequence_length,
    )
    return replace(
        subject, data=data, micro_batch_size=options.micro_batch or subject.micro_batch_size
    )


def objectives_for(tasks: tuple[str, ...]) -> dict[str, int]:
    """Rows that ask for every task of a model whose run is not known."""
    if set(tasks) <= {"mlm", "nsp"}:
        return {DEFAULT_RECIPE: 1}
    return {task: 1 for task in tasks if task != "rtd_generator"}


def find_checkpoint(source: Path, step: int | None) -> Path:
    """A checkpoint, or of a run the newest that is intact, or that of `step`. ValueError without one."""
    candidates = [source] if (source / "MANIFEST.json").exists() else list_checkpoints(source)
    if not candidates:
        raise ValueError(
            f"{source} is neither a run with a checkpoint, nor a checkpoint, nor a model's folder"
        )
    known = [step_of(folder) for folder in candidates]
    if step is not None:
        if step not in known:
            raise ValueError(f"{source} has no checkpoint of step {step}: there are {known}")
        candidates = [candidates[known.index(step)]]
    problems: list[str] = []
    for checkpoint in reversed(candidates):
        found = problems_of(checkpoint)
        if not found:
            return checkpoint
        print(f"{checkpoint} is damaged and left aside: {'; '.join(found)}", file=sys.stderr)
        problems += found
    raise ValueError(f"no checkpoint of {source} is intact: " + "; ".join(problems[:5]))


def _of_checkpoint(checkpoint: Path) -> Subject:
    """With the settings of its last step: what the run itself evaluated with there."""
    run = config_from(read_state(checkpoint)["config"], source=str(checkpoint / "state.json"))
    step = step_of(checkpoint)
    settings = settings_at(run, max(0, step - 1))
    return Subject(checkpoint / "hf", step, settings.data, run.seed, settings.micro_batch_size)


def check(subject: Subject, dataset: Dataset) -> None:
    """ValueError, all in one message, where the dataset is not one that this model can be measured on."""
    config, vocab_size = read_config(subject.folder)
    problems = [
        f"its tokenizer has no {token}"
        for token in SPECIAL_TOKENS
        if token not in dataset.special_ids
    ]
    if len(dataset.block_indices("heldout")) == 0:
        problems.append("it has no held-out documents: prepare with --heldout-fraction above 0")
    if dataset.vocab_size != vocab_size:
        problems.append(f"it has {dataset.vocab_size} tokens, the model {vocab_size}")
    elif not _same_vocabulary(subject.folder, dataset.root / "tokenizer"):
        problems.append(
            "its tokenizer has other tokens than the one beside the model: prepare the text with "
            f"--tokenizer {subject.folder}"
        )
    if subject.data.sequence_length > config.max_position_embeddings:
        problems.append(
            f"rows of {subject.data.sequence_length} slots are over the model's "
            f"{config.max_position_embeddings} (--sequence-length)"
        )
    if problems:
        raise ValueError(
            f"{subject.folder} cannot be evaluated on {dataset.place}: " + "; ".join(problems)
        )


def _same_vocabulary(*folders: Path) -> bool:
    """Whether their tokenizer.json give the same ids. Where one has none, sizes have to do."""
    paths = [folder / "tokenizer.json" for folder in folders]
    if not all(path.is_file() for path in paths):
        return True
    found = [read_object(path) for path in paths]
    models = [content.get("model") or {} for content in found]
    added = [
        [(token.get("content"), token.get("id")) for token in content.get("added_tokens") or ()]
        for content in found
    ]
    return models[0].get("vocab") == models[1].get("vocab") and added[0] == added[1]
