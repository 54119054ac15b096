"""A RunConfig in, a trained model in its run folder out: the whole training loop, top to bottom."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from data.batch import StreamItem, build_loader
from data.hashing import stable_hash64
from data.lanes import StreamState
from data.shards import Dataset
from model.flops import flops_per_step, num_parameters, peak_flops
from model.heads import Losses
from model.hf import export_hf
from trainer.checkpoint import save
from trainer.checkpoint_files import prune
from trainer.config import RunConfig, to_dict
from trainer.engine import (
    NamedState,
    build_engine,
    gradient_norm,
    set_learning_rate,
    start_world,
    step,
)
from trainer.evaluation import evaluate
from trainer.metrics import Metrics
from trainer.model_card import model_card
from trainer.optim import build_optimizer, lr_at
from trainer.start import announce, prepare, resume
from trainer.state import TrainState, merge_ranks, moved_lanes
from trainer.world import World


class StepCounts(NamedTuple):
    """What one optimizer step holds, over all ranks."""

    num_masked: int
    num_pairs: int
    num_tokens: int
    sum_squared_lengths: int
    rows_digest: int


def train(run: RunConfig) -> None:
    """Run one pretraining job from its newest checkpoint, or from the start, to `run.steps`. All ranks."""
    world = start_world()
    run_dir = Path(run.dir)
    with ExitStack() as stack:
        reader, dataset, model, deepspeed = prepare(run, world, stack)
        engine = build_engine(model, build_optimizer(model, run.optim), deepspeed)
        named = NamedState(engine)
        state = resume(run, dataset, named, world)
        announce(run, dataset, state, world)
        loader = build_loader(run.data, reader, state.stream)
        started_from = state.stream
        metrics = stack.enter_context(
            Metrics(run_dir, world, state, num_steps=run.steps, peak_flops=peak_of(world))
        )
        while state.step < run.steps:
            learning_rate = lr_at(state.step, run.optim, run.steps)
            set_learning_rate(engine, learning_rate)
            waiting_since = time.perf_counter()
            items = [next(loader) for _ in range(reader.accumulation)]
            data_wait_seconds = time.perf_counter() - waiting_since
            counts = count(items, world)  # collective
            for item in items:
                seed_dropout(run.seed, item.first_row)
                losses = engine(**item.batch.model_inputs(world.device))
                engine.backward(objective(losses, counts) * world.size, scale_wrt_gas=False)
                step(engine)  # DeepSpeed steps on the last micro-batch
                metrics.add(losses)
            cursors = {lane: cursor for item in items for lane, cursor in item.cursors.items()}
            state = state.advance(
                run.global_batch_size, counts.num_tokens, counts.rows_digest, cursors
            )
            metrics.add_step(
                data_wait_seconds=data_wait_seconds, flops=flops_of(run, dataset, counts)
            )
            done = state.step == run.steps
            if done or state.step % run.log_every == 0:
                metrics.log(state, learning_rate, gradient_norm(engine))  # collective
            paused_at = metrics.pause()
            if done or (run.eval_every and state.step % run.eval_every == 0):
                values = evaluate(engine, dataset, run.data, reader, world, num_rows=run.eval_rows)
                metrics.log_evaluation(state.step, values)
            if done or (run.save_every and state.step % run.save_every == 0):
                save_checkpoint(run, dataset, state, started_from, named, world)  # collective
            metrics.resume(paused_at)


def count(items: list[StreamItem], world: World) -> StepCounts:
    """Sum what the loss is normalised by, and what is logged, over micro-batches and ranks. Collective."""
    batches = [item.batch for item in items]
    local = [
        sum(len(batch.masked_labels) for batch in batches),
        sum(len(batch.nsp_labels) for batch in batches),
        sum(batch.num_tokens for batch in batches),
        sum(batch.sum_squared_lengths for batch in batches),
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


def flops_of(run: RunConfig, dataset: Dataset, counts: StepCounts) -> int:
    return flops_per_step(
        run.model,
        dataset.vocab_size,
        num_tokens=counts.num_tokens,
        sum_squared_lengths=counts.sum_squared_lengths,
        num_masked=counts.num_masked,
        num_pairs=counts.num_pairs,
    )


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
    started_from: StreamState,
    named: NamedState,
    world: World,
) -> None:
    """Merge the ranks' cursors and write everything. Collective."""
    merged = merge_ranks(state, world.gather(moved_lanes(state, started_from)))
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

    document = {**merged.to_json(), "config": to_dict(run), "dataset_digest": dataset.digest}
    folder = save(Path(run.dir), document, named, world, write_hf)
    if world.is_main:
        prune(Path(run.dir), run.keep_checkpoints)
        print(f"saved {folder}", flush=True)
