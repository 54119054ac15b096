"""Lines of guessing against brute force: every label written out, and guesses that ignore the text."""

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from data.chance import NUM_CLASSES, Chance, asked_of, asked_width, chance_lines
from data.collate import Batch, Target
from data.objectives import TASKS
from model.tasks import TASKS as MODEL_TASKS

MANIFEST = {
    "unigram_entropy_nats": 6.5, "unigram_accuracy": 0.05, "context_free_loss_nats": 5.75,
    "context_free_accuracy": 0.12, "bigram_entropy_nats": 4.25,
    "source_unigram_entropy_nats": {"wiki": 6.25},
}  # fmt: skip


def batch_of(**labels: Iterable[int]) -> Batch:
    """A batch of which only the labels are looked at."""
    targets = {
        task: Target(torch.zeros(0), torch.tensor(list(values), dtype=torch.int64))
        for task, values in labels.items()
    }
    fields: dict = dict.fromkeys(Batch._fields)
    return Batch(**{**fields, "targets": targets})


def lines_of(task: str, *batches: Batch, **more: object) -> dict[str, Chance]:
    asked: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, counts in asked_of(batch).items():
            assert counts.shape == (asked_width(name),)
            asked[name] = asked.get(name, 0) + counts
    return chance_lines(task, MANIFEST, asked, **more)  # type: ignore[arg-type]


def brute_force(labels: Iterable[object]) -> Chance:
    """The entropy of labels, and the share of the commonest."""
    counts = Counter(labels)
    shares = [n / counts.total() for n in counts.values()]
    return Chance(-sum(p * math.log(p) for p in shares), max(shares))


@pytest.mark.parametrize("task", NUM_CLASSES)
def test_tasks_with_classes_are_guessed_as_often_as_they_occur(task: str) -> None:
    draws = np.random.default_rng(1).integers(0, NUM_CLASSES[task], 90).tolist()
    labels = [*draws, 0, 0, 0, 0, 0, 0, 0, 0]  # more of one class
    found = lines_of(task, batch_of(**{task: labels[:40]}), batch_of(**{task: labels[40:]}))
    assert found == {"guessing": pytest.approx(brute_force(labels))}


def test_the_known_values() -> None:
    for task, nats in (("nsp", math.log(2)), ("order", math.log(3)), ("reorder", math.log(4))):
        balanced = list(range(NUM_CLASSES[task])) * 5
        assert lines_of(task, batch_of(**{task: balanced}))["guessing"].loss_nats == pytest.approx(
            nats
        )
    assert lines_of("nsp", batch_of(nsp=[1, 1, 1])) == {"guessing": (0.0, 1.0)}


def test_the_model_has_as_many_classes() -> None:
    for task, number in NUM_CLASSES.items():
        assert MODEL_TASKS[task].num_classes == number


@pytest.mark.parametrize("right", [0.0, 0.4, 1.0])
def test_replaced_tokens(right: float) -> None:
    """Of 100 tokens 15 were hidden, and the generator has got some right again."""
    batch = batch_of(rtd=[7] * 100, rtd_generator=[7] * 15)
    replaced = round(15 * (1 - right))
    found = lines_of("rtd", batch, generator_accuracy=right)["guessing"]
    assert found == pytest.approx(brute_force(n < replaced for n in range(100)))


@pytest.mark.parametrize("task", ["contrastive", "cpc"])
def test_candidates_are_those_of_the_own_micro_batch(task: str) -> None:
    batches = [batch_of(**{task: range(number)}) for number in (48, 2, 0)]
    losses = [math.log(48)] * 48 + [math.log(2)] * 2
    right = [1 / 48] * 48 + [1 / 2] * 2
    expected = Chance(float(np.mean(losses)), float(np.mean(right)))
    assert lines_of(task, *batches) == {"guessing": pytest.approx(expected)}


def test_tasks_on_tokens_take_the_lines_of_the_text() -> None:
    for task in ("mlm", "wwm", "span", "ngram", "static_mlm"):
        found = lines_of(task, batch_of(**{task: [5]}))
        assert found == {"context free": (5.75, 0.12), "unigram": (6.5, 0.05)}
        assert next(iter(found)) == "context free"  # what is to be beaten comes first
    for task in ("word_order", "rtd_generator"):
        assert lines_of(task, batch_of(**{task: [5]})) == {"unigram": (6.5, 0.05)}
    for task in ("clm", "prefix_lm", "denoise"):
        lines = lines_of(task, batch_of(**{task: [5]}))
        assert lines == {"unigram": (6.5, 0.05), "bigram": (4.25, None)}


def test_of_one_source_its_own_frequencies_are_known() -> None:
    batch = batch_of(mlm=[5], nsp=[0, 1])
    assert lines_of("mlm", batch, source="wiki") == {"unigram": (6.25, None)}
    assert lines_of("mlm", batch, source="books") == {}
    assert lines_of("nsp", batch, source="books") == {"guessing": pytest.approx((math.log(2), 0.5))}


def test_an_older_manifest_leaves_lines_out() -> None:
    older = {"unigram_entropy_nats": 6.5, "context_free_loss_nats": 5.75}
    asked = {"mlm": np.array([3.0]), "clm": np.array([3.0])}
    assert chance_lines("clm", older, asked) == {"unigram": (6.5, None)}
    assert chance_lines("mlm", older, asked) == {
        "context free": (5.75, None),
        "unigram": (6.5, None),
    }


@pytest.mark.parametrize("task", TASKS)
def test_where_nothing_is_asked_there_is_no_line(task: str) -> None:
    assert lines_of(task, batch_of(**{task: []})) == {}


def test_an_unknown_task() -> None:
    with pytest.raises(ValueError, match="task 'mln' is none of mlm, wwm"):
        chance_lines("mln", MANIFEST, {})
