"""An engine and held-out rows in, losses and accuracies over all of them out."""

import math

import torch
import torch.distributed as dist

from data.batch import evaluation_batches
from data.hashing import stable_hash64
from data.shards import Dataset
from trainer.stretch import Stretch
from trainer.task_losses import Totals, stack
from trainer.world import World

CHANCE_NSP_LOSS = math.log(2)  # of a coin flip


def evaluate(
    engine: torch.nn.Module,
    dataset: Dataset,
    stretch: Stretch,
    world: World,
    *,
    num_rows: int,
) -> dict[str, float]:
    """Held-out losses in nats and accuracies in 0..1, on the same rows and masks every time. Collective."""
    totals = Totals.zeros(stretch.settings.data.mixture.tasks, world.device)
    engine.eval()
    with torch.no_grad():
        batches = evaluation_batches(dataset, stretch.settings.data, stretch.reader, num_rows)
        for number, (batch, counts) in enumerate(batches):
            place = number * world.size + world.rank
            # what a generator replaces is drawn, the same every time
            torch.manual_seed(stable_hash64(stretch.reader.seed, "heldout", place) >> 1)
            losses = engine(**batch.model_inputs(world.device))
            totals.sums.add_(stack(losses) * counts)
    engine.train()
    if world.size > 1:
        dist.all_reduce(totals.sums)
    return totals.averages(stretch.settings.loss_weights)
