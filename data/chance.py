"""A task and what a dataset's manifest says in, the loss and the accuracy of guessing out: pure numbers.

A loss above these lines shows that nothing of the task has been learnt; below, that something has.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from data.objectives import CAUSAL, MASKED, NUM_PARTS

REWRITTEN = ("word_order", "rtd_generator")  # the slot shows [MASK], or some other token
CLASSES = {
    "nsp": 2,
    "sop": 2,
    "order": 3,
    "distance": 3,
    "reorder": NUM_PARTS,
}  # equally likely
RETRIEVAL = ("contrastive", "cpc")  # one of so many candidates


class Chance(NamedTuple):
    """What guessing gives. accuracy: None where the manifest does not tell."""

    loss_nats: float
    accuracy: float | None


def chance_lines(
    task: str,
    manifest: Mapping[str, Any],
    *,
    num_candidates: int | None = None,
    replaced_share: float | None = None,
) -> dict[str, Chance]:
    """Every line that a task's curve is compared with, by name; the first is that of guessing.

    manifest: of the dataset, of which tasks on tokens take what they need; lines of which it says nothing
    (datasets of earlier versions) are left out
    num_candidates: of contrastive and cpc, the partner among them
    replaced_share: of rtd, the share of tokens that are not the text's

    ValueError for an unknown task, and where one of the two is missing or not in its range.
    """
    if task in MASKED:
        names = {"context free": ("context_free_loss_nats", "context_free_accuracy")}
    elif task in REWRITTEN:
        names = {"unigram": ("unigram_entropy_nats", "unigram_accuracy")}
    elif task in CAUSAL:
        names = {
            "unigram": ("unigram_entropy_nats", "unigram_accuracy"),
            "bigram": ("bigram_entropy_nats", ""),  # how often its guess is right is not counted
        }
    else:
        return {"chance": _chance(task, num_candidates, replaced_share)}
    return {
        line: Chance(manifest[loss], manifest.get(accuracy))
        for line, (loss, accuracy) in names.items()
        if loss in manifest
    }


def _chance(task: str, num_candidates: int | None, replaced_share: float | None) -> Chance:
    if task in CLASSES:
        return _of_classes([1.0] * CLASSES[task])
    if task == "relative":
        return _of_classes(relative_weights(NUM_PARTS))
    if task == "rtd":
        if replaced_share is None or not 0 <= replaced_share <= 1:
            raise ValueError(f"rtd needs the share of replaced tokens, in [0, 1]: {replaced_share}")
        return _of_classes([replaced_share, 1 - replaced_share])
    if task in RETRIEVAL:
        if num_candidates is None or num_candidates < 1:
            raise ValueError(f"{task} needs the number of candidates, from 1 on: {num_candidates}")
        return Chance(math.log(num_candidates), 1 / num_candidates)
    known = (*MASKED, *REWRITTEN, *CAUSAL, *CLASSES, "relative", "rtd", *RETRIEVAL)
    raise ValueError(f"task {task!r} is none of {', '.join(known)}")


def relative_weights(num_parts: int) -> list[float]:
    """How often two of so many shuffled parts were d apart, for d of -(n-1)..n-1 without 0: n - |d|."""
    distances = range(1 - num_parts, num_parts)
    return [float(num_parts - abs(distance)) for distance in distances if distance]


def _of_classes(weights: list[float]) -> Chance:
    """Entropy of the classes, and the share of the most frequent one."""
    shares = [weight / math.fsum(weights) for weight in weights]
    return Chance(-math.fsum(p * math.log(p) for p in shares if p > 0) + 0.0, max(shares))
