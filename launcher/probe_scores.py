"""Guessed and true classes in, scores out: pure numbers.

Classes are numbers from 0. A true class of -1 is one that train does not have: nobody guesses it.
"""

import math

import numpy as np

NORMAL_95 = 1.959963984540054  # of a normal distribution, 95 % lie within so many deviations


def accuracy(guessed: np.ndarray, true: np.ndarray) -> float:
    return float((guessed == true).mean())


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """The 95 % interval of a share found in `num` rows (Wilson 1927)."""
    square = NORMAL_95**2
    middle = (share + square / (2 * num)) / (1 + square / num)
    half = NORMAL_95 / (1 + square / num)
    half *= math.sqrt(share * (1 - share) / num + square / (4 * num**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def matthews(guessed: np.ndarray, true: np.ndarray) -> float:
    """Matthews' correlation of classes, of any number of them (Gorodkin 2004); 0 where one side is constant."""
    classes = np.union1d(guessed, true)
    guesses, truths = (np.array([(side == c).mean() for c in classes]) for side in (guessed, true))
    covariance = (guessed == true).mean() - guesses @ truths
    spread = (1 - guesses @ guesses) * (1 - truths @ truths)
    return float(covariance / math.sqrt(spread)) if spread > 1e-12 else 0.0


def macro_f1(guessed: np.ndarray, true: np.ndarray) -> float:
    """The mean of F1 over all classes that are guessed or true; that of a class never right is 0."""
    scores = [
        2 * int(((guessed == c) & (true == c)).sum()) / (int((guessed == c).sum()) + int((true == c).sum()))
        for c in np.union1d(guessed, true)
    ]  # fmt: skip
    return float(np.mean(scores))


def majority_class(labels: np.ndarray) -> int:
    """The most frequent class; of several the first."""
    return int(np.bincount(labels).argmax())
