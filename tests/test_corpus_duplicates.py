"""Copies and near-copies: found where they are, in any order of work, and nothing else is."""

import random
import resource
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from corpus_support import rows

from data.corpus import duplicates
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
from data.corpus.minhash import MinHashConfig

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


def test_signatures_of_other_settings_are_refused(tmp_path: Path) -> None:
    removed(tmp_path, [[made_text(1), made_text(2)]])
    for config in (DedupConfig(near=False), DedupConfig(minhash=MinHashConfig(bands=30))):
        with pytest.raises(ValueError, match=r"000000\.bin was made with other settings"):
            match(tmp_path, config.passes[0], 1, config)
    with pytest.raises(ValueError, match="num_partitions 0"):
        DedupConfig(num_partitions=0)


def test_a_task_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="killed"),
        SignatureWriter(tmp_path, 0, CONFIG) as writer,
    ):
        writer.add("a", made_text(1))
        raise RuntimeError("killed")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_more_tasks_than_files_may_be_open(tmp_path: Path) -> None:
    text = made_text(1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 30, before[1]))
    try:
        config = DedupConfig(minhash=MinHashConfig(bands=2))
        counts, found = removed(tmp_path, [[text, made_text(n + 2)] for n in range(50)], config)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert set(found) == {(task, 0) for task in range(1, 50)} and counts.num_exact == 49


@pytest.mark.parametrize("at_once", [2, 3, 7])
def test_few_signatures_in_memory_change_nothing(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many copies of few texts, so that buckets are larger than what is read at once."""
    tasks = [[changed(made_text(n % 4), 0.05, n % 3) for n in range(30)], [made_text(9)]]
    _, first = removed(tmp_path / "one", tasks)
    monkeypatch.setattr(duplicates, "AT_ONCE", at_once)
    _, second = removed(tmp_path / "many", tasks)
    assert {place: (r.kind, r.of) for place, r in first.items()} == {
        place: (r.kind, r.of) for place, r in second.items()
    }
    assert len(first) == 30 - 4


def heads(found: dict[tuple[int, int], Removal], num_documents: int) -> list[str]:
    """The id of the document that stands for each of task 0's."""
    return [found[0, i].of if (0, i) in found else f"0/{i}" for i in range(num_documents)]


@pytest.mark.parametrize("name", ["messy/near_dup_en.jsonl.xz", "messy/near_dup_zh.jsonl.xz"])
def test_versions_of_a_work_or_a_law(name: str, tmp_path: Path) -> None:
    """Versions that are alike are found, at least 0.9 of them; other works and laws are left alone.

    Many versions of one law share little: an amended law is a new text. What counts as alike is the
    true similarity, a standard error above the threshold.
    """
    documents = rows(name)
    texts, groups = [row["text"] for row in documents], [row["group"] for row in documents]
    _, found = removed(tmp_path, [texts])
    head = heads(found, len(texts))
    places = list(combinations(range(len(texts)), 2))
    versions = [(i, j) for i, j in places if groups[i] == groups[j]]
    alike = [(i, j) for i, j in versions if jaccard(texts[i], texts[j]) >= 0.65]
    together = [(i, j) for i, j in places if head[i] == head[j]]
    assert len(alike) >= 9 and together
    assert sum(head[i] == head[j] for i, j in alike) >= 0.9 * len(alike)
    assert sum(groups[i] == groups[j] for i, j in together) >= 0.95 * len(together)
    later = {j for _, j in alike}
    assert sum((0, j) in found for j in later) >= 0.9 * len(later)


def test_planted_copies_in_a_dirty_corpus(tmp_path: Path) -> None:
    """Copies: all; texts with small changes: at least 0.9; texts cut short: where enough is left."""
    documents = sorted(rows("messy/dirty_mix.jsonl.xz"), key=lambda row: row["defect"] != "none")
    clean = {row["of"] or row["id"]: row["text"] for row in documents if row["defect"] == "none"}
    _, found = removed(tmp_path, [[row["text"] for row in documents]])
    share = {}
    for defect in ("exact_dup", "near_dup", "prefix_dup"):
        planted = [(i, row) for i, row in enumerate(documents) if row["defect"] == defect]
        if defect == "prefix_dup":
            planted = [(i, r) for i, r in planted if jaccard(clean[r["of"]], r["text"]) >= 0.65]
        assert len(planted) >= 20
        share[defect] = np.mean([(0, i) in found for i, _ in planted])
    assert share["exact_dup"] == 1 and share["near_dup"] >= 0.9 and share["prefix_dup"] >= 0.9
    wrong = [i for i, row in enumerate(documents) if row["defect"] == "none" and (0, i) in found]
    assert len(wrong) <= 0.05 * len(found)


def test_variants_of_licences(tmp_path: Path) -> None:
    """Texts of which one was made from the other; unrelated licences share phrases only."""
    documents = rows("messy/licences_en.jsonl.xz")
    names = [row["id"].removeprefix("licence/").removesuffix(".txt") for row in documents]
    texts = [row["text"].split("---", 2)[2] for row in documents]  # without the front matter
    _, found = removed(tmp_path, [texts])
    head = dict(zip(names, heads(found, len(names)), strict=True))
    for one, other in [
        ("osl-3.0", "afl-3.0"),
        ("gpl-3.0", "agpl-3.0"),
        ("ecl-2.0", "apache-2.0"),
        ("bsd-2-clause", "bsd-3-clause"),
        ("isc", "0bsd"),
    ]:
        assert head[one] == head[other]
    for one, other in combinations(("mit", "gpl-3.0", "apache-2.0", "bsd-3-clause", "isc"), 2):
        assert head[one] != head[other]
