"""Signatures: equal to their definition, and as alike as the texts are."""

import random

import numpy as np
import pytest

from data.corpus.fingerprint import ngram_hashes, word_hashes, words_of
from data.corpus.minhash import (
    AT_ONCE,
    MinHashConfig,
    signature,
    signature_of,
    signature_slowly,
    similarity,
)

CONFIG = MinHashConfig()


def made_words(seed: int, num_words: int) -> list[str]:
    return random.Random(seed).choices([f"word{n}" for n in range(4000)], k=num_words)


@pytest.mark.parametrize("num_words", [0, 1, 4, 5, AT_ONCE + 4, AT_ONCE + 5, 3000])
def test_signature_equals_its_slow_twin(num_words: int) -> None:
    ngrams = ngram_hashes(word_hashes(" ".join(made_words(1, num_words))), CONFIG.ngram)
    fast = signature_of(ngrams, CONFIG)
    assert fast.tolist() == signature_slowly(ngrams.tolist(), CONFIG)
    assert fast.dtype == np.uint32 and fast.shape == (CONFIG.size,)


def test_the_whole_path_follows_its_definition() -> None:
    """From the words of a text in two scripts: only the hash of single words is taken as given."""
    text = "The cat sat; the CAT ran. 猫坐着，猫跑了。" * 3
    words = words_of(text)
    hash_of = dict(zip(words, word_hashes(text).tolist(), strict=True))
    windows = {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
    ngrams = [
        int(ngram_hashes(np.array([hash_of[w] for w in window], dtype=np.uint64), 5)[0])
        for window in windows
    ]
    assert signature(text, CONFIG).tolist() == signature_slowly(ngrams, CONFIG)


@pytest.mark.parametrize("ngram", [1, 5])
def test_signatures_estimate_the_similarity(ngram: int) -> None:
    """Errors are those of CONFIG.size draws: without bias, with a standard deviation below 0.05."""
    config = MinHashConfig(ngram=ngram)
    errors, expected = [], []
    for seed in range(100):
        words = made_words(seed, 400)
        count = 1 + 3 * seed
        other = words[:-count] + made_words(seed + 1000, count)
        texts = " ".join(words), " ".join(other)
        one, two = ({*ngram_hashes(word_hashes(text), ngram).tolist()} for text in texts)
        truth = len(one & two) / len(one | two)
        estimate = similarity(signature(texts[0], config), signature(texts[1], config))
        errors.append(float(estimate) - truth)
        expected.append(truth * (1 - truth) / config.size)
    assert abs(np.mean(errors)) < 4 * np.sqrt(np.sum(expected)) / len(errors)
    assert 0.7 < np.std(errors) / np.sqrt(np.mean(expected)) < 1.3


def test_texts_that_share_nothing() -> None:
    texts = [" ".join(f"{side}{n}" for n in range(300)) for side in "ab"]
    assert similarity(signature(texts[0], CONFIG), signature(texts[1], CONFIG)) == 0


@pytest.mark.parametrize("values", [{"threshold": 0.0}, {"bands": 0}, {"ngram": -1}])
def test_wrong_settings_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        MinHashConfig(**values)
