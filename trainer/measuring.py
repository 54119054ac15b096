"""A model and held-out text in, what it makes of every source of it out. No engine, no other process."""

# K copies of one piece, N slots of each, D hidden

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from data.chance import asked_of
from data.collate import Batch
from data.objectives import CAUSAL, MASKED, TASKS
from model.pretraining import ForPreTraining
from model.tasks import TASKS as MODEL_TASKS
from trainer.task_losses import Totals, stack

OF_TOKENS = (*MASKED, *CAUSAL, "word_order")  # tasks that have a perplexity


@dataclass
class Sums:
    """Of one source's batches; sums of two add up."""

    num_rows: int = 0
    num_tokens: int = 0  # filled slots
    totals: Totals = field(default_factory=lambda: Totals.zeros(TASKS))
    asked: dict[str, np.ndarray] = field(default_factory=dict)  # of `data.chance.asked_of`

    def add(self, other: "Sums") -> None:
        self.num_rows += other.num_rows
        self.num_tokens += other.num_tokens
        places = [self.totals.tasks.index(task) for task in other.totals.tasks]
        self.totals.sums[places] += other.totals.sums.to(self.totals.sums.device)
        for task, counts in other.asked.items():
            self.asked[task] = self.asked.get(task, 0) + counts

    def values(self) -> dict[str, float]:
        """Counts, mean losses in nats, accuracies in 0..1, and the perplexity of the masked tokens."""
        found: dict[str, float] = {"num_rows": self.num_rows, "num_tokens": self.num_tokens}
        counts = zip(self.totals.tasks, self.totals.sums[:, 1].tolist(), strict=True)
        found |= {f"num_{task}_labels": int(count) for task, count in counts if count}
        found |= self.totals.averages({})
        found |= {
            f"{task}_perplexity": exp(found[f"{task}_loss"])
            for task in OF_TOKENS
            if f"{task}_loss" in found
        }
        return found


def measure(
    model: ForPreTraining,
    batches: Iterable[tuple[str, Batch]],
    device: torch.device,
    *,
    missing: Iterable[str] = (),
) -> Iterator[tuple[str, Sums]]:
    """(source, sums) of each batch, in order. The sums stay on the device.

    missing: names of weights that the model does not have; nothing is measured of their heads.
    """
    wanted = tasks_with_heads(model.config.tasks, missing)
    for number, (source, batch) in enumerate(batches):
        inputs = batch.model_inputs(device)
        inputs["targets"] = {
            task: _target(inputs["targets"].get(task) if task in wanted else None, task, device)
            for task in model.config.tasks
        }
        torch.manual_seed(number)  # what a generator replaces is drawn, the same every time
        with torch.no_grad():
            losses = stack(model(**inputs))
        yield (
            source,
            Sums(
                len(batch.input_ids),
                batch.num_tokens,
                Totals(model.config.tasks, losses),
                {task: counts for task, counts in asked_of(batch).items() if task in wanted},
            ),
        )


def tasks_with_heads(tasks: Iterable[str], missing: Iterable[str]) -> list[str]:
    """Those of whose head no weight is missing."""
    heads = {name.partition(".")[0] for name in missing}
    return [task for task in tasks if MODEL_TASKS[task].head not in heads]


def _target(
    given: tuple[torch.Tensor, torch.Tensor] | None, task: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """As given, or nothing asked."""
    if given is not None:
        return given
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    two = MODEL_TASKS[task].index_width == 2
    return (labels.view(0, 2) if two else labels), labels


@dataclass(frozen=True)
class Specials:
    """Ids of the tokens that a piece of text is dressed in."""

    cls_id: int
    sep_id: int
    mask_id: int


@torch.no_grad()
def pseudo_log_likelihood(
    model: ForPreTraining,
    tokens: np.ndarray,
    specials: Specials,
    device: torch.device,
    *,
    slots_at_once: int,
) -> float:
    """Nats: the sum over tokens of log p(token | all others) in [CLS] tokens [SEP] (Salazar et al. 2020, 2.1).

    tokens: ids [n]; n + 2 is at most the model's longest row. Each token is masked in a copy of its own, and
    copies are computed `slots_at_once // (n + 2)` at a time, at least one.
    """
    framed = [specials.cls_id, *tokens.tolist(), specials.sep_id]
    ids_N = torch.tensor(framed, dtype=torch.int64, device=device)
    length = len(framed)
    copies = max(1, slots_at_once // length)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for place_K in torch.arange(1, length - 1, device=device).split(copies):
        copy_K = torch.arange(len(place_K), device=device)
        ids_KN = ids_N.repeat(len(place_K), 1)
        ids_KN[copy_K, place_K] = specials.mask_id
        zeros_KN = torch.zeros_like(ids_KN)
        positions_KN = torch.arange(length, device=device).expand_as(ids_KN)
        hidden_KND = model.encode(ids_KN, zeros_KN, positions_KN, zeros_KN)
        scores = model.mlm_logits(hidden_KND[copy_K, place_K]).float().log_softmax(-1)
        total += scores[copy_K, ids_N[place_K]].sum(dtype=torch.float64)
    return float(total)


def exp(nats: float) -> float:
    """Of a loss; infinite where no number is large enough."""
    return math.exp(nats) if nats < 700 else math.inf
