"""prepare: from raw files to a dataset, with any number of processes, through kills and full disks."""

import gzip
import hashlib
import itertools
import json
import lzma
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support import ROOT, document, write_corpus
from transformers import AutoTokenizer

from data.hashing import stable_hash64
from data.plan import locked_folder
from data.prepare import PrepareConfig, prepare
from data.shards import SPLITS, Dataset
from data.vocab import Tokenizer

SCRIPT = """
import json, sys
from data.prepare import PrepareConfig, prepare
if __name__ == "__main__":
    try:
        prepare(PrepareConfig(**json.loads(sys.argv[1])))
    except ValueError as error:
        print(error)
        sys.exit(3)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Every format; some empty documents; one exact copy; two documents longer than a block."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "a.jsonl", 250)
    lines = (folder / "a.jsonl").read_text().splitlines(keepends=True)
    with lzma.open(folder / "b.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("".join(lines[:3]) + '{"text": "  "}\n{"text": ""}\n')
        file.writelines(json.dumps({"text": document(n)}) + "\n" for n in range(1000, 1100))
    texts = [document(n) for n in range(2000, 2050)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "id": range(50)}), folder / "c.parquet"
    )
    (folder / "txt").mkdir()
    for n in range(3):
        long = "\n".join(document(m) for m in range(3000 + 40 * n, 3040 + 40 * n))
        (folder / "txt" / f"{n}.txt.gz").write_bytes(gzip.compress(long.encode()))
    return folder


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory) -> PrepareConfig:
    return PrepareConfig(
        output=str(tmp_path_factory.mktemp("out") / "dataset"),
        sources={
            "mixed": (f"{corpus}/*.jsonl*", f"{corpus}/c.parquet"),
            "long": (f"{corpus}/txt",),
        },
        vocab_size=350,
        heldout_fraction=0.1,
        block_tokens=4096,
        shard_text_bytes=60_000,
        num_processes=1,
    )


@pytest.fixture(scope="module")
def dataset(config) -> Dataset:
    return Dataset.open(prepare(config))


def fingerprint(root: str | Path) -> dict[str, str]:
    """File -> hash of its bytes."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file()
    }


def run(config: PrepareConfig, **options) -> subprocess.Popen:
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(settings)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def document_tokens(dataset: Dataset) -> dict[int, tuple[set[str], list[int]]]:
    """document id -> (splits it lies in, its tokens)."""
    found: dict[int, tuple[set[str], list[int]]] = {}
    for split in SPLITS:
        for index in dataset.block_indices(split).tolist():
            block = dataset.read_block(index)
            ends = np.cumsum(block.document_lengths, dtype=np.int64).tolist()
            for key, start, end in zip(block.document_ids.tolist(), [0, *ends], ends, strict=False):
                splits, tokens = found.setdefault(key, (set(), []))
                splits.add(split)
                tokens += block.tokens[start:end].tolist()
    return found


def source_documents(corpus: Path) -> dict[int, str]:
    """document id -> text, read here by other means than the readers."""
    texts = {}
    for name, opened in (("a.jsonl", open), ("b.jsonl.xz", lzma.open)):
        with opened(corpus / name, "rt", encoding="utf-8") as lines:
            for n, line in enumerate(lines):
                texts[stable_hash64("mixed", f"{name}#{n}")] = json.loads(line)["text"]
    for n in range(50):
        texts[stable_hash64("mixed", f"c.parquet#{n}")] = document(2000 + n)
    for n in range(3):
        raw = (corpus / "txt" / f"{n}.txt.gz").read_bytes()
        texts[stable_hash64("long", f"{n}.txt.gz#0")] = gzip.decompress(raw).decode()
    return {key: text for key, text in texts.items() if text.strip()}


def test_every_document_comes_back(dataset, corpus):
    dataset.verify()
    texts, found = source_documents(corpus), document_tokens(dataset)
    assert set(found) == set(texts)
    exported = AutoTokenizer.from_pretrained(dataset.root / "tokenizer")
    processor = Tokenizer.load(dataset.root / "tokenizer")
    assert processor.digest == dataset.manifest["tokenizer"]["digest"]
    for key, text in texts.items():
        splits, tokens = found[key]
        assert len(splits) == 1
        assert tokens == exported(text, add_special_tokens=False, verbose=False)["input_ids"]
        normalised = unicodedata.normalize("NFKC", text)
        assert exported.decode(tokens) == " ".join(normalised.split())


def test_long_documents_are_in_parts(dataset):
    lengths = np.concatenate(
        [dataset.read_block(i).document_lengths for i in range(len(dataset.blocks))]
    )
    assert lengths.max() <= 4096
    assert dataset.manifest["sources"]["long"]["train"]["num_documents"] > 3


def test_copies_lie_on_one_side(dataset, corpus):
    texts, found = source_documents(corpus), document_tokens(dataset)
    sides: dict[str, set[str]] = {}
    for key, text in texts.items():
        sides.setdefault(text, set()).update(found[key][0])
    assert len(sides) < len(texts)  # there are copies
    assert all(len(side) == 1 for side in sides.values())


def test_documents_are_shuffled_over_the_source(dataset):
    """Neighbours in a file are not neighbours in the shards, and shards mix the files."""
    import zstandard

    path = dataset.root / "mixed/meta/mixed-train-000000.jsonl.zst"
    raw = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
    entries = [json.loads(line) for line in raw.splitlines()]
    assert {entry["file"] for entry in entries} == {"a.jsonl", "b.jsonl.xz", "c.parquet"}
    places = [(e["file"], e["record"]) for e in entries]
    neighbours = sum(b == (a[0], a[1] + 1) for a, b in itertools.pairwise(places))
    assert neighbours < len(places) / 10
    assert any(entry["id"] and entry["id"].startswith("doc") for entry in entries)


def test_entropies_are_those_of_the_tokens(dataset):
    counts = {split: Counter[int]() for split in SPLITS}
    for split in SPLITS:
        for index in dataset.block_indices(split):
            counts[split].update(dataset.read_block(int(index)).tokens.tolist())
    train, heldout = counts["train"], counts["heldout"]
    total = train.total()
    entropy = -sum(n / total * math.log(n / total) for n in train.values())
    assert dataset.manifest["unigram_entropy_nats"] == pytest.approx(entropy, abs=1e-8)
    cross = -sum(n * math.log((train[t] + 1) / (total + 350)) for t, n in heldout.items())
    assert dataset.manifest["heldout_unigram_nats"] == pytest.approx(
        cross / heldout.total(), abs=1e-8
    )


def test_nothing_but_the_dataset_is_left(dataset):
    assert {p.name for p in dataset.root.iterdir()} == {
        "manifest.json", "blocks.npy", "tokenizer", "prepare.json", "mixed", "long",
    }  # fmt: skip


def test_any_number_of_processes_gives_the_same_bytes(dataset, config, tmp_path):
    prepare(replace(config, output=str(tmp_path / "d"), num_processes=3))
    assert fingerprint(tmp_path / "d") == fingerprint(dataset.root)


def test_another_place_gives_the_same_dataset(dataset, config, corpus, tmp_path):
    moved = shutil.copytree(corpus, tmp_path / "moved")
    sources = {"long": (f"{moved}/txt/*",), "mixed": (f"{moved}/c.parquet", f"{moved}/*.jsonl*")}
    prepare(replace(config, output=str(tmp_path / "d"), sources=sources))
    assert Dataset.open(tmp_path / "d").digest == dataset.digest


def test_stripes_give_the_same_dataset(dataset, config, tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.STRIPE_BYTES", 5000)
    monkeypatch.setattr("data.spill.RUN_BYTES", 10_000)
    prepare(replace(config, output=str(tmp_path / "d")))
    assert Dataset.open(tmp_path / "d").digest == dataset.digest


def test_a_seed_changes_the_order(dataset, config, tmp_path):
    other = Dataset.open(prepare(replace(config, output=str(tmp_path / "d"), seed=2)))
    assert other.digest != dataset.digest
    assert set(document_tokens(other)) == set(document_tokens(dataset))


def test_finished_means_done(dataset, config, capsys):
    before = fingerprint(dataset.root)
    assert prepare(config) == dataset.root
    assert "is finished already" in capsys.readouterr().out
    assert fingerprint(dataset.root) == before


MOMENTS = [".work/scan/*", ".work/spill/*.tmp-*", ".work/spill/*.json", "mixed/*/*", "blocks.npy*"]


def test_killed_again_and_again(dataset, config, tmp_path):
    """SIGKILL in stage after stage; no worker lives on, and the last run leaves an unbroken one's bytes."""
    config = replace(config, output=str(tmp_path / "d"), num_processes=2)
    num_killed = 0
    for moment in MOMENTS:
        process = run(config, start_new_session=True)
        while process.poll() is None and not any((tmp_path / "d").glob(moment)):
            time.sleep(0.001)
        process.kill()
        process.communicate()  # returns when no worker holds the pipes any more
        num_killed += process.returncode == -signal.SIGKILL
        assert not session_members(process.pid)
    assert num_killed >= 4
    process = run(config)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    assert fingerprint(tmp_path / "d") == fingerprint(dataset.root)


def session_members(session: int) -> list[str]:
    """Live processes of a session."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.append(path.parent.name)
    return members


@pytest.mark.parametrize("stage", ["scan_file", "encode_stripe", "write_bucket", "publish_dataset"])
def test_stopped_in_each_stage(dataset, config, tmp_path, monkeypatch, stage):
    """An interruption after the second task of a stage, or before publishing."""
    import data.prepare

    config = replace(config, output=str(tmp_path / "d"))
    original, calls = getattr(data.prepare, stage), []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == (1 if stage == "publish_dataset" else 3):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(data.prepare, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert not (tmp_path / "d" / "manifest.json").exists()
    with pytest.raises(ValueError, match="no complete dataset"):
        Dataset.open(tmp_path / "d")
    (tmp_path / "d" / ".work" / "spill").mkdir(parents=True, exist_ok=True)
    (tmp_path / "d" / ".work" / "spill" / "x.spill.tmp-999999").write_bytes(
        b"left by a killed process"
    )
    prepare(config)
    assert fingerprint(tmp_path / "d") == fingerprint(dataset.root)


def test_a_full_disk(dataset, config, tmp_path):
    """A limit on the size of files stands for the disk: the error is the system's own."""
    config = replace(config, output=str(tmp_path / "d"))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    process = run(config, preexec_fn=limit)
    output, errors = process.communicate()
    assert process.returncode == 3, output + errors
    assert "no room to write" in output and str(tmp_path / "d") in output
    assert "bytes are free" in output and "run the same command again" in output
    prepare(config)
    assert fingerprint(tmp_path / "d") == fingerprint(dataset.root)


def test_two_at_once_are_refused(config, tmp_path):
    with (
        locked_folder(tmp_path / "d"),
        pytest.raises(ValueError, match="another `cloze prepare` is at work"),
    ):
        prepare(replace(config, output=str(tmp_path / "d")))


def test_foreign_folders_are_left_alone(config, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"not empty and holds no plan .*thesis\.tex"):
        prepare(replace(config, output=str(tmp_path / "d")))
    assert fingerprint(tmp_path / "d").keys() == {"thesis.tex"}
    with pytest.raises(ValueError, match="is a file"):
        prepare(replace(config, output=str(tmp_path / "d" / "thesis.tex")))


def test_another_config_is_refused_by_name(dataset, config, corpus, tmp_path):
    changed = replace(config, block_tokens=2048, seed=5, sources={"mixed": (f"{corpus}/a.jsonl",)})
    with pytest.raises(ValueError) as error:
        prepare(changed)
    for part in (
        "block_tokens was 4096, is 2048",
        "seed was 1, is 5",
        "file long: 0.txt.gz is no longer among the input",
        "another folder",
    ):
        assert part in str(error.value)


def test_changed_input_is_refused(config, corpus, tmp_path, monkeypatch):
    shutil.copy(corpus / "a.jsonl", tmp_path / "a.jsonl")
    config = replace(config, output=str(tmp_path / "d"), sources={"s": (f"{tmp_path}/a.jsonl",)})
    with monkeypatch.context() as patch:
        patch.setattr("data.prepare.encode_stripe", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"file s: a\.jsonl had \d+ bytes, has \d+"):
        prepare(config)


def _interrupt(*_):
    raise KeyboardInterrupt


def test_bad_input_is_told_at_once_and_may_be_corrected(config, corpus, tmp_path):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    first.write_text('{"text": "fine"}\nnot json\n')
    second.write_text('{"body": "x"}\n' * 30)
    changed = replace(
        config,
        output=str(tmp_path / "d"),
        sources={"s": (str(first), str(second), f"{corpus}/a.jsonl")},
    )
    with pytest.raises(ValueError) as error:
        prepare(changed)
    assert f"{first}:2: not JSON" in str(error.value)
    assert f"{second}:1: no field 'text'" in str(error.value)
    assert len(str(error.value).splitlines()) == 22
    assert list((tmp_path / "d").iterdir()) == []
    first.write_text('{"text": "fine"}\n')
    second.unlink()
    prepare(replace(changed, sources={"s": (str(first), f"{corpus}/a.jsonl")}))


def test_splits_that_cannot_be(config, corpus, tmp_path):
    changed = replace(config, output=str(tmp_path / "d"), sources={"s": (f"{corpus}/txt",)})
    with pytest.raises(
        ValueError, match=r"none of 3 documents is held out .* txt_documents=blank_line"
    ):
        prepare(replace(changed, heldout_fraction=1e-9))
    with pytest.raises(ValueError, match="no document is left to train on in source s"):
        prepare(replace(changed, heldout_fraction=1 - 1e-9))
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match=r"no document holds any text \(1 are empty\)"):
        prepare(replace(changed, sources={"s": (f"{tmp_path}/blank.jsonl",)}))


def test_empty_documents_are_counted(config, corpus, tmp_path, capsys):
    sources = {"s": (f"{corpus}/b.jsonl.xz",)}
    prepare(replace(config, output=str(tmp_path / "d"), sources=sources, heldout_fraction=0.2))
    output = capsys.readouterr().out
    assert "skipped 2 empty documents" in output
    assert "seconds: scan" in output and "unigram entropy" in output


def test_vocabulary_too_large(config, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size 30000 is larger .* largest possible is \d+"):
        prepare(replace(config, output=str(tmp_path / "d"), vocab_size=30000))
    prepare(replace(config, output=str(tmp_path / "d")))


def test_an_existing_tokenizer(dataset, config, tmp_path):
    (tmp_path / "model").mkdir()
    for path in (dataset.root / "tokenizer").iterdir():
        shutil.copy(path, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights do not belong to it")
    changed = replace(
        config, output=str(tmp_path / "d"), tokenizer=str(tmp_path / "model"), vocab_size=9999
    )
    again = Dataset.open(prepare(changed))
    assert again.digest == dataset.digest
    assert not (again.root / "tokenizer" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        prepare(replace(changed, output=str(tmp_path / "e"), tokenizer=str(tmp_path)))


def test_config_problems_are_told_together(config):
    with pytest.raises(ValueError) as error:
        replace(
            config, block_tokens=1, heldout_fraction=1.5, sources={"Bad-Name": ("x",), "empty": ()}
        )
    for part in ("block_tokens 1", "heldout_fraction 1.5", "'Bad-Name'", "at least one file"):
        assert part in str(error.value)


def test_large_vocabularies_take_four_bytes(tmp_path):
    """Ids beyond 65535 come back: an existing tokenizer with 70,000 words."""
    import tokenizers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: i for i, word in enumerate([*special, *(f"w{n}" for n in range(70_000))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore
    tokenizer.add_special_tokens(special)
    (tmp_path / "t").mkdir()
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    with open(tmp_path / "a.jsonl", "w") as file:
        for n in range(100):
            file.write(json.dumps({"text": f"w{69_900 + n} w{n}. w69999"}) + "\n")
    dataset = Dataset.open(
        prepare(
            PrepareConfig(
                output=str(tmp_path / "d"),
                sources={"s": (f"{tmp_path}/a.jsonl",)},
                tokenizer=str(tmp_path / "t"),
                heldout_fraction=0.2,
                num_processes=1,
            )
        )
    )
    assert dataset.token_dtype.itemsize == 4 and dataset.vocab_size == 70_005
    tokens = document_tokens(dataset)
    for n in range(100):
        ids = [69_905 + n, n + 5, 1, 70_004]
        assert tokens[stable_hash64("s", f"a.jsonl#{n}")][1] == ids


assert os.name == "posix"  # flock, SIGKILL and file size limits are used above
