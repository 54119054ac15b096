"""A run that has gone astray in, the state it goes on from out: the weights of a good checkpoint, other rows.

The rows between the checkpoint and the place it has reached are passed over, for they may be what led astray
(Chowdhery et al. 2022, PaLM, 5.1). `trainer.jumps` remembers.
"""

import json
import os
from pathlib import Path

from trainer.checkpoint import newest_valid, restore
from trainer.checkpoint_files import list_checkpoints, step_of
from trainer.config import RunConfig
from trainer.engine import NamedState
from trainer.exit_status import Diverged
from trainer.files import remove_folder
from trainer.jumps import REWINDS_FILE, Jump, read_jumps
from trainer.state import TrainState
from trainer.world import World


def go_back(
    run: RunConfig,
    state: TrainState,
    first_bad_step: int,
    message: str,
    named: NamedState,
    world: World,
) -> tuple[TrainState, str]:
    """The state of the newest checkpoint from before `first_bad_step` (from 1), and what to tell. Collective.

    state: complete, as `merged` gives it. Newer checkpoints are deleted. Diverged where there is none to
    go back to, or the run has gone back there `max_rewinds` times.
    """
    run_dir = Path(run.dir)
    found = newest_valid(run_dir, world, before=first_bad_step - 1)
    if found is None:
        raise Diverged(f"{message}. No checkpoint from before step {first_bad_step} is there")
    step = step_of(found)
    earlier = world.broadcast(
        sum(jump.step == step for jump in read_jumps(run_dir)) if world.is_main else 0
    )
    if earlier >= run.guard.max_rewinds:
        raise Diverged(
            f"{message}. The run went back to step {step} for this {earlier} times already: lower "
            "optim.learning_rate or raise optim.warmup_steps, or look at the rows with `cloze blame`"
        )
    restored = restore(found, named)
    if restored.phases[-1].differences(state.phases[-1]):
        raise Diverged(f"{message}. A phase began since the checkpoint of step {step}")
    if world.is_main:
        _write(run_dir, Jump(step, state.stream, state.step, message))
        for newer in list_checkpoints(run_dir):
            if step_of(newer) > step:
                remove_folder(newer)
    rows = state.stream.row - restored.stream.row
    return restored, f"{message}. Back to {found.name}; its next {rows} rows are passed over"


def _write(run_dir: Path, jump: Jump) -> None:
    with (run_dir / REWINDS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({**jump._asdict(), "stream": jump.stream.to_json()}) + "\n")
        file.flush()
        os.fsync(file.fileno())
