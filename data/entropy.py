"""Token counts and pairs of neighbours in, nats out: what a model with little or no context could reach."""

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


def context_free_accuracy(counts: np.ndarray, num_regular: int) -> float:
    """The share of masked tokens that the best model guesses which sees the slot itself and nothing around it.

    The arguments, and what a slot shows, as of `context_free_loss`.
    """
    total = int(counts.sum())
    top = int(counts.max()) / total
    kept_share = 1 - MASK_SHARE - RANDOM_SHARE
    absent = RANDOM_SHARE * (1 - np.count_nonzero(counts) / num_regular)
    shares = [(MASK_SHARE + absent) * top]
    for count in counts[counts > 0].tolist():
        own = count / total * (kept_share + RANDOM_SHARE / num_regular)  # it shows the label
        shares.append(max(own, RANDOM_SHARE / num_regular * top))
    return round(math.fsum(shares), 9)


def neighbour_codes(
    tokens: np.ndarray, document_lengths: np.ndarray, vocab_size: int
) -> np.ndarray:
    """One number for each two neighbouring tokens of a document: first * vocab_size + second.

    tokens: [num_tokens], documents back to back; document_lengths: [num_documents], tokens. uint32 while all
    numbers fit, else uint64.
    """
    dtype = np.uint32 if vocab_size <= 1 << 16 else np.uint64
    codes = tokens[:-1].astype(dtype)
    codes *= dtype(vocab_size)
    codes += tokens[1:].astype(dtype, copy=False)
    within = np.ones(len(codes), bool)
    ends = np.cumsum(document_lengths, dtype=np.int64)[:-1]
    within[ends - 1] = False
    return codes[within]


def bigram_entropy(codes: np.ndarray, vocab_size: int) -> float:
    """H(token | the token before it) in nats: what a model that knows one token of context can reach.

    codes: of `neighbour_codes`, at least one; they are sorted in place. The plug-in entropies of pairs and of
    first tokens, each corrected by (kinds - 1) / 2n for what a sample of n has not seen (Miller 1955). The
    result still lies below the truth while new kinds of pairs keep coming: more so with a larger vocabulary.
    """
    codes.sort()
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    counts = np.diff(starts, append=len(codes))
    firsts = (codes[starts] // codes.dtype.type(vocab_size)).astype(np.int64)
    del starts
    of_first = np.bincount(firsts, weights=counts).astype(np.int64)  # exact below 2^53
    of_first = of_first[of_first > 0]
    corrected = (len(counts) - len(of_first)) / (2 * len(codes))
    return round(_sum_log(of_first, len(codes)) - _sum_log(counts, len(codes)) + corrected, 9)


def _sum_log(counts: np.ndarray, total: int) -> float:
    """Sum of n ln n over the counts, by the total: the same in any order of them."""
    sizes, times = np.unique(counts, return_counts=True)
    terms = (t * n * math.log(n) for n, t in zip(sizes.tolist(), times.tolist(), strict=True))
    return math.fsum(terms) / total
