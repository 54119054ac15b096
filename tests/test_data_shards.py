"""Shards: what is written is read back, plain webdataset reads it too, and no damage goes unseen."""

import gc
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard

from data.files import folder_digest
from data.shard_writer import (
    ShardAddress,
    TokenisedDocument,
    document_parts,
    publish_dataset,
    write_shard,
)
from data.shards import BLOCK_DTYPE, Block, Dataset

VOCAB_SIZE = 90


def make_documents(num_documents: int, seed: int, dtype: str = "<u2") -> list[TokenisedDocument]:
    rng = np.random.default_rng(seed)
    documents = []
    for number in range(num_documents):
        num_tokens = int(rng.integers(1, 400))
        cuts = np.unique(np.append(rng.integers(1, num_tokens + 1, 4), num_tokens))
        tokens = rng.integers(5, VOCAB_SIZE, num_tokens).astype(dtype)
        words = rng.random(num_tokens) < 0.5
        own_id = f"文{number}" if number % 2 else None
        lengths = np.diff(cuts, prepend=0)
        key = int(rng.integers(1 << 63)) * 2 + 1
        documents.append(TokenisedDocument(key, own_id, "a/b.txt", number, tokens, lengths, words))
    return documents


def make_dataset(root: Path, token_dtype: str = "u16") -> list[TokenisedDocument]:
    """One source, two training shards and one held-out shard; returns the training documents."""
    documents = make_documents(
        60, seed=1, dtype="<" + token_dtype.replace("u16", "u2").replace("u32", "u4")
    )
    shares = {
        ("train", 0): documents[:40],
        ("train", 1): documents[40:],
        ("heldout", 0): documents[:5],
    }
    written = []
    for (split, shard), share in shares.items():
        address = ShardAddress("src", 0, split, shard)
        shard_written = write_shard(
            root, address, share, block_tokens=1000, token_dtype=token_dtype, vocab_size=VOCAB_SIZE
        )
        written.append((address, shard_written))
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    facts = {
        "vocab_size": VOCAB_SIZE,
        "token_dtype": token_dtype,
        "block_tokens": 1000,
        "tokenizer": {"digest": folder_digest(root / "tokenizer"), "special_ids": {"[PAD]": 0}},
    }
    publish_dataset(root, facts, ["src"], written)
    return documents


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    make_dataset(root)
    return root


@pytest.fixture
def root(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "dataset"))


def read_documents(
    dataset: Dataset, split: str
) -> list[tuple[int, list[int], list[int], list[bool]]]:
    """(id, tokens, sentence lengths, word starts) of each document, in table order."""
    documents = []
    for index in dataset.block_indices(split):
        block = dataset.read_block(int(index))
        words = np.unpackbits(block.word_starts, bitorder="little").astype(bool)
        token = sentence = 0
        for i, length in enumerate(block.document_lengths.tolist()):
            count = int(block.sentences_per_document[i])
            documents.append(
                (
                    int(block.document_ids[i]),
                    block.tokens[token : token + length].tolist(),
                    block.sentence_lengths[sentence : sentence + count].tolist(),
                    words[token : token + length].tolist(),
                )
            )
            token, sentence = token + length, sentence + count
    return documents


@pytest.mark.parametrize("token_dtype", ["u16", "u32"])
def test_round_trip(tmp_path, token_dtype):
    documents = make_dataset(tmp_path, token_dtype)
    dataset = Dataset.open(tmp_path)
    dataset.verify()
    expected = [
        (d.document_id, d.tokens.tolist(), d.sentence_lengths.tolist(), d.word_starts.tolist())
        for d in documents
    ]
    assert read_documents(dataset, "train") == expected
    assert read_documents(dataset, "heldout") == expected[:5]
    block = dataset.read_block(0)
    assert block.tokens.dtype.itemsize == (2 if token_dtype == "u16" else 4)
    assert [a.dtype.str for a in block[1:]] == ["<u4", "<u4", "<u2", "|u1", "<u8"]
    assert int(dataset.blocks["num_tokens"].max()) <= 1000


def test_table_and_manifest_agree(original):
    dataset = Dataset.open(original)
    assert dataset.blocks.dtype == BLOCK_DTYPE and isinstance(dataset.blocks, np.memmap)
    train = dataset.blocks[dataset.block_indices("train")]
    counts = dataset.manifest["sources"]["src"]["train"]
    assert counts["num_documents"] == 60 == train["num_documents"].sum()
    assert counts["num_tokens"] == train["num_tokens"].sum()
    assert counts["num_sentences"] == train["num_sentences"].sum()
    assert [s["path"] for s in counts["shards"]] == [
        f"src/train/src-train-00000{i}.tar" for i in (0, 1)
    ]
    assert len(dataset.block_indices("train", "src")) == len(train)
    with pytest.raises(ValueError, match="source 'other' is none of"):
        dataset.block_indices("train", "other")


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning"
)  # webdataset leaves its files to the collector
def test_plain_webdataset_reads_the_shards(original):
    dataset = Dataset.open(original)
    urls = [
        str(original / s["path"]) for s in dataset.manifest["sources"]["src"]["train"]["shards"]
    ]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()
    indices = dataset.block_indices("train")
    assert len(samples) == len(indices)  # the index member is passed over
    assert samples[0]["__key__"] == "src-train-000000-00000"
    for sample, index in zip(samples, indices, strict=True):
        block = dataset.read_block(int(index))
        names = ("tok.u16", "doc.u32", "nse.u32", "sen.u16", "wrd.bit", "ids.u64")
        assert [sample[name] for name in names] == [array.tobytes() for array in block]


def test_index_member_tells_a_whole_shard(original):
    with tarfile.open(original / "src/train/src-train-000001.tar") as tar:
        members = tar.getmembers()
        last = tar.extractfile(members[-1])
        assert last is not None
        index = json.loads(last.read())
    assert members[-1].name == "__index__"
    assert index["shard"] == "src-train-000001"
    assert index["num_blocks"] == (len(members) - 1) // 6
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


def test_metadata_follows_the_shard(original):
    raw = (original / "src/meta/src-train-000000.jsonl.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().stream_reader(raw).read().decode().splitlines()
    entries = [json.loads(line) for line in lines]
    documents = [d for d in read_documents(Dataset.open(original), "train")][:40]
    assert [int(e["document_id"], 16) for e in entries] == [d[0] for d in documents]
    assert [e["num_tokens"] for e in entries] == [len(d[1]) for d in documents]
    assert entries[1] | {"id": "文1", "file": "a/b.txt", "record": 1} == entries[1]


def test_the_same_documents_give_the_same_bytes(original, tmp_path):
    make_dataset(tmp_path)
    names = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(original) for p in original.rglob("*") if p.is_file())
    assert all((tmp_path / n).read_bytes() == (original / n).read_bytes() for n in names)


def test_long_documents_are_cut_at_sentence_ends():
    lengths = np.array([300, 500, 250, 1200, 10])
    tokens = np.arange(2260, dtype="<u2")
    document = TokenisedDocument(7, None, "f", 0, tokens, lengths, tokens % 3 == 0)
    parts = document_parts(document, 1000)
    assert [p.sentence_lengths.tolist() for p in parts] == [[300, 500], [250], [1000], [200, 10]]
    assert np.array_equal(np.concatenate([p.tokens for p in parts]), tokens)
    assert np.array_equal(np.concatenate([p.word_starts for p in parts]), tokens % 3 == 0)
    assert all(len(p.tokens) == p.sentence_lengths.sum() <= 1000 for p in parts)


def test_every_flipped_byte_of_a_block_is_noticed(root):
    dataset = Dataset.open(root)
    row = dataset.blocks[1]
    path = dataset.shard_of(1)
    sound = path.read_bytes()
    assert isinstance(dataset.read_block(1), Block)
    start, nbytes = int(row["offset"]), int(row["nbytes"])
    for place in range(start, start + nbytes, 97):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"block 1 .*damaged.*{int(row['xxh3']):016x}"):
            dataset.read_block(1)
        dataset.read_block(0)  # only that block is lost
    with pytest.raises(ValueError, match=r"src-train-000000\.tar: xxh3 is"):
        dataset.verify()


def test_a_shard_cut_off_is_noticed(root):
    path = root / "src/train/src-train-000000.tar"
    size = path.stat().st_size
    dataset = Dataset.open(root)
    os.truncate(path, size // 2)
    with pytest.raises(ValueError, match=f"has {size // 2} bytes, manifest says {size}"):
        Dataset.open(root)
    last = int(dataset.block_indices("train")[-1])
    broken = [i for i in range(last) if int(dataset.blocks[i]["shard"]) == 0][-1]
    with pytest.raises(ValueError, match="cut off"):
        dataset.read_block(broken)


def test_all_problems_are_told_at_once(root):
    (root / "src/train/src-train-000000.tar").unlink()
    (root / "tokenizer/tokenizer.json").write_text("{ }")
    table = bytearray((root / "blocks.npy").read_bytes())
    table[-1] ^= 1
    (root / "blocks.npy").write_bytes(table)
    with pytest.raises(ValueError) as error:
        Dataset.open(root)
    for part in ("src-train-000000.tar is missing", "tokenizer/: the digest", "blocks.npy: xxh3"):
        assert part in str(error.value)


def test_what_is_no_dataset(tmp_path, root):
    with pytest.raises(ValueError, match="is not a folder"):
        Dataset.open(tmp_path / "nowhere")
    (root / "manifest.json").write_text('{"format": "cloze-shards-v9"}')
    with pytest.raises(
        ValueError, match=r"'cloze-shards-v9'; this version reads 'cloze-shards-v1'"
    ):
        Dataset.open(root)
    (root / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Dataset.open(root)
    (root / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no complete dataset"):
        Dataset.open(root)
