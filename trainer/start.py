"""A RunConfig in, everything that a run needs before its first step out; whatever is wrong is told here."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.batch import MicroBatches
from data.lanes import StreamState
from data.shards import SPLITS, Dataset
from data.sources import training_sources
from model.config import MODERN_FIELDS, Backend
from model.flops import num_parameters
from model.hf import import_hf, missing_weights
from model.layout import choose_backend
from model.pretraining import ForPreTraining
from model.weights import build_empty, fresh_weights
from trainer.checkpoint import BYTES_PER_VALUE, newest_valid, restore
from trainer.checkpoint_files import list_checkpoints, read_state
from trainer.config import RunConfig, differences, to_dict
from trainer.ds import read_deepspeed_json, resolve
from trainer.engine import NamedState
from trainer.files import free_bytes, no_space
from trainer.phases import settings_at
from trainer.run_folder import claim, own
from trainer.state import TrainState
from trainer.stretch import known_damage, reader_of
from trainer.world import World

SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")  # that rows are made with
SHAPE = (
    "architecture", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps", *MODERN_FIELDS,
)  # fmt: skip
Weights = Callable[
    [], Iterator[tuple[str, torch.Tensor]]
]  # name and fp32 value of each, one at a time


class Prepared(NamedTuple):
    dataset: Dataset
    model: ForPreTraining  # on the meta device: shapes alone
    weights: Weights  # fresh ones, or those of run.init_from
    deepspeed: dict[str, Any]  # the resolved configuration


def prepare(run: RunConfig, world: World, stack: ExitStack) -> Prepared:
    """Check everything that can be checked before the first step, and take the run's folder. Collective."""
    problem, is_storage, prepared = None, False, None
    try:
        dataset = Dataset.open(run.data.path, run.data.storage)
        check_dataset(dataset)
        reader = reader_of(settings_at(run, 0), run.seed, world)
        for step in (0, *(phase.first_step for phase in run.phases)):
            settings = settings_at(run, step)
            MicroBatches(settings.data, reader_of(settings, run.seed, world), StreamState(0, ()))
            training_sources(dataset, settings.data.weights)
        deepspeed = resolve(
            read_deepspeed_json(Path(run.deepspeed)),
            micro_batch_size=run.micro_batch_size,
            accumulation=reader.accumulation,
            clip_norm=run.optim.clip_norm,
            precision=run.precision,
        )
        backends_of(run, world)
        model = build_empty(run.model, dataset.vocab_size, dataset.special_ids["[PAD]"])
        prepared = Prepared(dataset, model, initial_weights(run, dataset), deepspeed)
        if world.is_main:
            stack.enter_context(own(Path(run.dir)))
            check_disk(run, dataset.vocab_size)
            claim(Path(run.dir), run, deepspeed)
    except OSError as error:
        problem, is_storage = str(error), True
    except ValueError as error:
        problem = str(error)
    world.fail_together(problem, is_storage=is_storage)
    assert prepared is not None
    return prepared


def check_dataset(dataset: Dataset) -> None:
    """ValueError unless a dataset has what training asks of its tokenizer, and of its text."""
    problems = [
        f"its tokenizer has no {token}"
        for token in SPECIAL_TOKENS
        if token not in dataset.special_ids
    ]
    problems += [
        f"the id of {token} is {number}, with a vocabulary of {dataset.vocab_size}"
        for token, number in dataset.special_ids.items()
        if number >= dataset.vocab_size
    ]
    problems += [
        f"manifest.json lacks {name}"
        for name in ("unigram_entropy_nats", "context_free_loss_nats")
        if not isinstance(dataset.manifest.get(name), float)
    ]
    problems += [
        f"it has no block of the split {split}"
        for split in SPLITS
        if len(dataset.block_indices(split)) == 0
    ]
    if problems:
        raise ValueError(f"{dataset.place} cannot be trained on: " + "; ".join(problems))


def check_disk(run: RunConfig, vocab_size: int) -> None:
    """OSError where a new run has no room for two checkpoints: the second is written before the first may go.

    Of a run that has some, older ones make room.
    """
    if list_checkpoints(Path(run.dir)):
        return
    values = 4 if run.optim.ema_decay is None else 5  # master, two moments, hf/; and an average
    needed = 2 * BYTES_PER_VALUE * values * num_parameters(run.model, vocab_size)
    if free_bytes(Path(run.dir)) < needed:
        raise OSError(no_space(Path(run.dir), needed, "two checkpoints"))


def initial_weights(run: RunConfig, dataset: Dataset) -> Weights:
    """Of the model before its first step; a run that is continued gets others from a checkpoint."""

    def fresh() -> Iterator[tuple[str, torch.Tensor]]:
        return fresh_weights(run.model, dataset.vocab_size, seed=run.seed)

    if run.init_from is None or list_checkpoints(Path(run.dir)):
        return fresh
    weights, config, vocab_size = import_hf(Path(run.init_from), allow_missing_heads=True)
    problems = [
        f"its {name} is {getattr(config, name)}, model.{name} is {getattr(run.model, name)}"
        for name in SHAPE
        if getattr(config, name) != getattr(run.model, name)
    ]
    if vocab_size != dataset.vocab_size:
        problems.append(
            f"its vocabulary has {vocab_size} tokens, the dataset's {dataset.vocab_size}: prepare the text "
            f"with --tokenizer {run.init_from}"
        )
    if problems:
        raise ValueError(f"init_from {run.init_from} does not fit: " + "; ".join(problems))
    missing = missing_weights(weights, run.model, vocab_size)

    def given() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in fresh():
            yield name, value if name in missing else weights[name]

    return given


def backends_of(run: RunConfig, world: World) -> list[Backend]:
    """How attention is computed, in the order of the phases. ValueError where the one asked for cannot be."""
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    steps = [0, *(phase.first_step for phase in run.phases)]
    lengths = [settings_at(run, step).data.sequence_length for step in steps]
    backends: list[Backend] = [
        choose_backend(run.model, world.device, dtype, length) for length in lengths
    ]
    return list[Backend](dict.fromkeys(backends))


def resume(run: RunConfig, dataset: Dataset, named: NamedState, world: World) -> TrainState:
    """Load the newest intact checkpoint of the run; a fresh state where there is none. Collective."""
    found = newest_valid(Path(run.dir), world)
    if found is None:
        sources, _ = training_sources(dataset, run.data.weights)
        fresh = TrainState(0, 0, 0, StreamState.start(run.data.num_lanes, len(sources)))
        return known_damage(Path(run.dir), fresh, world)
    document = read_state(found)
    changed = differences(document["config"], to_dict(run))
    if changed:
        raise ValueError(f"{found} was made with other settings: " + "; ".join(changed))
    if world.is_main:
        print(f"resuming from {found}", flush=True)
    state = restore(found, named)
    if (lanes := len(state.stream.cursors)) != run.data.num_lanes:
        raise ValueError(
            f"{found} has cursors of {lanes} lanes, data.num_lanes is {run.data.num_lanes}"
        )
    return known_damage(Path(run.dir), state, world)


def announce(run: RunConfig, dataset: Dataset, state: TrainState, world: World) -> None:
    """What is about to happen, and what its numbers will mean."""
    if not world.is_main:
        return
    entropy = dataset.manifest["unigram_entropy_nats"]
    context_free = dataset.manifest["context_free_loss_nats"]
    lines = {"by token frequency": entropy, "the best without context": context_free}
    if "bigram_entropy_nats" in dataset.manifest:
        lines["by frequency after the token before"] = dataset.manifest["bigram_entropy_nats"]
    print(
        f"{num_parameters(run.model, dataset.vocab_size):,} parameters, {run.precision}, "
        f"{' and '.join(backends_of(run, world))} attention, {world.size} x {world.device.type}, "
        f"steps {state.step} to {run.steps} of {run.global_batch_size} rows\n"
        "tokens of this text can be guessed with a loss of "
        + ", ".join(f"{nats:.3f} {how}" for how, nats in lines.items())
        + "; what guessing gives of every task stands beside each evaluation",
        flush=True,
    )
