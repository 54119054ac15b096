"""Losses of micro-batches in, the loss that is minimised, and what is reported of each task, out."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from data.collate import Batch
from model.config import ModelConfig
from model.flops import Encoded, attended_pairs, flops_per_step
from model.heads import TaskLoss

# Of the replaced-token detection, Clark et al. 2020 (appendix A): its loss is small beside the generator's.
DEFAULT_LOSS_WEIGHTS = {"rtd": 50.0}


class Totals(NamedTuple):
    """Sums over micro-batches, ranks and steps. Tensors are float64 [number of tasks, 3]."""

    tasks: tuple[str, ...]
    sums: torch.Tensor  # loss in nats, labels, labels that were right

    @classmethod
    def zeros(cls, tasks: tuple[str, ...], device: torch.device | str = "cpu") -> "Totals":
        return cls(tasks, torch.zeros(len(tasks), 3, dtype=torch.float64, device=device))

    def averages(self, loss_weights: Mapping[str, float]) -> dict[str, float]:
        """Mean loss and accuracy of each task, and their weighted sum; nothing of a task that did not occur."""
        result = {}
        for task, (loss, count, correct) in zip(self.tasks, self.sums.tolist(), strict=True):
            if count:
                result[f"{task}_loss"] = loss / count
                result[f"{task}_accuracy"] = correct / count
        if result:
            result["loss"] = sum(
                loss_weight(loss_weights, task) * result.get(f"{task}_loss", 0.0)
                for task in self.tasks
            )
        return result


def stack(losses: Mapping[str, TaskLoss]) -> torch.Tensor:
    """float64 [number of tasks, 3], as of Totals.sums."""
    values = [value.detach().to(torch.float64) for loss in losses.values() for value in loss]
    return torch.stack(values).view(-1, 3)


def loss_weight(loss_weights: Mapping[str, float], task: str) -> float:
    """As given, or the published one."""
    return loss_weights.get(task, DEFAULT_LOSS_WEIGHTS.get(task, 1.0))


def objective(
    losses: Mapping[str, TaskLoss],
    num_labels: Mapping[str, int],
    loss_weights: Mapping[str, float],
) -> torch.Tensor:
    """This micro-batch's part of the step's loss: for each task the mean over *all* of its labels, weighted.

    num_labels: of the whole step, over micro-batches and ranks. A mean of micro-batch means would weigh labels
    by how many others share their micro-batch, and the curve would depend on world size and accumulation.
    """
    parts = [
        loss.loss_sum * loss_weight(loss_weights, task) / max(1, num_labels[task])
        for task, loss in losses.items()
    ]
    return torch.stack(parts).sum()


def count_flops(model: ModelConfig, vocab_size: int, batches: list[Batch]) -> int:
    """Of the forward and backward pass of these batches (`model.flops`)."""
    lengths = np.concatenate([batch.sequence_lengths for batch in batches])
    labels = {task: sum(batch.num_labels[task] for batch in batches) for task in model.tasks}
    again = {}
    for task in ("rtd", "contrastive"):
        if task in model.tasks:
            again[task] = _encoded(
                model, np.concatenate([_lengths_of_rows_with(batch, task) for batch in batches])
            )
    everything = _encoded(model, lengths)
    return flops_per_step(
        model,
        vocab_size,
        num_tokens=everything.num_tokens,
        num_attended=everything.num_attended,
        num_labels=labels,
        again=again,
    )


def _encoded(model: ModelConfig, lengths: np.ndarray) -> Encoded:
    attended = {window: attended_pairs(lengths, window) for window in model.windows}
    return Encoded(int(lengths.sum()), attended)


def _lengths_of_rows_with(batch: Batch, task: str) -> np.ndarray:
    rows = torch.unique(batch.targets[task].slots // batch.input_ids.shape[1]).numpy()
    return batch.sequence_lengths[np.isin(batch.sequence_rows, rows)]
