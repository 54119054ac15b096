"""Chance lines against brute force: every case that is equally likely, written out."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable

import pytest

from data.chance import CLASSES, Chance, chance_lines

MANIFEST = {
    "unigram_entropy_nats": 6.5, "unigram_accuracy": 0.05, "context_free_loss_nats": 5.75,
    "context_free_accuracy": 0.12, "bigram_entropy_nats": 4.25,
}  # fmt: skip


def brute_force(labels: Iterable[object]) -> Chance:
    """Of labels that are equally likely cases: the entropy, and the share of the commonest."""
    counts = Counter(labels)
    shares = [n / counts.total() for n in counts.values()]
    return Chance(-sum(p * math.log(p) for p in shares), max(shares))


def parts_in_order() -> Iterable[tuple[int, ...]]:
    return itertools.permutations(range(4))


CASES = {
    "nsp": brute_force(["next", "random"]),
    "sop": brute_force(["kept", "exchanged"]),
    "order": brute_force(["next", "before", "random"]),
    "distance": brute_force(["same document next", "same document", "other document"]),
    "reorder": brute_force(places[0] for places in parts_in_order()),
    "relative": brute_force(places[1] - places[0] for places in parts_in_order()),
}


@pytest.mark.parametrize("task", CASES)
def test_tasks_with_classes(task: str) -> None:
    assert chance_lines(task, {}) == {"chance": pytest.approx(CASES[task])}


def test_the_known_values() -> None:
    values = {task: chance_lines(task, {})["chance"].loss_nats for task in CLASSES}
    two, three, four = math.log(2), math.log(3), math.log(4)
    expected = {"nsp": two, "sop": two, "order": three, "distance": three, "reorder": four}
    assert values == pytest.approx(expected)
    relative = chance_lines("relative", {})["chance"]
    assert relative == pytest.approx((1.7046, 0.25), abs=1e-4)


@pytest.mark.parametrize("replaced", [0, 1, 15, 60, 100])
def test_replaced_tokens(replaced: int) -> None:
    found = chance_lines("rtd", {}, replaced_share=replaced / 100)["chance"]
    assert found == pytest.approx(brute_force(n < replaced for n in range(100)))


@pytest.mark.parametrize("task", ["contrastive", "cpc"])
def test_candidates(task: str) -> None:
    found = chance_lines(task, {}, num_candidates=48)["chance"]
    assert found == pytest.approx(brute_force(range(48)))


def test_tasks_on_tokens_take_the_lines_of_the_text() -> None:
    for task in ("mlm", "wwm", "span", "ngram", "static_mlm"):
        assert chance_lines(task, MANIFEST) == {"context free": (5.75, 0.12)}
    assert chance_lines("word_order", MANIFEST) == {"unigram": (6.5, 0.05)}
    for task in ("clm", "prefix_lm", "denoise"):
        lines = chance_lines(task, MANIFEST)
        assert lines == {"unigram": (6.5, 0.05), "bigram": (4.25, None)}


def test_an_older_manifest_leaves_lines_out() -> None:
    older = {"unigram_entropy_nats": 6.5, "context_free_loss_nats": 5.75}
    assert chance_lines("clm", older) == {"unigram": (6.5, None)}
    assert chance_lines("mlm", older) == {"context free": (5.75, None)}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("rtd", r"share of replaced tokens, in \[0, 1\]: None"),
        ("cpc", "number of candidates, from 1 on: None"),
        ("mln", "task 'mln' is none of mlm, wwm"),
    ],
)
def test_what_cannot_be_told(task: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chance_lines(task, MANIFEST)
