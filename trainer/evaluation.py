"""An engine and held-out rows in, losses and accuracies over all of them, and by source, out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from data.batch import evaluation_batches
from data.chance import Chance, asked_of, asked_width, chance_lines, num_asked
from data.hashing import stable_hash64
from data.shards import Dataset
from trainer.stretch import Stretch
from trainer.task_losses import Totals, stack
from trainer.world import World


class Measured(NamedTuple):
    """Of some held-out rows."""

    values: dict[str, float]  # losses in nats, accuracies in 0..1, labels of each task
    guessing: dict[str, dict[str, Chance]]  # of each task that was asked (`data.chance`)


class HeldOut(NamedTuple):
    together: Measured
    sources: dict[str, Measured]  # of each source that has held-out rows

    def as_json(self) -> dict[str, Any]:
        """A line of metrics.jsonl; sources only where there are several."""
        line: dict[str, Any] = {**self.together.values, "guessing": self.together.guessing}
        if len(self.sources) > 1:
            line["sources"] = {name: found.values for name, found in self.sources.items()}
        return line


def evaluate(
    engine: torch.nn.Module,
    dataset: Dataset,
    stretch: Stretch,
    world: World,
    *,
    num_rows: int,
) -> HeldOut:
    """On the same rows and masks every time. Collective."""
    tasks = stretch.settings.data.mixture.tasks
    losses = torch.zeros(
        len(dataset.sources), len(tasks), 3, dtype=torch.float64, device=world.device
    )
    widths = [asked_width(task) for task in tasks]
    asked = torch.zeros(len(dataset.sources), sum(widths), dtype=torch.float64)
    engine.eval()
    with torch.no_grad():
        batches = evaluation_batches(dataset, stretch.settings.data, stretch.reader, num_rows)
        for number, (source, batch, counts) in enumerate(batches):
            place = number * world.size + world.rank
            # what a generator replaces is drawn, the same every time
            torch.manual_seed(stable_hash64(stretch.reader.seed, "heldout", place) >> 1)
            found = stack(engine(**batch.model_inputs(world.device)))
            if counts:
                index = dataset.sources.index(source)
                losses[index] += found
                asked[index] += torch.from_numpy(np.concatenate(list(asked_of(batch).values())))
    engine.train()
    if world.size > 1:
        asked = asked.to(world.device)
        dist.all_reduce(losses)
        dist.all_reduce(asked)

    def measured(rows: slice, source: str | None) -> Measured:
        """Of these sources; source: the only one, or None."""
        values = Totals(tasks, losses[rows].sum(0)).averages(stretch.settings.loss_weights)
        counts = np.split(asked[rows].sum(0).cpu().numpy(), np.cumsum(widths)[:-1])
        by_task = dict(zip(tasks, counts, strict=True))
        values |= {
            f"num_{task}_labels": n for task in tasks if (n := num_asked(task, by_task[task]))
        }
        return Measured(values, guessing_of(values, by_task, dataset.manifest, source))

    return HeldOut(
        measured(slice(None), None),
        {
            name: measured(slice(index, index + 1), name)
            for index, name in enumerate(dataset.sources)
            if asked[index].any()
        },
    )


def guessing_of(
    values: Mapping[str, float],
    asked: Mapping[str, np.ndarray],
    manifest: Mapping[str, Any],
    source: str | None = None,
) -> dict[str, dict[str, Chance]]:
    """What the measured values are compared with, of every task that was asked (`data.chance.chance_lines`)."""
    right = values.get("rtd_generator_accuracy", 0.0)
    lines = {
        task: chance_lines(task, manifest, asked, source=source, generator_accuracy=right)
        for task in asked
    }
    return {task: found for task, found in lines.items() if found}
