"""Copies and near-copies: found where they are, in any order of work, and nothing else is."""

import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from corpus_support import rows

from data.corpus.duplicates import (
    ClusterCounts,
    DedupConfig,
    Removal,
    Removals,
    SignatureWriter,
    cluster,
    match,
    removals_path,
)
from data.corpus.fingerprint import ngram_hashes, word_hashes
from data.corpus.minhash import (
    MinHashConfig,
    signature,
    signature_of,
    signature_slowly,
    similarity,
)

CONFIG = DedupConfig()
WORDS = [f"word{n}" for n in range(4000)]


def made_text(seed: int, num_words: int = 300) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def changed(text: str, share: float, seed: int) -> str:
    """The text with a share of its words replaced by others, in one run."""
    words = text.split()
    count = int(len(words) * share)
    start = random.Random(seed).randrange(len(words) - count)
    words[start : start + count] = made_text(seed + 999, count).split()
    return " ".join(words)


def removed(
    folder: Path, tasks: list[list[str]], config: DedupConfig = CONFIG
) -> tuple[ClusterCounts, dict[tuple[int, int], Removal]]:
    """All stages over texts of some tasks; ids are "task/index"."""
    for task, texts in enumerate(tasks):
        with SignatureWriter(folder, task, config) as writer:
            for index, text in enumerate(texts):
                writer.add(f"{task}/{index}", text)
    for band in reversed(config.passes):
        match(folder, band, len(tasks), config)
    counts = cluster(folder, len(tasks), config)
    found = {}
    for task, texts in enumerate(tasks):
        removals = Removals(folder, task)
        for index in range(len(texts)):
            if (removal := removals.get(index)) is not None:
                found[task, index] = removal
    return counts, found


def jaccard(first: str, second: str) -> float:
    a, b = (set(ngram_hashes(word_hashes(text), 5).tolist()) for text in (first, second))
    return len(a & b) / max(1, len(a | b))


@pytest.mark.parametrize("num_words", [0, 1, 4, 5, 513, 3000])
def test_signature_equals_its_slow_twin(num_words: int) -> None:
    ngrams = ngram_hashes(word_hashes(made_text(1, num_words)), 5)
    slow = signature_slowly(ngrams.tolist(), CONFIG.minhash)
    assert signature_of(ngrams, CONFIG.minhash).tolist() == slow


def test_signatures_estimate_the_similarity() -> None:
    errors = []
    for seed in range(60):
        text = made_text(seed, 400)
        other = changed(text, 0.01 + 0.01 * seed, seed)
        estimate = similarity(signature(text, CONFIG.minhash), signature(other, CONFIG.minhash))
        errors.append(float(estimate) - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.06


def test_copies_are_found_across_tasks(tmp_path: Path) -> None:
    base = [made_text(seed) for seed in range(30)]
    tasks = [
        base[:15],
        [*base[15:], base[3].upper().replace(" ", "\n")],
        [changed(base[20], 0.1, 5)],
    ]
    counts, found = removed(tmp_path, tasks)
    assert found[1, 15] == Removal("exact", "0/3", 1.0)
    assert found[2, 0].kind == "near" and found[2, 0].of == "1/5"
    assert found[2, 0].similarity == pytest.approx(jaccard(base[20], tasks[2][0]), abs=0.15)
    assert len(found) == 2 and counts[:3] == (2, 1, 1)
    assert counts.largest == [("0/3", 1), ("1/5", 1)]


def test_a_chain_of_likenesses_is_one_cluster(tmp_path: Path) -> None:
    """Versions each like the next: the first stays alone, though the last is not like it."""
    versions = [made_text(7, 600)]
    for step in range(6):
        versions.append(changed(versions[-1], 0.12, step))
    assert jaccard(versions[0], versions[-1]) < 0.5
    counts, found = removed(tmp_path, [versions[3:], versions[:3]])
    assert counts.num_clusters == 1 and len(found) == 6 and (0, 0) not in found


def test_texts_without_words_are_no_copies(tmp_path: Path) -> None:
    _, found = removed(tmp_path, [["", "...", "!"], ["…"]])
    assert found == {}


def test_short_texts_are_compared_as_a_whole(tmp_path: Path) -> None:
    _, found = removed(
        tmp_path, [["good morning", "Good morning!", "good evening", "morning good"]]
    )
    assert found == {(0, 1): Removal("exact", "0/0", 1.0)}


@pytest.mark.parametrize("num_partitions", [2, 7])
def test_partitions_and_repetitions_change_nothing(num_partitions: int, tmp_path: Path) -> None:
    texts = [
        made_text(seed % 20) if seed % 3 else changed(made_text(seed % 20), 0.1, seed)
        for seed in range(60)
    ]
    tasks = [texts[:25], [], texts[25:]]
    _, first = removed(tmp_path / "one", tasks)
    again = DedupConfig(num_partitions=num_partitions)
    _, second = removed(tmp_path / "many", tasks, again)
    removed(tmp_path / "many", tasks, again)
    assert first == second and first
    for task in range(3):
        files = [removals_path(tmp_path / name, task).read_bytes() for name in ("one", "many")]
        assert files[0] == files[1]


def test_exact_and_near_are_separate_choices(tmp_path: Path) -> None:
    text = made_text(3)
    tasks = [[text, text, changed(text, 0.05, 1)]]
    _, exact = removed(tmp_path / "exact", tasks, DedupConfig(near=False))
    assert set(exact) == {(0, 1)}
    _, near = removed(tmp_path / "near", tasks, DedupConfig(exact=False))
    assert {place: removal.kind for place, removal in near.items()} == {
        (0, 1): "exact",
        (0, 2): "near",
    }


@pytest.mark.parametrize("values", [{"threshold": 0.0}, {"bands": 0}, {"ngram": -1}])
def test_wrong_settings_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        MinHashConfig(**values)


@pytest.mark.parametrize("name", ["messy/near_dup_en.jsonl.xz", "messy/near_dup_zh.jsonl.xz"])
def test_versions_of_a_work_or_a_law(name: str, tmp_path: Path) -> None:
    """Labelled versions whose texts are alike are found; other works and laws are left alone."""
    documents = rows(name)
    _, found = removed(tmp_path, [[row["text"] for row in documents]])
    alike = wrong = 0
    missed = []
    for i, j in combinations(range(len(documents)), 2):
        same_group = documents[i]["group"] == documents[j]["group"]
        truth = jaccard(documents[i]["text"], documents[j]["text"])
        together = (0, j) in found and (
            found[0, j].of == f"0/{i}" or found.get((0, i), None) == found[0, j]
        )
        if same_group and truth >= 0.65:
            alike += 1
            missed += [] if together or (0, i) in found else [(i, j, truth)]
        elif together and not same_group:
            wrong += 1
    assert alike >= 9 and len(missed) <= alike * 0.1
    assert wrong <= 0.05 * len(found)


def test_planted_copies_in_a_dirty_corpus(tmp_path: Path) -> None:
    """Recall of planted copies at least 0.9 (exact ones: all), precision at least 0.95."""
    documents = sorted(rows("messy/dirty_mix.jsonl.xz"), key=lambda row: row["defect"] != "none")
    _, found = removed(tmp_path, [[row["text"] for row in documents]])
    share = {}
    for defect in ("exact_dup", "near_dup", "prefix_dup"):
        places = [i for i, row in enumerate(documents) if row["defect"] == defect]
        share[defect] = np.mean([(0, i) in found for i in places])
    assert share["exact_dup"] == 1 and share["near_dup"] >= 0.9
    clean = [i for i, row in enumerate(documents) if row["defect"] == "none" and (0, i) in found]
    assert len(clean) <= 0.05 * len(found)
