"""append: new sources enter a finished dataset; whatever happens, the old one stays whole."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from prepare_support import config, corpus, dataset, document_tokens, fingerprint
from support import ROOT, write_corpus

from data.append import append
from data.dataset_check import dataset_problems
from data.prepare import PrepareConfig, prepare
from data.shards import Dataset

__all__ = ["config", "corpus", "dataset"]  # fixtures, used by name


@pytest.fixture
def copy(dataset, tmp_path):
    return Dataset.open(shutil.copytree(dataset.root, tmp_path / "dataset"))


@pytest.fixture
def more(copy, tmp_path) -> PrepareConfig:
    path = write_corpus(tmp_path / "new.jsonl", 120, start=5000)
    return PrepareConfig(output=str(copy.root), sources={"added": (str(path),)}, num_processes=1)


def test_a_source_is_added(copy, more):
    before, old_documents = fingerprint(copy.root), document_tokens(copy)
    grown = Dataset.open(append(more))
    after = fingerprint(copy.root)
    assert {name for name in before if before[name] != after[name]} == {
        "manifest.json",
        "blocks.npy",
    }
    assert grown.sources == [*copy.sources, "added"]
    assert np.array_equal(grown.blocks[: len(copy.blocks)], copy.blocks)
    documents = document_tokens(grown)
    assert len(documents) == len(old_documents) + 120
    assert all(documents[key] == value for key, value in old_documents.items())
    assert dataset_problems(copy.root, 1) == []
    assert append(more) == copy.root
    assert fingerprint(copy.root) == after


def test_entropies_are_those_of_one_dataset_of_all(copy, more, config, tmp_path):
    """Also the shards: the same bytes as if the source had been there from the beginning."""
    together = replace(
        config,
        output=str(tmp_path / "together"),
        sources={**config.sources, **more.sources},
        tokenizer=str(copy.root / "tokenizer"),
    )
    whole, grown = Dataset.open(prepare(together)), Dataset.open(append(more))
    for name in ("unigram_entropy_nats", "heldout_unigram_nats", "context_free_loss_nats"):
        assert grown.manifest[name] == pytest.approx(whole.manifest[name], abs=1e-12)
    for name in ("bigram_entropy_nats", "bigram_sample_pairs", "source_unigram_entropy_nats"):
        assert grown.manifest[name] == whole.manifest[name] != copy.manifest[name]
    assert grown.manifest["sources"]["added"] == whole.manifest["sources"]["added"]
    for entry in grown.manifest["sources"]["added"]["train"]["shards"]:
        assert (grown.root / entry["path"]).read_bytes() == (
            whole.root / entry["path"]
        ).read_bytes()


def test_a_kill_at_any_moment_of_publishing_leaves_one_of_the_two(copy, more, monkeypatch):
    """Stopped before the n-th change of the folder: old or new, both files; and the next run finishes."""
    import data.append

    originals = {name: getattr(os, name) for name in ("replace", "link")}
    old = copy.digest
    for stop in range(1, 40):
        root = shutil.copytree(copy.root, copy.root.parent / f"copy{stop}")
        config = replace(more, output=str(root))
        calls = []

        def counted(name, *arguments, calls=calls, stop=stop):
            if any(data.append.TABLES_FOLDER in str(a) or "manifest" in str(a) for a in arguments):
                calls.append(name)
                if len(calls) == stop:
                    raise KeyboardInterrupt
            return originals[name](*arguments)

        with monkeypatch.context() as patch:
            for name in originals:
                patch.setattr(os, name, lambda *a, name=name: counted(name, *a))
            try:
                append(config)
                finished = True
            except KeyboardInterrupt:
                finished = False
        found = Dataset.open(root)
        assert finished == (len(calls) < stop)
        assert (found.digest == old) == ("added" not in found.sources)
        append(config)
        assert dataset_problems(root, 1) == []
        assert Dataset.open(root).sources[-1] == "added"
        if finished:
            break
    assert finished and stop > 8


def test_what_cannot_be_added(copy, more, corpus, tmp_path):
    before = fingerprint(copy.root)
    with pytest.raises(ValueError, match=r"holds mixed already"):
        append(replace(more, sources={"mixed": (f"{corpus}/a.jsonl",)}))
    with pytest.raises(
        ValueError, match=r"block_tokens of the dataset is 4096, and cannot be 1024"
    ):
        append(replace(more, block_tokens=1024))
    with pytest.raises(ValueError, match="has no manifest"):
        (tmp_path / "empty").mkdir()
        append(replace(more, output=str(tmp_path / "empty")))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    with pytest.raises(ValueError, match="not JSON"):
        append(replace(more, sources={"added": (str(bad),)}))
    assert fingerprint(copy.root) == before
    append(more)
    with pytest.raises(ValueError, match=r"holds added already:(.|\n)*a\.jsonl is new"):
        append(replace(more, sources={"added": (f"{corpus}/a.jsonl",)}))


def test_from_the_command_line(tmp_path):
    """A WordPiece dataset, verified; more text; the same again; and what does not go together."""
    first, second = (
        write_corpus(tmp_path / "1.jsonl", 200),
        write_corpus(tmp_path / "2.jsonl", 50, 900),
    )
    made = ["--tokenizer-kind", "wordpiece", "--lowercase", "--vocab-size", "220"]
    made += ["--heldout-fraction", "0.05", "--processes", "1", "--verify-tokenizer"]
    root = tmp_path / "d"

    def cloze(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, "-m", "launcher.cli", "prepare", root, *arguments]
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    for _ in range(2):  # before sharding, and of the finished dataset
        status, output = cloze(f"en={first}", *made)
        assert status == 0 and "tokenizer verified" in output, output
    status, output = cloze(f"more={second}", "--append", "--processes", "1")
    assert status == 0 and "more" in output, output
    dataset = Dataset.open(root)
    assert (
        dataset.sources == ["en", "more"] and dataset.manifest["tokenizer"]["kind"] == "wordpiece"
    )
    status, output = cloze(f"more={second}", "--append", "--verify-tokenizer")
    assert status == 78 and "do not go together" in output, output
