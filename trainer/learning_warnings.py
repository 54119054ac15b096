"""A run's evaluations in, what is wrong with its curves and what likely causes it out, in plain words."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from data.chance import NUM_CLASSES
from trainer.thermometer import Line, Reading, reading_of, readings_of

Kind = Literal["stuck", "lost", "by heart", "too good"]

BY_HEART = 0.1  # of the held-out loss: how far below it the training loss lies
TOO_GOOD = 0.5  # of our own runs' lowest loss after as much text
IN_ORDER = 0.95  # bigram entropy over unigram entropy: 0.7 in running text, 1 in shuffled words
LOST = 0.05  # of the line of guessing: how far a loss has risen from its lowest
NO_BETTER = 0.99  # of the line of guessing: where our own runs, too, had learnt nothing
UNMOVED = 0.02  # of a loss: it changes as much in a few steps of any rate that trains
LARGE_GRADIENT = 10.0  # before clipping
FEW_LABELS = 200  # of which an evaluation tells little


class Evidence(NamedTuple):
    """What tells why a curve sticks."""

    manifest: Mapping[str, Any]  # of the dataset
    train: Line  # what was logged of training last; empty before

    @property
    def learning_rate(self) -> float:
        return self.train.get("learning_rate", math.nan)

    @property
    def grad_norm(self) -> float:
        return self.train.get("grad_norm", math.nan)

    @property
    def num_skipped_steps(self) -> int:
        return self.train.get("num_skipped_steps", 0)


class Warning(NamedTuple):
    kind: Kind
    task: str
    message: str
    is_explained: bool = True


def warnings_of(
    history: Sequence[Line], evidence: Evidence, *, warmup_steps: int, stuck_after_steps: int
) -> list[Warning]:
    """history: evaluations, oldest first; the last is judged. Two in a row must say so before a curve is stuck.

    stuck_after_steps: after warm-up, or the task's first evaluation if that was later; 0: none is ever stuck
    """
    found = []
    for reading in readings_of(history[-1]):
        own = [line for line in history if f"num_{reading.task}_labels" in line]
        levels = [reading_of(reading.task, line).level for line in own]
        trained = own[-1]["step"] - max(warmup_steps, own[0]["step"])
        if reading.line is None or len(own) < 2:
            continue
        said = (
            f"{reading.loss:.3f} nats after {trained:,} steps, {reading.words} "
            f"({reading.line.loss_nats:.3f} by guessing)"
        )
        if "better" not in levels[-2:]:
            lowest = min(line[f"{reading.task}_loss"] for line in own)
            risen = reading.loss > lowest + LOST * reading.line.loss_nats
            if levels.count("better") > 1 and risen:
                causes = [_rate_too_high(evidence), "or a phase has changed the text"]
                said = f"{said}, and it had been better. {'; '.join(causes)}"
                found.append(Warning("lost", reading.task, said))
            elif stuck_after_steps and trained >= stuck_after_steps:
                causes = "; ".join(causes_of_sticking(reading, own, evidence))
                said += f". Likely cause: {causes}" if causes else ""
                found.append(Warning("stuck", reading.task, said, is_explained=bool(causes)))
        found += _suspicious(reading, own)
    return found


def causes_of_sticking(reading: Reading, own: Sequence[Line], evidence: Evidence) -> Iterator[str]:
    """What is known to be unusual. own: evaluations of the task, oldest first."""
    first = own[0][f"{reading.task}_loss"]
    moved = abs(first - reading.loss) / first
    if reading.level == "worse" and moved < UNMOVED:
        yield (
            f"the loss has moved by {moved:.1%} since step {own[0]['step']:,}: the learning rate, "
            f"{evidence.learning_rate:.2e}, is far too low, or the weights are not trained at all"
        )
    elif evidence.num_skipped_steps or evidence.grad_norm > LARGE_GRADIENT:
        yield _rate_too_high(evidence)
    unigram, bigram = (
        evidence.manifest.get(f"{name}_entropy_nats") for name in ("unigram", "bigram")
    )
    if unigram and bigram and bigram > IN_ORDER * unigram:
        yield (
            f"the word before tells next to nothing of a word (bigram entropy {bigram:.2f}, unigram "
            f"entropy {unigram:.2f} nats): the words of this text are in no order"
        )
    band = own[-1].get("reference", {}).get(reading.task)
    if band and reading.line and band[0] > NO_BETTER * reading.line.loss_nats:
        yield "our own runs were no better after as much text: it takes more"
    if reading.task in NUM_CLASSES and reading.num_labels < FEW_LABELS:
        yield (
            f"there are only {reading.num_labels:,} held-out labels: documents of one sentence and blocks of "
            "few documents give no pairs, or eval_rows is small"
        )


def _rate_too_high(evidence: Evidence) -> str:
    return (
        f"the learning rate, {evidence.learning_rate:.2e}, is likely too high (gradient norm "
        f"{evidence.grad_norm:.3g}, {evidence.num_skipped_steps:,} steps skipped): try a third of it"
    )


def _suspicious(reading: Reading, own: Sequence[Line]) -> Iterator[Warning]:
    """Losses that are too low to be true."""
    task = reading.task
    band = own[-1].get("reference", {}).get(task)
    if band and reading.loss < TOO_GOOD * band[0]:
        yield Warning(
            "too good",
            task,
            f"{reading.loss:.3f} nats, and none of our own runs was below {band[0]:.3f} after as much text: "
            "the text repeats itself, or tells the answer",
        )
    gaps = [gap for line in own if (gap := _gap_to_training(task, line)) is not None]
    # sources may weigh otherwise in training than among held-out rows, from the beginning on
    if gaps and min(gaps[-2:]) > max(0.0, gaps[0]) + BY_HEART:
        trained = own[-1]["train"][f"{task}_loss"]
        yield Warning(
            "by heart",
            task,
            f"{trained:.3f} nats on training text, {reading.loss:.3f} on held-out text: it learns by heart. "
            "Too many epochs, copies in the text, or held-out text unlike the rest",
        )


def _gap_to_training(task: str, line: Line) -> float | None:
    """How far below the held-out loss that of training lay, as a share of it; None: not known."""
    trained, heldout = line.get("train", {}).get(f"{task}_loss"), line[f"{task}_loss"]
    return None if trained is None or not heldout else (heldout - trained) / heldout
