"""The levels a loss is compared with, against their definitions written out."""

import math

import numpy as np
import pytest

from data.entropy import context_free_loss, unigram_cross_entropy, unigram_entropy


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4), abs=1e-9)
    assert unigram_entropy(np.array([7, 0])) == 0


@pytest.mark.parametrize("counts", [[50, 30, 15, 5], [1, 1, 1, 1], [90, 10, 0, 0], [3, 0, 0, 0]])
def test_context_free_loss_is_a_conditional_entropy(counts: list[int]) -> None:
    """Entropy of the label given what its slot shows: [MASK] 80 %, itself 10 %, any token 10 %."""
    p = np.array(counts) / sum(counts)
    shown = np.concatenate([0.8 * p[None], np.diag(0.1 * p) + 0.1 / len(p) * p[None]])
    conditional = shown / shown.sum(axis=1, keepdims=True)
    logs = np.log(np.where(conditional > 0, conditional, 1.0))
    expected = -(shown * logs).sum()
    assert shown.sum() == pytest.approx(1)
    assert context_free_loss(np.array(counts), len(counts)) == pytest.approx(expected, abs=1e-8)


def test_it_lies_below_the_unigram_entropy() -> None:
    counts = np.arange(1, 2000)
    assert 0 < context_free_loss(counts, len(counts)) < unigram_entropy(counts)
    assert unigram_cross_entropy(counts, counts) == pytest.approx(unigram_entropy(counts), abs=1e-2)
