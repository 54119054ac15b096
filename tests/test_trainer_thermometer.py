"""What a run has learnt so far, and what is wrong with its curves, of evaluations that are made up."""

import itertools
import math

import pytest

from data.objectives import read_mixture
from trainer import thermometer
from trainer.learning_warnings import Evidence, warnings_of
from trainer.thermometer import (
    margin_nats,
    readings_of,
    reference_band,
    sentence,
    tokens_of_task,
)

LINES = {
    "mlm": {"context free": [6.35, 0.13], "unigram": [6.96, 0.04]},
    "clm": {"unigram": [6.96, 0.04], "bigram": [4.96, None]},
    "nsp": {"guessing": [0.60, 0.71]},
    "contrastive": {"guessing": [3.4, 0.03]},
}
MANIFEST = {"unigram_entropy_nats": 6.96, "bigram_entropy_nats": 4.96}
TRAIN = {"learning_rate": 1e-4, "grad_norm": 1.2, "num_skipped_steps": 0}


def line(step: int, task: str, loss: float, accuracy: float = 0.0, labels: int = 10_000) -> dict:
    return {
        "step": step, f"{task}_loss": loss, f"{task}_accuracy": accuracy, f"num_{task}_labels": labels,
        "guessing": {task: LINES[task]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "loss", "accuracy", "labels", "words"),
    [
        ("mlm", 9.01, 0.0, 10_000, "not yet as good as guessing frequent words"),
        ("mlm", 6.60, 0.10, 10_000, "not yet better than guessing frequent words"),
        ("mlm", 6.32, 0.13, 10_000, "not yet better than guessing frequent words"),  # by a hair
        ("mlm", 5.96, 0.16, 10_000, "uses context"),
        ("mlm", 5.96, 0.16, 15, "not yet better than guessing frequent words"),  # an accident
        ("clm", 6.96, 0.10, 10_000, "not yet better than guessing frequent words"),
        ("clm", 5.50, 0.20, 10_000, "uses context"),
        ("clm", 4.50, 0.25, 10_000, "knows more than the word before tells"),
        ("nsp", 0.90, 0.50, 2_000, "worse than guessing"),
        ("nsp", 0.597, 0.71, 2_000, "not yet better than guessing"),
        ("nsp", 0.59, 0.71, 2_000, "better than guessing"),
        ("nsp", 0.50, 0.71, 2_000, "better than guessing"),  # surer, where it is right
        ("nsp", 0.62, 0.80, 2_000, "better than guessing"),  # right, and not sure of it
        ("contrastive", 3.398, 1.0, 2_000, "not yet better than guessing"),  # its views are alike
        ("contrastive", 1.38, 1.0, 2_000, "better than guessing"),
    ],
)
def test_a_reading(task: str, loss: float, accuracy: float, labels: int, words: str) -> None:
    (reading,) = readings_of(line(100, task, loss, accuracy, labels))
    assert reading.words == words
    guess = next(iter(LINES[task].values()))[0]
    assert sentence([reading]) == f"{task} {words} ({guess:.3f} by guessing)"


def test_random_guesses_are_better_by_accident_once_in_hundreds() -> None:
    """Coins and losses that know nothing of the labels, 400 times; seeds of its own."""
    import numpy as np

    draws = np.random.default_rng(0)
    words = []
    for _ in range(400):
        labels = draws.random(500) < 0.71
        share = labels.mean()
        guess = [
            float(-(share * math.log(share) + (1 - share) * math.log(1 - share))),
            float(share),
        ]
        guesses = draws.random(500) < 0.71
        sure = draws.uniform(0.6, 0.8, 500)  # of the first class
        loss = float(-np.log(np.where(labels, sure, 1 - sure)).mean())
        one = line(1, "nsp", loss, float((guesses == labels).mean()), 500)
        one["guessing"] = {"nsp": {"guessing": guess}}
        words += [reading.level for reading in readings_of(one)]
    assert words.count("better") <= 2


def test_evaluations_of_earlier_versions_are_passed_over() -> None:
    assert readings_of({"step": 5, "loss": 5.5, "mlm_loss": 4.9, "mlm_accuracy": 0.3}) == []


def judged(lines: list[dict], evidence: Evidence | None = None, **changes: int) -> list:
    settings = {"warmup_steps": 0, "stuck_after_steps": 300, **changes}
    return warnings_of(lines, evidence or Evidence(MANIFEST, TRAIN), **settings)


def curve(task: str, *losses: float, **more: float) -> list[dict]:
    return [line(100 * (n + 1), task, loss, **more) for n, loss in enumerate(losses)]


def test_a_curve_that_falls_is_never_warned_of() -> None:
    lines = curve("mlm", 9.0, 7.0, 6.9, 6.6, 6.2, 5.9, 5.7, 5.6)
    for end in range(1, len(lines) + 1):
        assert judged(lines[:end], stuck_after_steps=400) == []


def test_a_curve_that_sticks() -> None:
    lines = curve("mlm", 7.1, 6.97, 6.9, 6.9, 6.9)
    (warning,) = judged(lines)
    assert (warning.kind, warning.task) == ("stuck", "mlm")
    assert (
        "6.900 nats after 400 steps, not yet better than guessing frequent words" in warning.message
    )
    assert judged(lines, stuck_after_steps=0) == []
    assert judged(lines, warmup_steps=250) == []  # steps count from the end of warm-up
    assert judged(lines[:3]) == []


@pytest.mark.parametrize(
    ("loss", "train", "manifest", "cause"),
    [
        ((9.01, 9.01, 9.00, 9.00, 9.00), {}, {}, r"moved by 0.1% .* 1.00e-04, is far too low"),
        ((7.1, 7.0, 6.9, 6.9, 6.9), {"grad_norm": 55.0}, {}, r"1.00e-04, is likely too high .*55"),
        ((7.1, 7.0, 6.9, 6.9, 6.9), {"num_skipped_steps": 40}, {}, r"too high .*40 steps skipped"),
        ((7.1, 7.0, 6.9, 6.9, 6.9), {}, {"bigram_entropy_nats": 6.9}, r"words .* in no order"),
    ],
)
def test_likely_causes(loss: tuple, train: dict, manifest: dict, cause: str) -> None:
    import re

    evidence = Evidence({**MANIFEST, **manifest}, {**TRAIN, **train})
    (warning,) = judged(curve("mlm", *loss), evidence)
    assert re.search(f"Likely cause: .*{cause}", warning.message), warning.message


def test_too_few_pairs_are_a_likely_cause() -> None:
    (warning,) = judged(curve("nsp", 0.7, 0.6, 0.6, 0.6, 0.6, accuracy=0.71, labels=40))
    assert "only 40 held-out labels" in warning.message


def test_what_our_own_runs_had_not_learnt_either() -> None:
    lines = curve("nsp", 0.7, 0.6, 0.6, 0.6, 0.6, accuracy=0.71)
    lines[-1]["reference"] = {"nsp": [0.599, 0.604]}
    (warning,) = judged(lines)
    assert "our own runs were no better after as much text" in warning.message


def test_what_was_learnt_and_lost() -> None:
    lines = curve("mlm", 7.0, 5.9, 5.8, 7.2, 7.1)
    (warning,) = judged(lines, stuck_after_steps=0)
    assert (
        warning.kind == "lost" and "learning rate, 1.00e-04, is likely too high" in warning.message
    )
    assert judged(lines[:4], stuck_after_steps=0) == []  # one bad evaluation is none
    hovering = curve("nsp", 0.59, 0.59, 0.6, 0.6, accuracy=0.71)
    assert judged(hovering, stuck_after_steps=0) == []  # at the edge of what can be told


def test_learning_by_heart() -> None:
    """Measured from the gap at the beginning: held-out rows may be of harder sources."""
    lines = curve("mlm", 7.0, 6.0, 5.6, 5.5)
    for evaluation, trained in zip(lines, (6.0, 5.1, 4.7, 3.5), strict=True):
        evaluation["train"] = {"mlm_loss": trained}
    assert judged(lines) == []  # one evaluation is no proof
    lines[-2]["train"]["mlm_loss"] = 3.7
    (warning,) = judged(lines)
    assert warning.kind == "by heart" and "3.500 nats on training text, 5.500" in warning.message


def test_too_good_to_be_true() -> None:
    lines = curve("mlm", 6.0, 2.0)
    lines[-1]["reference"] = {"mlm": [6.1, 6.6]}
    (warning,) = judged(lines)
    assert warning.kind == "too good" and "none of our own runs was below 6.100" in warning.message


def test_the_band_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = ((1e6, 0.9, 1.1), (4e6, 0.7, 0.9))
    monkeypatch.setattr(thermometer, "REFERENCE", {"mlm": marks})
    assert reference_band("mlm", 1e6, 5.0) == pytest.approx((4.5, 5.5))
    assert reference_band("mlm", 2e6, 5.0) == pytest.approx((4.0, 5.0))  # half of the logarithm
    assert reference_band("mlm", 4e6, 5.0) == pytest.approx((3.5, 4.5))
    for tokens, task in ((0.9e6, "mlm"), (4.1e6, "mlm"), (2e6, "sop")):
        assert reference_band(task, tokens, 5.0) is None


def test_marks_of_our_own_runs_ascend() -> None:
    for task, marks in thermometer.REFERENCE.items():
        for (left, *_), (right, *_) in itertools.pairwise(marks):
            assert left < right, task
        assert all(low <= high for _, low, high in marks), task


def test_tokens_of_a_task_are_those_of_its_rows() -> None:
    mixture = read_mixture({"mlm+nsp": 3, "mlm+sop": 1, "clm": 4})
    assert [tokens_of_task(task, mixture, 800) for task in ("mlm", "nsp", "sop", "clm")] == [
        400, 300, 100, 400,
    ]  # fmt: skip


def test_margins_narrow_with_labels() -> None:
    assert margin_nats("mlm", 6.0, 10**6) == pytest.approx(0.06)
    assert margin_nats("mlm", 6.0, 10) == pytest.approx(math.log(1000) / 10)
    assert margin_nats("nsp", 0.7, 1_000) == pytest.approx(math.log(1000) / 1_000)
