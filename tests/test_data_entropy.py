"""The levels a loss is compared with, against their definitions written out."""

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.entropy import (
    bigram_entropy,
    context_free_accuracy,
    context_free_loss,
    neighbour_codes,
    unigram_cross_entropy,
    unigram_entropy,
)
from data.neighbours import bigram_facts, sample_order
from data.shards import Dataset


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


@pytest.mark.parametrize("counts", [[50, 30, 15, 5], [1, 1, 1, 1], [99, 1, 0, 0], [3, 0, 0, 0]])
def test_context_free_accuracy_is_that_of_the_best_guess(counts: list[int]) -> None:
    p = np.array(counts) / sum(counts)
    shown = np.concatenate([0.8 * p[None], np.diag(0.1 * p) + 0.1 / len(p) * p[None]])
    expected = shown.max(axis=1).sum()
    assert context_free_accuracy(np.array(counts), len(counts)) == pytest.approx(expected, abs=1e-8)


def test_it_lies_below_the_unigram_entropy() -> None:
    counts = np.arange(1, 2000)
    assert 0 < context_free_loss(counts, len(counts)) < unigram_entropy(counts)
    assert unigram_cross_entropy(counts, counts) == pytest.approx(unigram_entropy(counts), abs=1e-2)


def naive_bigrams(documents: list[list[int]]) -> float:
    """H(second | first) with the correction, by its definition: a sum over contexts."""
    pairs = Counter(pair for tokens in documents for pair in itertools.pairwise(tokens))
    firsts = Counter()
    for (first, _), count in pairs.items():
        firsts[first] += count
    total = pairs.total()
    entropy = -sum(n / total * math.log(n / firsts[first]) for (first, _), n in pairs.items())
    return entropy + (len(pairs) - len(firsts)) / (2 * total)


@pytest.mark.parametrize("vocab_size", [7, 1 << 16, 70_000])
def test_bigram_entropy_is_that_of_neighbours_within_documents(vocab_size: int) -> None:
    """The highest ids of both widths are among them, and a document of one token has no pair."""
    rng = np.random.default_rng(vocab_size)
    lengths = [1, 40, 2, 1, 77, 1]
    documents = [(vocab_size - 1 - rng.integers(0, 7, n) ** 2 // 7).tolist() for n in lengths]
    tokens = np.array(
        [*itertools.chain(*documents)], np.uint16 if vocab_size <= 1 << 16 else np.uint32
    )
    codes = neighbour_codes(tokens, np.array(lengths, np.uint32), vocab_size)
    assert len(codes) == sum(n - 1 for n in lengths)
    assert bigram_entropy(codes, vocab_size) == pytest.approx(naive_bigrams(documents), abs=1e-8)


def test_the_correction_comes_nearer_to_the_truth() -> None:
    """A source whose entropy is known: from each of 64 tokens to one of 16, equally likely."""
    rng = np.random.default_rng(1)
    steps = rng.integers(0, 16, 20_000)
    tokens = np.zeros(len(steps), np.uint16)
    for i in range(1, len(tokens)):
        tokens[i] = (tokens[i - 1] * 5 + steps[i]) % 64
    codes = neighbour_codes(tokens, np.array([len(tokens)]), 64)
    found = bigram_entropy(codes.copy(), 64)
    plug_in = found - (len(np.unique(codes)) - 64) / (2 * len(codes))
    assert abs(found - math.log(16)) < 0.1 * abs(plug_in - math.log(16))


def test_the_manifest_tells_both_entropies(tiny_dataset: Path) -> None:
    """Against plain counting over all training documents."""
    dataset = Dataset.open(tiny_dataset)
    documents: list[list[int]] = []
    for index in dataset.block_indices("train").tolist():
        block = dataset.read_block(index)
        ends = np.cumsum(block.document_lengths).tolist()
        documents += [block.tokens[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]
    manifest = dataset.manifest
    assert manifest["bigram_entropy_nats"] == pytest.approx(naive_bigrams(documents), abs=1e-8)
    assert manifest["bigram_sample_pairs"] == sum(len(tokens) - 1 for tokens in documents)
    assert 0 < manifest["bigram_entropy_nats"] < manifest["unigram_entropy_nats"]
    top = Counter(token for tokens in documents for token in tokens)
    share = max(top.values()) / top.total()
    assert manifest["unigram_accuracy"] == pytest.approx(share, abs=1e-8)
    assert list(manifest["source_unigram_entropy_nats"]) == dataset.sources
    for source, entropy in manifest["source_unigram_entropy_nats"].items():
        tokens = [dataset.read_block(i).tokens for i in dataset.block_indices("train", source)]
        counts = np.bincount(np.concatenate(tokens), minlength=dataset.vocab_size)
        assert entropy == unigram_entropy(counts)


def test_a_sample_is_the_first_tokens_of_the_order(tiny_dataset: Path) -> None:
    """Cut within a document; and the order is the places', whatever order the sources have."""
    dataset = Dataset.open(tiny_dataset)
    first, second = (dataset.read_block(index) for index in sample_order(dataset)[:2])
    size = len(first.tokens) + int(second.document_lengths[0]) // 2
    facts = bigram_facts(dataset, size)
    documents = []
    for block in (first, second):
        ends = np.cumsum(block.document_lengths).tolist()
        documents += [block.tokens[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]
    kept, num_left = [], size
    for tokens in documents:
        kept.append(tokens[:num_left])
        num_left -= len(kept[-1])
    assert sum(map(len, kept)) == size
    assert facts["bigram_entropy_nats"] == pytest.approx(naive_bigrams(kept), abs=1e-8)

    turned = dataset.blocks.copy()
    turned["source"] = 1 - turned["source"]
    other = {**dataset.manifest, "sources": dict.fromkeys(reversed(dataset.sources))}
    again = Dataset(dataset.root, other, "", turned[::-1])
    assert bigram_facts(again, size) == facts
