"""Token counts in, nats out: what a model without any context could reach on this text."""

import math

import numpy as np


def unigram_entropy(counts: np.ndarray) -> float:
    """Plug-in entropy of the tokens counted, in nats: what a model that knows no context can reach."""
    present = counts[counts > 0].tolist()
    total = sum(present)
    return round(-math.fsum(n / total * math.log(n / total) for n in present), 9)


def unigram_cross_entropy(train: np.ndarray, heldout: np.ndarray) -> float:
    """Nats a held-out token costs under train frequencies, smoothed by adding one to each count."""
    total = int(train.sum()) + len(train)
    costs = (
        -n * math.log((c + 1) / total)
        for n, c in zip(heldout.tolist(), train.tolist(), strict=True)
    )
    return round(math.fsum(costs) / int(heldout.sum()), 9)
