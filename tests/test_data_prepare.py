"""prepare: every document of a corpus lies in the dataset, once, in a reproducible place."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from prepare_support import config, corpus, dataset, document_tokens, fingerprint, source_documents
from support import ROOT
from transformers import AutoTokenizer

from data.hashing import stable_hash64
from data.prepare import PrepareConfig, prepare
from data.shard_writer import tar_sample
from data.shards import SPLITS, Dataset
from data.vocab import Tokenizer

__all__ = ["config", "corpus", "dataset"]  # fixtures, used by name


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
    monkeypatch.setattr("data.stages.PART_BYTES", 5000)
    monkeypatch.setattr("data.spill.RUN_BYTES", 10_000)
    prepare(replace(config, output=str(tmp_path / "d")))
    assert Dataset.open(tmp_path / "d").digest == dataset.digest


def test_a_seed_changes_the_order(dataset, config, tmp_path):
    other = Dataset.open(prepare(replace(config, output=str(tmp_path / "d"), seed=2)))
    assert other.digest != dataset.digest
    assert set(document_tokens(other)) == set(document_tokens(dataset))


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


def test_samples_are_written_as_webdataset_writes_them():
    import io

    from webdataset.writer import TarWriter

    members = {"tok.u16": b"x" * 700, "doc.u32": b"", "wrd.bit": b"y" * 512}
    buffer = io.BytesIO()
    writer = TarWriter(buffer, user="", group="", mtime=0, encoder=False, compress=False)
    writer.write({"__key__": "wiki-train-000003-00017", **members})
    nbytes = writer.tarstream.offset
    writer.close()
    expected = buffer.getvalue()[:nbytes]
    assert tar_sample("wiki-train-000003-00017", members) == expected


def test_workers_do_not_import_the_program_that_starts_them(tmp_path):
    """A user's script has torch at its top, and `cloze` too: no worker needs to wait for that."""
    (tmp_path / "tasks.py").write_text(
        "import sys\n\ndef modules(task):\n    return 'torch' in sys.modules\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom data.pool import run_tasks\nfrom tasks import modules\n\n"
        "if __name__ == '__main__':\n    print(sorted(run_tasks(modules, [1, 2, 3], 2)))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == "[(1, False), (2, False), (3, False)]\n"


def test_workers_import_neither_torch_nor_transformers():
    """A second and 200 MB for each of them."""
    code = "import sys, data.prepare, data.append, data.prepare_tasks; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert not {"torch", "transformers", "ray", "webdataset"} & set(done.stdout.split())
