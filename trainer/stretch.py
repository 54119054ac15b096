"""A run and its state in, the loader of the steps up to the next phase out; and the record of damage.

A stretch is a series of steps that one loader serves: a job's steps of one phase.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data.batch import Reader, StreamItem, build_loader, commit
from data.lanes import Damage, StreamState
from data.phases import Phase, enter
from data.shards import Dataset
from trainer.config import RunConfig
from trainer.jumps import Jump, jump_at
from trainer.phases import Settings, phase_end, settings_at
from trainer.run_folder import DAMAGE_FILE
from trainer.state import TrainState, merge_ranks, moved_lanes
from trainer.world import AgreedError, World


class Stretch(NamedTuple):
    settings: Settings
    reader: Reader
    loader: Iterator[StreamItem]
    started_from: StreamState  # the whole stream where the loader began
    end: int  # the first step that is not of it


def begin_stretch(
    run: RunConfig,
    dataset: Dataset,
    state: TrainState,
    jumps: dict[int, Jump],
    world: World,
    *,
    new_phase: bool = False,
) -> tuple[TrainState, Stretch]:
    """The state, its phase entered if one begins here, and the loader of what follows. Collective.

    jumps: where a rewind has moved the stream, which is done here too.

    new_phase: settings that differ from those of the state's phase begin a new one, here and now;
    AgreedError otherwise, unless run.phases has one at this step.
    """
    settings = settings_at(run, state.step)
    state = jump_at(jumps, state)
    row = state.stream.row
    phase = Phase.of(settings.data, dataset, settings.global_batch_size, state.step, row)
    state = _in_phase(run, state, phase, world, new_phase)
    reader = reader_of(settings, run.seed, world)
    end = min([phase_end(run, state.step), *(step for step in jumps if step > state.step)])
    end_row = row + (end - state.step) * settings.global_batch_size
    loader = build_loader(settings.data, reader, state.stream, end_row)
    return state, Stretch(settings, reader, loader, state.stream, end)


def reader_of(settings: Settings, seed: int, world: World) -> Reader:
    """This rank's part of the rows. ValueError when the batch does not divide."""
    return Reader(
        world.rank, world.size, settings.micro_batch_size, settings.global_batch_size, seed
    )


def merged(state: TrainState, stretch: Stretch, world: World) -> TrainState:
    """The run's state: every rank knows the lanes it has read, together they know all. Collective."""
    return merge_ranks(state, world.gather(moved_lanes(state, stretch.started_from)))


def _in_phase(
    run: RunConfig, state: TrainState, phase: Phase, world: World, new_phase: bool
) -> TrainState:
    if not state.phases:
        return replace(state, phases=(phase,))
    changes = state.phases[-1].differences(phase)
    if not changes:
        return state
    planned = any(p.first_step == state.step for p in run.phases)
    same_dataset = state.phases[-1].dataset_digest == phase.dataset_digest
    if not new_phase and not (planned and same_dataset):
        raise AgreedError(
            f"the checkpoint at step {state.step} was made with other settings: {'; '.join(changes)}. Give "
            "the former ones to continue as before, or add --new-phase to go on with these from here"
        )
    try:
        stream, notes = enter(state.stream, state.phases[-1], phase)
    except ValueError as error:
        raise AgreedError(str(error)) from error
    if world.is_main:
        print(
            "\n  ".join([f"a new phase begins at step {state.step}:", *changes, *notes]), flush=True
        )
    return replace(state, stream=stream, phases=(*state.phases, phase))


def record_damage(
    run_dir: Path, dataset: Dataset, state: TrainState, items: list[StreamItem], world: World
) -> list[Damage]:
    """What all ranks have passed over in this step; written down before it is trained on. Collective.

    A job that has to repeat these steps passes over the same: the stream stays what it was.
    """
    mine = {damage for item in items for damage in item.damage} - set(state.stream.damage)
    every = sorted({damage for part in world.gather(mine) for damage in part})
    if world.is_main:
        with (run_dir / DAMAGE_FILE).open("a", encoding="utf-8") as file:
            for damage in every:
                place = {"step": state.step, "shard": str(dataset.shard_of(damage.block))}
                file.write(json.dumps({**damage._asdict(), **place}) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return every


def known_damage(run_dir: Path, state: TrainState, world: World) -> TrainState:
    """The state with all that earlier jobs have passed over. Collective."""
    found: list[Damage] = []
    path = run_dir / DAMAGE_FILE
    if world.is_main and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        values = [json.loads(line) for line in lines if line.endswith("\n")]
        found = [Damage(value["lane"], value["window"], value["block"]) for value in values]
    found = world.broadcast(found)
    stream = commit(state.stream, state.stream.row, {}, found)
    return replace(state, stream=stream)
