"""What rows ask of a task, and a dataset's manifest, in; loss and accuracy of guessing out: pure numbers.

A loss above these lines shows that nothing of the task has been learnt; below, that something has.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.objectives import CAUSAL, MASKED, NUM_PARTS, TASKS

if TYPE_CHECKING:
    from data.collate import Batch

REWRITTEN = ("word_order", "rtd_generator")  # the slot shows [MASK], or some other token
OF_VOCABULARY = (*MASKED, *CAUSAL, *REWRITTEN)  # which token?
NUM_CLASSES = {
    "nsp": 2, "sop": 2, "order": 3, "distance": 3, "reorder": NUM_PARTS, "relative": 2 * (NUM_PARTS - 1),
}  # fmt: skip
RETRIEVAL = ("contrastive", "cpc")  # one of so many candidates: the labels of a micro-batch
GUESSING = "guessing"  # the line of tasks with classes
CONTEXT_FREE, UNIGRAM, BIGRAM = "context free", "unigram", "bigram"

Asked = Mapping[
    str, np.ndarray
]  # task -> what `asked_of` gives of it; those of several batches add up


class Chance(NamedTuple):
    """What guessing gives. accuracy: None where the manifest does not tell."""

    loss_nats: float
    accuracy: float | None


def asked_width(task: str) -> int:
    """Numbers that `asked_of` gives of a task."""
    return 3 if task in RETRIEVAL else NUM_CLASSES.get(task, 1)


def asked_of(batch: "Batch") -> dict[str, np.ndarray]:
    """float64 [asked_width] of every task of a micro-batch.

    With classes: labels of each. contrastive, cpc: n, n ln n and n / n of its n labels. Else: labels.
    """
    found = {}
    for task, target in batch.targets.items():
        num_labels = len(target.labels)
        if task in NUM_CLASSES:
            counts = np.bincount(target.labels.numpy(), minlength=NUM_CLASSES[task])
        elif task in RETRIEVAL:
            counts = np.array(
                [num_labels, num_labels * math.log(max(1, num_labels)), num_labels > 0]
            )
        else:
            counts = np.array([num_labels])
        found[task] = counts.astype(np.float64)
    return found


def num_asked(task: str, counts: np.ndarray) -> int:
    """Labels of a task, of what `asked_of` gives of it."""
    return int(counts.sum() if task in NUM_CLASSES else counts[0])


def chance_lines(
    task: str,
    manifest: Mapping[str, Any],
    asked: Asked,
    *,
    generator_accuracy: float = 0.0,
    source: str | None = None,
) -> dict[str, Chance]:
    """Every line that a task's curve is compared with, by name; the first is that of guessing, if there is any.

    manifest: of the dataset, of which tasks on tokens take what they need; lines of which it says nothing
    (datasets of earlier versions) are left out
    asked: of the rows that the curve is measured on
    generator_accuracy: of rtd. A token that the generator has got right counts as the text's own, so the
    line falls as the generator learns. It is right more often than its samples are, so the line is a bit low
    source: that all of the rows are of; None: of the whole dataset

    ValueError for an unknown task. Nothing asked: no lines.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is none of {', '.join(TASKS)}")
    if not num_asked(task, asked[task]):
        return {}
    if task in OF_VOCABULARY:
        return _of_tokens(task, manifest, source)
    if task in NUM_CLASSES:
        return {GUESSING: _of_classes(asked[task])}
    if task in RETRIEVAL:
        num_labels, summed, num_batches = asked[task]
        return {GUESSING: Chance(float(summed / num_labels), float(num_batches / num_labels))}
    num_labels, num_hidden = (num_asked(name, asked[name]) for name in ("rtd", "rtd_generator"))
    replaced = num_hidden * (1 - generator_accuracy)
    return {GUESSING: _of_classes(np.array([replaced, num_labels - replaced]))}


def _of_tokens(task: str, manifest: Mapping[str, Any], source: str | None) -> dict[str, Chance]:
    if source is not None:  # of one source, its frequencies alone are known
        nats = manifest.get("source_unigram_entropy_nats", {}).get(source)
        return {} if nats is None else {UNIGRAM: Chance(nats, None)}
    lines = {
        CONTEXT_FREE: ("context_free_loss_nats", "context_free_accuracy"),
        UNIGRAM: ("unigram_entropy_nats", "unigram_accuracy"),
        BIGRAM: ("bigram_entropy_nats", ""),  # how often its guess is right is not counted
    }
    if task not in MASKED:  # where no slot shows its own token
        del lines[CONTEXT_FREE]
    if task not in CAUSAL:  # where the token before need not be seen
        del lines[BIGRAM]
    return {
        line: Chance(manifest[loss], manifest.get(accuracy))
        for line, (loss, accuracy) in lines.items()
        if loss in manifest
    }


def _of_classes(counts: np.ndarray) -> Chance:
    """Entropy of the classes, and the share of the most frequent one."""
    shares = counts[counts > 0] / counts.sum()
    return Chance(float(-(shares * np.log(shares)).sum()) + 0.0, float(shares.max()))
