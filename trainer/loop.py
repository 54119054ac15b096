"""A RunConfig in, a trained model in its run folder out: the whole training loop, top to bottom."""

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from data.batch import StreamItem
from data.hashing import stable_hash64
from model.config import ModelConfig
from trainer.activity import Activity
from trainer.config import RunConfig
from trainer.engine import (
    gradient_norm,
    set_accumulation,
    set_learning_rate,
    step,
)
from trainer.evaluation import evaluate
from trainer.exit_status import Status
from trainer.job import Job, begin_job, end_job, report_failed_save, rewind, save
from trainer.phases import learning_rate_at, settings_at
from trainer.state import TrainState
from trainer.stopping import StopRequest
from trainer.stretch import Stretch, begin_stretch, merged, record_damage
from trainer.task_losses import count_flops, objective
from trainer.world import World


class StepCounts(NamedTuple):
    """What one optimizer step holds, over all ranks; and what they have to agree on."""

    num_labels: dict[str, int]  # of each task
    num_tokens: int
    flops: int
    num_damaged: int
    num_asked_to_stop: int  # ranks
    num_failed_saves: int  # ranks
    rows_digest: int


def train(
    run: RunConfig,
    world: World,
    activity: Activity,
    stop: StopRequest,
    *,
    new_phase: bool = False,
) -> Status:
    """Run one pretraining job from its newest checkpoint, or from the start, to `run.steps`. All ranks.

    activity, stop: of this process, since its beginning. new_phase: settings of the data that differ from the
    checkpoint's hold from here on. Returns "done", or "preempted": asked to stop, and saved.
    """
    with ExitStack() as stack:
        job, state, jumps = begin_job(run, activity, stop, world, stack)
        state, stretch = begin_stretch(run, job.dataset, state, jumps, world, new_phase=new_phase)
        while state.step < run.steps:
            if state.step == stretch.end:
                state = merged(state, stretch, world)
                state, stretch = begin_stretch(run, job.dataset, state, jumps, world)
                job.guard.forget()
            activity.step_begins(state.step)
            items = [next(stretch.loader) for _ in range(stretch.reader.accumulation)]
            activity.enter("counts")
            if world.is_main:
                stop.look(Path(run.dir), activity.longest_step_seconds, job.saver.longest_seconds)
            counts = count(run.model, job, items, state, stop, world)  # collective
            if counts.num_failed_saves:
                report_failed_save(job, state, job.saver.wait())
            if counts.num_asked_to_stop:
                break
            damage = []
            if counts.num_damaged:
                damage = record_damage(Path(run.dir), job.dataset, state, items, world)
            grad_norm = job.comparison.during(
                state.step + 1, partial(optimizer_step, run, job, state, items, counts, world)
            )
            activity.enter("log")
            loss = job.metrics.end_step(counts.flops, grad_norm, stretch.settings.loss_weights)
            state = state.advance(
                counts.num_tokens,
                counts.rows_digest,
                {lane: cursor for item in items for lane, cursor in item.cursors.items()},
                damage,
                skipped=not math.isfinite(grad_norm),
            )
            activity.step_done(state.step)
            verdict, message = job.guard.judge(state.step, loss, grad_norm)
            if verdict == "rewind":
                state, jumps = rewind(run, job, state, stretch, message, world)
                state, stretch = begin_stretch(run, job.dataset, state, jumps, world)
                job.guard.forget()
                continue
            if verdict != "fine":
                job.ledger.event(verdict, state.step, message)
            between_steps(run, job, state, stretch, grad_norm, world)
        end_job(run, job, state, stretch, stop, world)
        return job.ledger.status


def optimizer_step(
    run: RunConfig,
    job: Job,
    state: TrainState,
    items: list[StreamItem],
    counts: StepCounts,
    world: World,
) -> float:
    """Forward, backward, update. Returns the gradient's norm: infinite or NaN where nothing was changed."""
    set_learning_rate(job.engine, learning_rate_at(run, state.step))
    loss_weights = settings_at(run, state.step).loss_weights
    for number, item in enumerate(items):
        set_accumulation(job.engine, number, len(items))
        seed_dropout(run.seed, item.first_row, world.device)
        job.activity.enter("forward")
        losses = job.engine(**item.batch.model_inputs(world.device))
        job.activity.enter("backward")
        loss = objective(losses, counts.num_labels, loss_weights)
        job.engine.backward(loss * world.size, scale_wrt_gas=False)
        job.metrics.add(losses)
        job.activity.enter("optimizer")
        if number + 1 == len(items):
            job.metrics.gather_step()
        step(job.engine)  # DeepSpeed steps on the last micro-batch
    return gradient_norm(job.engine)


def between_steps(
    run: RunConfig, job: Job, state: TrainState, stretch: Stretch, grad_norm: float, world: World
) -> None:
    """Log, evaluate and save where it is time to. Collective."""
    is_done = state.step == run.steps
    if is_done or state.step % run.log_every == 0:
        learning_rate = learning_rate_at(run, state.step - 1)
        step_seconds = job.metrics.log(state, learning_rate, grad_norm)
        if message := job.stragglers.look(step_seconds):
            job.ledger.event("straggler", state.step, message)
        if message := job.comparison.look(state.step, step_seconds):
            job.ledger.event("plan", state.step, message)
    if is_done or (run.eval_every and state.step % run.eval_every == 0):
        job.activity.enter("eval")
        heldout = evaluate(job.engine, job.dataset, stretch, world, num_rows=run.eval_rows)
        if world.is_main:
            line = job.learning.judge(state, stretch, heldout, job.metrics.last_train)
            job.metrics.log_evaluation(line)
        job.ledger.progress(state.step, now=True)
    if is_done or (run.save_every and state.step % run.save_every == 0):
        save(run, job, state, stretch, world)
        job.ledger.progress(state.step, now=True)
    job.ledger.progress(state.step)


def count(
    model: ModelConfig,
    job: Job,
    items: list[StreamItem],
    state: TrainState,
    stop: StopRequest,
    world: World,
) -> StepCounts:
    """Sum what the loss is normalised by, and what is logged, over micro-batches and ranks. Collective.

    Whether to stop, and whether a save has failed, is agreed on here too: it costs nothing.
    """
    batches = [item.batch for item in items]
    tasks = model.tasks
    local = [
        *(sum(batch.num_labels[task] for batch in batches) for task in tasks),
        sum(batch.num_tokens for batch in batches),
        count_flops(model, job.dataset.vocab_size, batches),
        len({damage for item in items for damage in item.damage} - set(state.stream.damage)),
        int(stop.reason is not None),
        int(job.saver.has_problem()),
    ]
    digest = sum(batch.rows_digest for batch in batches)
    # two halves: int64 sums wrap on every device, but Python must not overflow on the way in
    *sums, low, high = world.sum([*local, digest & 0xFFFFFFFF, digest >> 32])
    num_labels = dict(zip(tasks, sums, strict=False))
    return StepCounts(num_labels, *sums[len(tasks) :], rows_digest=low + (high << 32))


def seed_dropout(seed: int, first_row: int, device: torch.device) -> None:
    """Dropout's randomness has an address: a resumed run, or one on more ranks, draws the same.

    What torch.manual_seed does, without asking for every kind of device that torch knows.
    """
    number = stable_hash64(seed, "dropout", first_row) >> 1
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
