"""A run and a process in, everything that a job of it works with out; and how it ends.

A job is what one start of the command does: from the newest checkpoint to the end of the run, or to a stop.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from data.shards import Dataset
from model.flops import num_parameters, peak_flops
from model.hf import export_hf
from model.hf_parity import REPORT_FILE, compare_logits_apart, compare_weights
from trainer.activity import Activity
from trainer.checkpoint_write import WriteHf
from trainer.config import RunConfig, to_dict
from trainer.engine import Engine, NamedState, build_engine
from trainer.guard import Guard
from trainer.jumps import Jump, known_jumps
from trainer.learning import Learning
from trainer.ledger import Ledger
from trainer.metrics import Metrics
from trainer.model_card import model_card
from trainer.prediction import Comparison
from trainer.rewind import go_back
from trainer.saver import Saver
from trainer.start import announce, prepare, resume
from trainer.state import TrainState
from trainer.stopping import StopRequest
from trainer.stragglers import Stragglers
from trainer.stretch import Stretch, known_damage, merged
from trainer.watchdog import STALLS
from trainer.world import World


class Job(NamedTuple):
    activity: Activity
    dataset: Dataset
    engine: Engine
    named: NamedState
    ledger: Ledger
    saver: Saver
    guard: Guard
    metrics: Metrics
    learning: Learning
    stragglers: Stragglers
    comparison: Comparison


def begin_job(
    run: RunConfig, activity: Activity, stop: StopRequest, world: World, stack: ExitStack
) -> tuple[Job, TrainState, dict[int, Jump]]:
    """All that a job needs, where it begins, and the jumps of the stream that are known. Collective."""
    run_dir = Path(run.dir)
    dataset, model, weights, deepspeed = prepare(run, world, stack)
    ledger = stack.enter_context(Ledger(run_dir, activity, is_main=world.is_main))
    stop.set_time_limit(activity.process_began, run.time_limit_minutes)
    if world.is_main:
        shutil.rmtree(run_dir / STALLS, ignore_errors=True)  # notes of a job that hung
    activity.job = world.broadcast(ledger.job)
    engine = build_engine(model, weights(), run.optim, deepspeed, world.device)
    named = NamedState(engine)
    state = resume(run, dataset, named, world)
    activity.step = state.step
    ledger.start(
        world_size=world.size, zero_stage=named.stage, precision=run.precision,
        resumed_step=state.step, num_steps=run.steps,
    )  # fmt: skip
    announce(run, dataset, state, world)
    metrics = stack.enter_context(
        Metrics(
            run, world, state, activity=activity, peak_flops=_peak_of(world),
        )
    )  # fmt: skip
    job = Job(
        activity,
        dataset,
        engine,
        named,
        ledger,
        Saver(run, named, world, state.step),
        Guard(run.guard),
        metrics,
        Learning(run, dataset, ledger, state, is_main=world.is_main),
        Stragglers(activity, world, named.stage),
        Comparison(run, world, state.step, deepspeed),
    )
    job.learning.look_at_text(state)
    return job, state, known_jumps(run_dir, world)


def _peak_of(world: World) -> float | None:
    if world.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(world.device))


def save(run: RunConfig, job: Job, state: TrainState, stretch: Stretch, world: World) -> None:
    """Merge the ranks' cursors, and begin to write everything. Collective. A failed save is an event."""
    job.activity.enter("save")
    job.named.check_replicas(world)
    state = merged(state, stretch, world)
    document = {**state.to_json(), "config": to_dict(run)}
    report_failed_save(job, state, job.saver.begin(document, _hf_writer(run, job.dataset, state)))
    job.ledger.longest_save_seconds = job.saver.longest_seconds


def report_failed_save(job: Job, state: TrainState, problems: list[str]) -> None:
    """problems: of a save that was waited for. The run goes on, and saves again when it is time to."""
    for problem in problems:
        job.ledger.event("save_failed", state.step, problem)


def _hf_writer(run: RunConfig, dataset: Dataset, state: TrainState) -> WriteHf:
    """The model as a folder for transformers, and the proof that it is; where it is not, nothing is saved."""
    tokenizer = dataset.root / "tokenizer"

    def write(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        num_weights = num_parameters(run.model, dataset.vocab_size)
        card = model_card(run, dataset.manifest, state.step, state.num_tokens, num_weights)
        export_hf(
            weights,
            run.model,
            dataset.vocab_size,
            folder,
            tokenizer_folder=tokenizer,
            model_card=card,
        )
        report = compare_weights(folder, weights, run.model)
        if state.step == run.steps and run.verify_hf == "logits":
            report |= compare_logits_apart(folder)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    return write


def rewind(
    run: RunConfig, job: Job, state: TrainState, stretch: Stretch, message: str, world: World
) -> tuple[TrainState, dict[int, Jump]]:
    """Go back to a checkpoint from before the trouble: its state, and where the stream jumps. Collective."""
    job.activity.enter("rewind")
    job.saver.wait()
    first_bad_step = job.guard.first_bad_step
    assert first_bad_step is not None
    here = merged(state, stretch, world)
    state, said = go_back(run, here, first_bad_step, message, job.named, world)
    state = known_damage(Path(run.dir), state, world)
    job.ledger.event("rewind", state.step, said)
    job.saver.saved_step = state.step
    job.metrics.begin(state)
    job.learning.begin(state)
    return state, known_jumps(Path(run.dir), world)


def end_job(
    run: RunConfig,
    job: Job,
    state: TrainState,
    stretch: Stretch,
    stop: StopRequest,
    world: World,
) -> None:
    """See to it that the state is saved, and say why the job ends. Collective. OSError when it is not saved."""
    job.activity.enter("save")
    if job.saver.saved_step != state.step:
        save(run, job, state, stretch, world)
    job.saver.wait()
    job.ledger.longest_save_seconds = job.saver.longest_seconds
    if job.saver.saved_step != state.step:
        raise OSError("; ".join(job.saver.failures))
    job.ledger.status = "done" if state.step == run.steps else "preempted"
    if job.ledger.status == "preempted":
        reasons = enumerate(world.gather(stop.reason))
        said = ", ".join(f"{why} (rank {rank})" for rank, why in reasons if why)
        job.ledger.event(
            "stop_requested", state.step, f"{said}. The same command goes on from here"
        )
