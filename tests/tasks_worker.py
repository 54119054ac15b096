"""A rank of tests/test_model_tasks_zero.py: all tasks, each rank with others in its micro-batches; and a twin.

python -m torch.distributed.run --nproc-per-node 2 tests/tasks_worker.py FOLDER STAGE...
"""

import json
import sys
from pathlib import Path

import torch
from optimizer_worker import deepspeed_of
from test_model_tasks import ALL_TASKS, BATCH, BERT, VOCAB, Batch, emptied

from model.heads import TaskLoss
from model.weights import build, build_empty, fresh_weights
from trainer.engine import (
    NamedState,
    build_engine,
    gradient_norm,
    set_accumulation,
    start_world,
    step,
    stop_world,
)
from trainer.optim import parameter_groups
from trainer.optim_config import OptimConfig
from trainer.world import World

RANKS, STEPS, MICRO_BATCHES = 2, 4, 2
OPTIM = OptimConfig(learning_rate=1e-3, eps=1e-3, clip_norm=1e9)


def batch_of(rank: int, number: int) -> Batch:
    """Of a rank's micro-batch: other tasks on either rank, and every fourth time none at all on one of them."""
    if number % 4 == 3 and rank == 0:
        return emptied(BATCH, *ALL_TASKS)
    left_out = [
        task
        for place, task in enumerate(ALL_TASKS)
        if (place // 2 + rank + number) % 2  # rtd and its generator are neighbours
        and not (task == "mlm" and number % 4 == 0)
    ]
    return emptied(BATCH, *left_out)


def counts_of(first: int) -> dict[str, int]:
    """Labels of a step, over ranks and micro-batches."""
    batches = [batch_of(r, first + m) for r in range(RANKS) for m in range(MICRO_BATCHES)]
    return {t: sum(len(batch["targets"][t][1]) for batch in batches) for t in ALL_TASKS}


def objective(losses: dict[str, TaskLoss], counts: dict[str, int]) -> torch.Tensor:
    parts = [loss.loss_sum / max(1, counts[task]) for task, loss in losses.items()]
    return torch.stack(parts).sum()


def seed(rank: int, number: int) -> None:
    torch.manual_seed(100 * number + rank)


def in_ranks(stage: str, world: World) -> tuple[list[float], list[float], NamedState]:
    """Losses and gradient norms of each step."""
    deepspeed = deepspeed_of(f"zero{stage}", "fp32", OPTIM)
    weights = fresh_weights(BERT, VOCAB, seed=3)
    engine = build_engine(build_empty(BERT, VOCAB), weights, OPTIM, deepspeed, world.device)
    losses, norms = [], []
    for first in range(0, STEPS * MICRO_BATCHES, MICRO_BATCHES):
        counts, summed = counts_of(first), torch.zeros(())
        for number in range(MICRO_BATCHES):
            set_accumulation(engine, number, MICRO_BATCHES)
            seed(world.rank, first + number)
            loss = objective(engine(**batch_of(world.rank, first + number)), counts)
            engine.backward(loss * world.size, scale_wrt_gas=False)
            step(engine)
            summed += loss.detach()
        torch.distributed.all_reduce(summed)
        losses.append(summed.item())
        norms.append(gradient_norm(engine))
    return losses, norms, NamedState(engine)


def in_one_process() -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    model = build(BERT, VOCAB, seed=3)
    groups = parameter_groups(model.named_parameters(), OPTIM)
    adam = torch.optim.AdamW(
        groups, lr=OPTIM.learning_rate, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps
    )
    losses, norms = [], []
    for first in range(0, STEPS * MICRO_BATCHES, MICRO_BATCHES):
        counts, summed = counts_of(first), 0.0
        for number in range(first, first + MICRO_BATCHES):
            for rank in range(RANKS):
                seed(rank, number)
                loss = objective(model(**batch_of(rank, number)), counts)
                loss.backward()
                summed += loss.item()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        adam.step()
        adam.zero_grad()
        losses.append(summed)
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def main(output: Path, stages: list[str]) -> None:
    torch.set_num_threads(1)
    world = start_world()
    want_losses, want_norms, want = in_one_process()
    before = dict(fresh_weights(BERT, VOCAB, seed=3))
    found = {"losses": want_losses, "norms": want_norms}
    for stage in stages:
        losses, norms, named = in_ranks(stage, world)
        errors = {
            name: float((named.get(name, "master") - value).norm() / (value - before[name]).norm())
            for name, value in want.items()
        }
        found[stage] = {"losses": losses, "norms": norms, "errors": errors}
    (output / f"rank{world.rank}.json").write_text(json.dumps(found))
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
