"""A RunConfig in, a trained model in its run folder out: the whole training loop, top to bottom."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.batch import StreamItem
from data.hashing import stable_hash64
from data.shards import Dataset
from model.config import ModelConfig
from model.flops import attended_pairs, flops_per_step, num_parameters, peak_flops
from model.heads import Losses
from model.hf import export_hf
from trainer.checkpoint import save
from trainer.checkpoint_files import prune
from trainer.config import RunConfig, to_dict
from trainer.engine import (
    NamedState,
    build_engine,
    gradient_norm,
    set_accumulation,
    set_learning_rate,
    start_world,
    step,
)
from trainer.evaluation import evaluate
from trainer.metrics import Metrics
from trainer.model_card import model_card
from trainer.optim import lr_at
from trainer.start import announce, prepare, resume
from trainer.state import TrainState
from trainer.stretch import Stretch, begin_stretch, merged, record_damage
from trainer.world import World


class StepCounts(NamedTuple):
    """What one optimizer step holds, over all ranks."""

    num_masked: int
    num_pairs: int
    num_tokens: int
    flops: int
    num_damaged: int
    rows_digest: int


def train(run: RunConfig, *, new_phase: bool = False) -> None:
    """Run one pretraining job from its newest checkpoint, or from the start, to `run.steps`. All ranks.

    new_phase: settings of the data that differ from the checkpoint's hold from here on.
    """
    world = start_world()
    run_dir = Path(run.dir)
    with ExitStack() as stack:
        dataset, model, weights, deepspeed = prepare(run, world, stack)
        engine = build_engine(model, weights(), run.optim, deepspeed, world.device)
        named = NamedState(engine)
        state = resume(run, dataset, named, world)
        announce(run, dataset, state, world)
        state, stretch = begin_stretch(run, dataset, state, None, world, new_phase=new_phase)
        metrics = stack.enter_context(
            Metrics(run_dir, world, state, num_steps=run.steps, peak_flops=peak_of(world))
        )
        while state.step < run.steps:
            if state.step == stretch.end:
                state, stretch = begin_stretch(run, dataset, state, stretch, world, new_phase=False)
            learning_rate = lr_at(state.step, run.optim, run.steps)
            set_learning_rate(engine, learning_rate)
            waiting_since = time.perf_counter()
            items = [next(stretch.loader) for _ in range(stretch.reader.accumulation)]
            data_wait_seconds = time.perf_counter() - waiting_since
            counts = count(run.model, dataset.vocab_size, items, state, world)  # collective
            damage = (
                record_damage(run_dir, dataset, state, items, world) if counts.num_damaged else []
            )
            for number, item in enumerate(items):
                set_accumulation(engine, number, len(items))
                seed_dropout(run.seed, item.first_row)
                losses = engine(**item.batch.model_inputs(world.device))
                engine.backward(objective(losses, counts) * world.size, scale_wrt_gas=False)
                step(engine)  # DeepSpeed steps on the last micro-batch
                metrics.add(losses)
            cursors = {lane: cursor for item in items for lane, cursor in item.cursors.items()}
            state = state.advance(counts.num_tokens, counts.rows_digest, cursors, damage)
            metrics.add_step(data_wait_seconds=data_wait_seconds, flops=counts.flops)
            done = state.step == run.steps
            if done or state.step % run.log_every == 0:
                metrics.log(state, learning_rate, gradient_norm(engine))  # collective
            paused_at = metrics.pause()
            if done or (run.eval_every and state.step % run.eval_every == 0):
                values = evaluate(engine, dataset, stretch, world, num_rows=run.eval_rows)
                metrics.log_evaluation(state.step, values)
            if done or (run.save_every and state.step % run.save_every == 0):
                save_checkpoint(run, dataset, state, stretch, named, world)  # collective
            metrics.resume(paused_at)


def count(
    model: ModelConfig, vocab_size: int, items: list[StreamItem], state: TrainState, world: World
) -> StepCounts:
    """Sum what the loss is normalised by, and what is logged, over micro-batches and ranks. Collective."""
    batches = [item.batch for item in items]
    lengths = np.concatenate([batch.sequence_lengths for batch in batches])
    num_masked = sum(len(batch.masked_labels) for batch in batches)
    num_pairs = sum(len(batch.nsp_labels) for batch in batches)
    flops = flops_per_step(
        model,
        vocab_size,
        num_tokens=int(lengths.sum()),
        num_attended={window: attended_pairs(lengths, window) for window in model.windows},
        num_masked=num_masked,
        num_pairs=num_pairs,
    )
    local = [
        num_masked,
        num_pairs,
        int(lengths.sum()),
        flops,
        len({damage for item in items for damage in item.damage} - set(state.stream.damage)),
    ]
    digest = sum(batch.rows_digest for batch in batches)
    # two halves: int64 sums wrap on every device, but Python must not overflow on the way in
    *sums, low, high = world.sum([*local, digest & 0xFFFFFFFF, digest >> 32])
    return StepCounts(*sums, rows_digest=low + (high << 32))


def objective(losses: Losses, counts: StepCounts) -> torch.Tensor:
    """This micro-batch's part of the step's loss: mean over *all* masked tokens plus mean over *all* pairs.

    A mean of micro-batch means would weigh tokens by how many others share their micro-batch, and
    the curve would depend on world size and accumulation.
    """
    mlm = losses.mlm_loss_sum / max(1, counts.num_masked)
    nsp = losses.nsp_loss_sum / max(1, counts.num_pairs)
    return mlm + nsp


def seed_dropout(seed: int, first_row: int) -> None:
    """Dropout's randomness has an address: a resumed run, or one on more ranks, draws the same."""
    torch.manual_seed(stable_hash64(seed, "dropout", first_row) >> 1)


def peak_of(world: World) -> float | None:
    return (
        peak_flops(torch.cuda.get_device_name(world.device))
        if world.device.type == "cuda"
        else None
    )


def save_checkpoint(
    run: RunConfig,
    dataset: Dataset,
    state: TrainState,
    stretch: Stretch,
    named: NamedState,
    world: World,
) -> None:
    """Merge the ranks' cursors and write everything. Collective."""
    card = model_card(
        run,
        dataset.manifest,
        state.step,
        state.num_tokens,
        num_parameters(run.model, dataset.vocab_size),
    )

    def write_hf(weights: dict[str, torch.Tensor], folder: Path) -> None:
        export_hf(
            weights,
            run.model,
            dataset.vocab_size,
            folder,
            tokenizer_folder=dataset.root / "tokenizer",
            model_card=card,
        )

    document = {**merged(state, stretch, world).to_json(), "config": to_dict(run)}
    folder = save(Path(run.dir), document, named, world, write_hf)
    if world.is_main:
        prune(Path(run.dir), run.keep_checkpoints)
        print(f"saved {folder}", flush=True)
