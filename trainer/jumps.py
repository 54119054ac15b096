"""Where rewinds have moved a run's stream: RUN/rewinds.jsonl in, the stream at such a step out.

A job that continues from the checkpoint a run went back to, or from an earlier one, takes the same jump.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data.batch import commit
from data.lanes import StreamState
from trainer.state import TrainState
from trainer.world import World

REWINDS_FILE = "rewinds.jsonl"


class Jump(NamedTuple):
    """From `step` on, the stream goes on from another place."""

    step: int
    stream: StreamState
    reached_step: int  # when the run went back
    message: str


def read_jumps(run_dir: Path) -> list[Jump]:
    """All jumps so far, in the order in which they were decided on."""
    path = run_dir / REWINDS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    values = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut
    return [Jump(**{**v, "stream": StreamState.from_json(v["stream"])}) for v in values]


def known_jumps(run_dir: Path, world: World) -> dict[int, Jump]:
    """The last jump of each step that has one. Collective."""
    jumps = world.broadcast(read_jumps(run_dir) if world.is_main else [])
    return {jump.step: jump for jump in jumps}


def jump_at(jumps: dict[int, Jump], state: TrainState) -> TrainState:
    """The state with its stream where a rewind has put it, if it has: else as it is."""
    jump = jumps.get(state.step)
    if jump is None or jump.stream.row <= state.stream.row:
        return state
    stream = commit(jump.stream, jump.stream.row, {}, state.stream.damage)
    phase = replace(state.phases[-1], first_step=state.step, first_row=stream.row)
    return replace(state, stream=stream, phases=(*state.phases, phase))
