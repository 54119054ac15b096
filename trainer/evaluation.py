"""An engine and held-out rows in, losses and accuracies over all of them out."""

import math

import torch
import torch.distributed as dist

from data.batch import evaluation_batches
from data.shards import Dataset
from model.heads import Losses
from trainer.stretch import Stretch
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
    totals = torch.zeros(len(Losses._fields), dtype=torch.float64, device=world.device)
    engine.eval()
    with torch.no_grad():
        for batch, counts in evaluation_batches(
            dataset, stretch.settings.data, stretch.reader, num_rows
        ):
            losses = engine(**batch.model_inputs(world.device))
            totals += stack(losses) * counts
    engine.train()
    if world.size > 1:
        dist.all_reduce(totals)
    return averages(totals)


def stack(losses: Losses) -> torch.Tensor:
    """float64 [6], in the order of Losses."""
    return torch.stack([value.detach().to(torch.float64) for value in losses])


def averages(totals: torch.Tensor) -> dict[str, float]:
    """Mean losses and accuracies from summed Losses; nothing is reported of what did not occur."""
    sums = dict(zip(Losses._fields, totals.tolist(), strict=True))
    result = {}
    if sums["num_masked"]:
        result["mlm_loss"] = sums["mlm_loss_sum"] / sums["num_masked"]
        result["mlm_accuracy"] = sums["num_mlm_correct"] / sums["num_masked"]
    if sums["num_pairs"]:
        result["nsp_loss"] = sums["nsp_loss_sum"] / sums["num_pairs"]
        result["nsp_accuracy"] = sums["num_nsp_correct"] / sums["num_pairs"]
    if result:
        result["loss"] = result.get("mlm_loss", 0.0) + result.get("nsp_loss", 0.0)
    return result
