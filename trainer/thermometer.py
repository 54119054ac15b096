"""Held-out losses and what guessing gives in, what a run has learnt so far out, in plain words. No torch.

A task is *better* than guessing where its held-out loss lies below the line of guessing, or with classes its
accuracy above, by more than the rows that were measured could show by accident. All numbers come from lines of
metrics.jsonl of kind "heldout", so `cloze status` says of a run what its own log said.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from data.chance import (
    BIGRAM,
    CONTEXT_FREE,
    NUM_CLASSES,
    OF_VOCABULARY,
    UNIGRAM,
    Chance,
)
from data.objectives import CAUSAL, TASKS, Mixture
from trainer.reference_curves import REFERENCE

Level = Literal["worse", "guessing", "better"]
Line = Mapping[str, Any]  # of metrics.jsonl

MARGIN = 0.01  # of the line of guessing tokens: the text's entropies are themselves estimates
# By how much all labels together are likelier under the model than under guessing. A model that knows nothing
# of them gets there in one evaluation of a thousand at most, whatever it predicts: the ratio of the two
# likelihoods has the mean 1 (Markov's inequality).
EVIDENCE_NATS = math.log(1000)
NUM_ERRORS = 3.0  # standard errors of an accuracy that are no accident


class Reading(NamedTuple):
    """Of one task, at one evaluation."""

    task: str
    level: Level
    words: str  # what the level means for this task
    loss: float
    accuracy: float
    num_labels: int
    line: Chance | None  # of guessing


def readings_of(line: Line) -> list[Reading]:
    """Of every task that was measured, in the order of TASKS. Nothing of lines of earlier versions."""
    return [reading_of(task, line) for task in TASKS if f"num_{task}_labels" in line]


def reading_of(task: str, line: Line) -> Reading:
    loss, accuracy = line[f"{task}_loss"], line[f"{task}_accuracy"]
    num_labels = line[f"num_{task}_labels"]
    lines = {
        name: Chance(*values) for name, values in line.get("guessing", {}).get(task, {}).items()
    }
    if not lines:
        return Reading(
            task, "guessing", "there is nothing to compare with", loss, accuracy, num_labels, None
        )
    guess = next(iter(lines.values()))
    margin = margin_nats(task, guess.loss_nats, num_labels)
    better = loss < guess.loss_nats - margin or (
        task in NUM_CLASSES and _is_right_more_often(accuracy, guess, num_labels)
    )
    worst = lines.get(UNIGRAM, guess).loss_nats
    level: Level = "better" if better else "worse" if loss > worst + margin else "guessing"
    return Reading(task, level, _words(task, level, loss, lines), loss, accuracy, num_labels, guess)


def margin_nats(task: str, line_nats: float, num_labels: int) -> float:
    """How far below a line of guessing a loss over so many labels must lie to be below it."""
    least = MARGIN * line_nats if task in OF_VOCABULARY else 0.0
    return max(least, EVIDENCE_NATS / max(1, num_labels))


def _is_right_more_often(accuracy: float, guess: Chance, num_labels: int) -> bool:
    if guess.accuracy is None or not num_labels:
        return False
    error = math.sqrt(guess.accuracy * (1 - guess.accuracy) / num_labels)
    return accuracy > guess.accuracy + NUM_ERRORS * error


def _words(task: str, level: Level, loss: float, lines: Mapping[str, Chance]) -> str:
    if task in OF_VOCABULARY:
        if level == "worse":
            return "not yet as good as guessing frequent words"
        if level == "guessing":
            return "not yet better than guessing frequent words"
        if task in CAUSAL and BIGRAM in lines and loss < lines[BIGRAM].loss_nats:
            return "knows more than the word before tells"
        return "uses context" if CONTEXT_FREE in lines or task in CAUSAL else "better than guessing"
    return {
        "worse": "worse than guessing",
        "guessing": "not yet better than guessing",
        "better": "better than guessing",
    }[level]


def losses_text(line: Line) -> list[str]:
    """'mlm 5.9753 (16.0% right)' of every task of a line, of training or of an evaluation."""
    found = []
    for task in TASKS:
        if f"{task}_loss" in line:
            right = line.get(f"{task}_accuracy")
            share = f" ({right:.1%} right)" if right is not None else ""
            found.append(f"{task} {line[f'{task}_loss']:.4f}{share}")
    return found


def sentence(readings: Sequence[Reading]) -> str:
    """'mlm uses context (6.350 by guessing); nsp not yet better than guessing (0.602 by guessing)'."""
    return "; ".join(
        f"{reading.task} {reading.words}"
        + ("" if reading.line is None else f" ({reading.line.loss_nats:.3f} by guessing)")
        for reading in readings
    )


def reference_band(task: str, num_tokens: float, guess_nats: float) -> tuple[float, float] | None:
    """Lowest and highest loss of our own runs after so many tokens of the task; None where there were none.

    Between two marks the logarithm of the tokens is interpolated; a mark is (tokens, lowest, highest), as
    shares of the loss of guessing, so that runs of other vocabularies can be compared.
    """
    marks = REFERENCE.get(task, ())
    if not marks or not marks[0][0] <= num_tokens <= marks[-1][0]:
        return None
    for (left, *low), (right, *high) in itertools.pairwise(marks):
        if num_tokens <= right:
            part = math.log(num_tokens / left) / math.log(right / left)
            lowest, highest = (a + part * (b - a) for a, b in zip(low, high, strict=True))
            return lowest * guess_nats, highest * guess_nats
    return marks[0][1] * guess_nats, marks[0][2] * guess_nats


def tokens_of_task(task: str, mixture: Mixture, num_tokens: float) -> float:
    """Of so many tokens of a run, those in rows that ask the task."""
    own = sum(
        weight
        for recipe, weight in zip(mixture.recipes, mixture.weights, strict=True)
        if task in recipe.tasks
    )
    return num_tokens * own / sum(mixture.weights)
