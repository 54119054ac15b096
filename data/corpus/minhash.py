"""The n-gram hashes of a text in, its MinHash signature out: texts alike have signatures alike.

Broder 1997: of two sets, the smallest elements under a random permutation are equal with a
probability that is their Jaccard similarity (shared n-grams over all n-grams). A signature holds
the smallest under many permutations; the share of equal places estimates the similarity.
"""

import functools
from dataclasses import dataclass

import numpy as np

from data.corpus.fingerprint import ngram_hashes, word_hashes
from data.hashing import hash_positions, stable_hash64

AT_ONCE = 512  # n-grams: with all permutations they fit into a core's cache


@dataclass(frozen=True)
class MinHashConfig:
    """How texts are compared. Two texts are looked at together if one band of theirs is equal.

    With b bands of r places, texts of similarity s meet with probability 1 - (1 - s^r)^b: here
    0.98 at 0.6, 0.84 at 0.5, 0.20 at 0.3. They count as near-duplicates if the signatures then
    say that the similarity reaches `threshold`; its standard error is 0.05.
    """

    ngram: int = 5  # words
    bands: int = 28
    rows_per_band: int = 4
    threshold: float = 0.6
    seed: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"near.{name} {getattr(self, name)} is below 1"
            for name in ("ngram", "bands", "rows_per_band")
            if getattr(self, name) < 1
        ]
        if not 0 < self.threshold <= 1:
            problems.append(f"near.threshold {self.threshold} is not in (0, 1]")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def size(self) -> int:
        """Places of a signature."""
        return self.bands * self.rows_per_band


def signature(text: str, config: MinHashConfig) -> np.ndarray:
    """uint32 [config.size]. All ones for a text without words, which is like no other."""
    return signature_of(ngram_hashes(word_hashes(text), config.ngram), config)


def signature_of(ngrams: np.ndarray, config: MinHashConfig) -> np.ndarray:
    """uint32 [config.size] from the hashes of a text's n-grams, uint64 [n].

    A permutation is a multiplication by an odd number, modulo 2^64, of which the upper half is kept.
    """
    factors = _factors(config.seed, config.size)
    smallest = np.full(config.size, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(ngrams), AT_ONCE):
        products = ngrams[start : start + AT_ONCE, None] * factors
        np.minimum(smallest, products.min(axis=0), out=smallest)
    return (smallest >> np.uint64(32)).astype(np.uint32)


def signature_slowly(ngrams: list[int], config: MinHashConfig) -> list[int]:
    """What `signature_of` computes, one by one."""
    factors = _factors(config.seed, config.size).tolist()
    none = 2**64 - 1
    return [min((n * f % 2**64 for n in ngrams), default=none) >> 32 for f in factors]


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of signatures [..., size]."""
    return (first == second).mean(axis=-1)


@functools.cache
def _factors(seed: int, size: int) -> np.ndarray:
    return hash_positions(stable_hash64(seed, "minhash"), size) | np.uint64(1)
