"""A rank of tests/test_trainer_optimizers.py: checkpoints of every optimizer, written here and read there.

write FOLDER ...                every optimizer at every ZeRO stage: a checkpoint, and what comes after; then
read FOLDER OUTPUT FROM-TO,... each, from one stage to another: what differs from what was written, and came
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from optimizer_worker import ADAMW, BERT, LAMB, MUON, VOCAB, deepspeed_of
from test_model_bert import packed_batch, total

from data.lanes import StreamState
from model.weights import build_empty, fresh_weights
from trainer.checkpoint import copy_to_host, restore
from trainer.checkpoint_files import FORMAT
from trainer.checkpoint_write import write_part
from trainer.engine import (
    NamedState,
    build_engine,
    set_accumulation,
    start_world,
    step,
    stop_world,
)
from trainer.optim import state_numel
from trainer.optim_config import OptimConfig
from trainer.state import TrainState
from trainer.world import World

OPTIMIZERS = {"adamw": ADAMW, "lamb": LAMB, "muon": replace(MUON, ema_decay=0.9)}


def begin(optim: OptimConfig, stage: str, world: World) -> NamedState:
    """stage: of ds_configs/, as in "3" or "2_offload"."""
    deepspeed = deepspeed_of(f"zero{stage}", "fp32", optim)
    weights = fresh_weights(BERT, VOCAB, seed=3)
    return NamedState(
        build_engine(build_empty(BERT, VOCAB), weights, optim, deepspeed, world.device)
    )


def train(named: NamedState, steps: int) -> list[float]:
    batch = packed_batch([[9, 7, 4], [24], [5, 13]], row_length=24)
    found = []
    for _ in range(steps):
        set_accumulation(named.engine, 0, 1)
        losses = named.engine(**batch)
        loss = total(losses)
        named.engine.backward(loss, scale_wrt_gas=False)
        step(named.engine)
        found.append(loss.item())
    return found


def all_parts(named: NamedState) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{name}": named.get(name, part)
        for name in named.parameters
        for part in named.parts(name)
    }


def write(folder: Path, world: World) -> None:
    for name, optim in OPTIMIZERS.items():
        for stage in "0123":
            named = begin(optim, stage, world)
            train(named, 2)
            place = folder / f"{name}-{stage}"
            place.mkdir(exist_ok=True)
            host: dict[str, torch.Tensor] = {}
            copy_to_host(named, world, host)
            write_part(place, world.rank, world.size, host)
            state = TrainState(2, 0, 0, StreamState.start(1, 1)).to_json()
            settings = {"optim": {}, "phases": []}
            document = {
                "format": FORMAT,
                "optimizer_step": named.optimizer_step,
                "config": settings,
                **state,
            }
            saved = all_parts(named)
            after = {"losses": train(named, 3), "saved": saved, "parts": all_parts(named)}
            if world.is_main:
                (place / "state.json").write_text(json.dumps(document))
                torch.save(after, place / "after.pt")
            gc.collect()


def read(folder: Path, stages: list[str], world: World) -> dict[str, Any]:
    found = {}
    for name, optim in OPTIMIZERS.items():
        for written_at, _, read_at in (pair.partition("-") for pair in stages):
            named = begin(optim, read_at, world)
            place = folder / f"{name}-{written_at}"
            restore(place, named)
            expected = torch.load(place / "after.pt", weights_only=True)
            parts = all_parts(named)
            wrong = [key for key in parts if not torch.equal(parts[key], expected["saved"][key])]
            if parts.keys() != expected["saved"].keys() or named.optimizer_step != 2:
                wrong.append("names or step")
            losses, parts = train(named, 3), all_parts(named)
            found[f"{name} {written_at}-{read_at}"] = {
                "wrong": wrong,
                "loss": max(
                    abs(a - b) / b for a, b in zip(losses, expected["losses"], strict=True)
                ),
                "not_bitwise": [
                    k for k in parts if not torch.equal(parts[k], expected["parts"][k])
                ],
                "state": state_share(named, optim),
            }
            gc.collect()
    return found


def state_share(named: NamedState, optim: OptimConfig) -> float:
    """The optimizer's state, on all ranks together (stages 1 to 3), by what `trainer.memory` counts on."""
    kept = sum(
        value.numel()
        for state in named.base.state.values()
        for key, value in state.items()
        if key != "step"
    )
    total = torch.tensor([kept if named.stage else kept / dist.get_world_size()])
    dist.all_reduce(total)
    shapes = {name: named.shape(name) for name in named.parameters}
    return total.item() / state_numel(shapes, optim)


def main(mode: str, folder: Path, *arguments: str) -> None:
    torch.set_num_threads(1)
    world = start_world()
    if mode == "write":
        write(folder, world)
    output, stages = arguments
    found = read(folder, stages.split(","), world)
    if world.is_main:
        Path(output).write_text(json.dumps(found, indent=1))
    stop_world()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
