"""Token counts in, nats out: what a model without any context could reach on this text."""

import math

import numpy as np

from data.masking import MASK_SHARE, RANDOM_SHARE


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


def context_free_loss(counts: np.ndarray, num_regular: int) -> float:
    """Nats a masked token costs the best model that sees the slot itself and nothing around it.

    counts: of training tokens, int64 [vocabulary]; num_regular: tokens that are not special. Below the
    unigram entropy, because a tenth of the masked slots show their token, and a tenth another
    (data/masking.py): seeing v, the label is v if it was kept, else anything. A loss above this number
    is no sign that context is used.
    """
    entropy = unigram_entropy(counts)
    kept_share = 1 - MASK_SHARE - RANDOM_SHARE
    present = counts[counts > 0].tolist()
    total = sum(present)
    costs = [MASK_SHARE * entropy, RANDOM_SHARE * (1 - len(present) / num_regular) * entropy]
    for count in present:
        p = count / total
        seen = kept_share * p + RANDOM_SHARE / num_regular  # how often a slot shows this token
        other = 1 - kept_share * p / seen  # then its label was drawn anew
        own = 1 - other + other * p
        rest = other * (entropy + p * math.log(p)) - other * (1 - p) * math.log(other)
        costs.append(seen * (rest - own * math.log(own)))
    return round(math.fsum(costs), 9)
