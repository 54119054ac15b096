"""Pairs and clusters: the fast ways agree with the plain ones on random input."""

import numpy as np
import pytest

from data.corpus.clusters import MAX_LEADERS, PAIR, join, join_slowly, merged, pairs_in_buckets


@pytest.mark.parametrize("num_edges", [0, 5, 40, 60, 200])
@pytest.mark.parametrize("seed", range(5))
def test_join_equals_its_slow_twin(seed: int, num_edges: int) -> None:
    first, second = np.random.default_rng(seed).integers(0, 60, (2, num_edges))
    slow = join_slowly(first.tolist(), second.tolist(), 60)
    assert join(first, second, 60).tolist() == slow


def test_long_chains_in_any_order() -> None:
    order = np.random.default_rng(0).permutation(3000)
    assert join(order[:-1], order[1:], 3000).tolist() == [0] * 3000
    assert join(np.arange(2999)[::-1], np.arange(1, 3000)[::-1], 3000).tolist() == [0] * 3000


def test_every_kind_in_a_bucket_has_a_leader() -> None:
    """Documents of a bucket are alike if their kind is: each meets the first of its kind, no other."""
    rng = np.random.default_rng(1)
    bucket = np.sort(rng.integers(0, 20, 400))
    kind = rng.integers(0, 5, 400)
    document = np.arange(1000, 1400)
    matches = pairs_in_buckets(bucket, document, lambda i, j: kind[i] == kind[j], 1)
    expected = []
    for second in range(400):
        same = (bucket[:second] == bucket[second]) & (kind[:second] == kind[second])
        if same.any():
            expected.append((1000 + int(np.argmax(same)), 1000 + second, 1.0))
    assert matches.pairs.tolist() == sorted(expected) and matches.num_not_compared == 0


def test_what_is_not_compared_is_counted() -> None:
    """A bucket of texts that are all unlike: after some leaders, the others are left."""
    n = MAX_LEADERS + 10
    everything = np.zeros(n, dtype=np.int64), np.arange(n)
    matches = pairs_in_buckets(*everything, lambda i, j: np.zeros(len(i)), 0.5)
    assert len(matches.pairs) == 0 and matches.num_not_compared == 10


def test_merged_pairs_keep_their_greatest_similarity() -> None:
    parts = [np.array([(1, 2, 0.5), (0, 9, 0.75)], dtype=PAIR), np.array([(1, 2, 0.875)], PAIR)]
    assert merged(parts).tolist() == [(0, 9, 0.75), (1, 2, 0.875)]
    assert len(merged([])) == 0
