"""A checkpoint of DeepSpeed and a preset in, a new run's folder with one checkpoint of ours out.

The model's weights and Adam's moments go over, and the steps done so far; the stream of data begins at its
beginning. `cloze train PRESET dir=NEW_RUN` goes on from there, at any ZeRO stage and world size.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import NamedTuple

import torch

from data.lanes import StreamState
from data.shards import Dataset
from data.sources import training_sources
from model.config import ModelConfig
from model.flops import num_parameters
from model.hf import export_hf
from model.hf_names import from_hf_names, to_hf_names
from model.hf_parity import REPORT_FILE, compare_weights
from model.weights import parameter_shapes, weight_problems
from trainer.checkpoint_files import FORMAT, checkpoints_folder, name_of
from trainer.checkpoint_write import collect_notes, facts_of, publish, write_part
from trainer.config import RunConfig, to_dict
from trainer.deepspeed_files import DeepSpeedState, read_deepspeed
from trainer.files import free_bytes, no_space
from trainer.model_card import model_card
from trainer.saved_tensors import key_of
from trainer.state import TrainState

WRAPPER = "module."  # in front of every name where the model was wrapped
TIED = {"cls.predictions.decoder.bias": "cls.predictions.bias"}  # one tensor, two names
MAX_SHOWN = 8
Parts = Mapping[str, Mapping[str, torch.Tensor]]  # name -> part -> fp32 tensor


class Converted(NamedTuple):
    checkpoint: Path
    step: int
    num_parameters: int
    names: str  # whose they were


def convert(source: Path, target: Path, run: RunConfig) -> Converted:
    """ValueError, before anything is written: unreadable, not this preset's model, or `target` is not empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: give a new folder for the run")
    dataset = Dataset.open(run.data.path, run.data.storage)
    found = read_deepspeed(source)
    if found.step >= run.steps:
        raise ValueError(f"{source} is of step {found.step}: the preset's run ends at {run.steps}")
    parts, names = in_our_names(found.parts, run.model, dataset.vocab_size)
    problems = [
        f"{part} of {name}"
        for name, tensors in parts.items()
        for part, value in tensors.items()
        if not torch.isfinite(value).all()
    ]
    if problems:
        raise ValueError(f"{source} has NaN or infinity in {_some(problems)}")
    checkpoint = _write(target, found._replace(parts=parts), run, dataset)
    sizes = (tensors["master"].numel() for tensors in parts.values())
    return Converted(checkpoint, found.step, sum(sizes), names)


def in_our_names(
    parts: Parts, config: ModelConfig, vocab_size: int
) -> tuple[dict[str, dict[str, torch.Tensor]], str]:
    """The same by the names of our model, and whose names they were. ValueError listing what does not fit."""
    shapes = parameter_shapes(config, vocab_size)
    plain = {name.removeprefix(WRAPPER): tensors for name, tensors in parts.items()}
    by_part: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensors in plain.items():
        for part, value in tensors.items():
            by_part.setdefault(part, {})[name] = value
    if shapes.keys() & plain.keys():
        names, unknown = "ours", sorted(plain.keys() - shapes.keys())
    else:
        names = "Hugging Face's"
        theirs = {
            part: {TIED.get(name, name): value for name, value in values.items()}
            for part, values in by_part.items()
        }
        by_part = {part: from_hf_names(values, config) for part, values in theirs.items()}
        used = to_hf_names(by_part["master"], config)
        unknown = sorted(theirs["master"].keys() - used.keys())
    fitting = {name: value for name, value in by_part["master"].items() if name in shapes}
    problems = weight_problems(fitting, shapes)
    told = [_some(problems)] if problems else []
    told += [f"the model has no {_some(unknown)}"] if unknown else []
    if told:
        raise ValueError(
            f"the checkpoint's names, taken as {names}, are not those of the preset's model: "
            + "; ".join(told)
        )
    return {name: {part: by_part[part][name] for part in by_part} for name in shapes}, names


def _write(target: Path, found: DeepSpeedState, run: RunConfig, dataset: Dataset) -> Path:
    """The checkpoint, complete or absent."""
    sources, _ = training_sources(dataset, run.data.weights)
    state = TrainState(found.step, 0, 0, StreamState.start(run.data.num_lanes, len(sources)))
    document = {
        "format": FORMAT,
        "optimizer_step": found.optimizer_step,
        **state.to_json(),
        "config": to_dict(run),
    }
    final = checkpoints_folder(target) / name_of(found.step)
    temporary = final.with_name(f".tmp-{final.name}")
    temporary.mkdir(parents=True)
    try:
        tensors = {
            key_of(part, name, 0, True): value.contiguous()
            for name, parts in found.parts.items()
            for part, value in parts.items()
        }
        needed = sum(value.numel() * 4 for value in tensors.values()) * 4 // 3  # and hf/
        if free_bytes(temporary) < needed:
            raise OSError(no_space(temporary, needed, "a checkpoint"))
        write_part(temporary, 0, 1, tensors)
        files = collect_notes(temporary, 1, Event())
        (temporary / "state.json").write_text(json.dumps(document), encoding="utf-8")
        masters = {name: parts["master"] for name, parts in found.parts.items()}
        _write_hf(temporary / "hf", masters, run, dataset, found.step)
        hf = sorted(path for path in (temporary / "hf").rglob("*") if path.is_file())
        publish(temporary, final, files | facts_of(temporary, [temporary / "state.json", *hf]))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write_hf(
    folder: Path, weights: dict[str, torch.Tensor], run: RunConfig, dataset: Dataset, step: int
) -> None:
    size = num_parameters(run.model, dataset.vocab_size)
    export_hf(
        weights,
        run.model,
        dataset.vocab_size,
        folder,
        tokenizer_folder=dataset.root / "tokenizer",
        model_card=model_card(run, dataset.manifest, step, 0, size),
    )
    report = compare_weights(folder, weights, run.model)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _some(problems: list[str]) -> str:
    more = f" (and {len(problems) - MAX_SHOWN} others)" if len(problems) > MAX_SHOWN else ""
    return ", ".join(problems[:MAX_SHOWN]) + more
