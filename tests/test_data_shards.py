"""Shards: what is written is read back, plain webdataset reads it too, and no damage goes unseen."""

import errno
import gc
import json
import os
import pickle
import random
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard
from damage_support import KINDS, SILENT, damage_dataset
from shard_support import make_dataset, read_documents

from data.files import file_digest
from data.manifest import SEAL, sealed
from data.shard_writer import TokenisedDocument, document_parts
from data.shards import BLOCK_DTYPE, Block, DamagedBlock, Dataset, UnreachableBlock


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    make_dataset(root)
    return root


@pytest.fixture
def root(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "dataset"))


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
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))  # pyright: ignore[reportAttributeAccessIssue]
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
        with pytest.raises(DamagedBlock, match=f"block 1 .*damaged.*{int(row['xxh3']):016x}") as e:
            dataset.read_block(1)
        assert (e.value.index, e.value.shard, e.value.offset) == (1, str(path), start)
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
    with pytest.raises(DamagedBlock, match="cut off"):
        dataset.read_block(broken)
    path.unlink()
    with pytest.raises(UnreachableBlock, match=f"block {broken} .*No such file") as error:
        dataset.read_block(broken)
    assert error.value.index == broken


def test_an_edited_manifest_is_refused_and_one_of_earlier_versions_read(root):
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["special_ids"]["[PAD]"] = 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged, or was edited: the digest"):
        Dataset.open(root)
    del manifest[SEAL]
    path.write_text(json.dumps(manifest))
    assert Dataset.open(root).special_ids["[PAD]"] == 1


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


def test_ids_and_sums_that_cannot_be_are_refused(root):
    """The bytes are those that were written, but what wrote them was wrong: checked before any embedding."""
    dataset = Dataset.open(root)
    largest = int(dataset.read_block(0).tokens.max())
    dataset.vocab_size = largest
    with pytest.raises(DamagedBlock, match=f"token id {largest} with a vocabulary of {largest}"):
        dataset.read_block(0)
    for name in ("num_tokens", "num_documents", "num_sentences"):
        dataset = Dataset.open(root)
        dataset.blocks = np.array(dataset.blocks)
        dataset.blocks[name][0] += 1
        with pytest.raises(DamagedBlock, match=rf"block 0 .* is inconsistent: {name[4:]} against"):
            dataset.read_block(0)


def regions_of(shard: Path) -> dict[str, list[int]]:
    """Positions of bytes to flip: of headers, payloads, padding, the index and the archive's end."""
    found: dict[str, list[int]] = {
        name: [] for name in ("header", "payload", "padding", "index", "end")
    }
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    for member in members[:-1]:
        start, stop = member.offset_data, member.offset_data + member.size
        found["header"] += [member.offset, member.offset + 124, member.offset + 150, start - 1]
        found["payload"] += [start, (start + stop) // 2, stop - 1]
        found["padding"] += [stop, stop + -stop % 512 - 1] if stop % 512 else []
    found["index"] = [members[-1].offset, members[-1].offset_data, members[-1].offset_data + 20]
    end = members[-1].offset_data + 512
    found["end"] = [end, (end + shard.stat().st_size) // 2, shard.stat().st_size - 1]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_is_silent(kind, root):
    found = damage_dataset(root, kind, 150, random.Random(1))
    assert SILENT not in found and found["refused when read"] > 30, found
    Dataset.open(root).verify()  # all was undone


def samples_of(shard: Path) -> list[dict[str, bytes]] | str:
    """What webdataset makes of a shard: samples, or the error it raises."""
    data = webdataset.WebDataset([str(shard)], shardshuffle=False, empty_check=False)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return [{k: v for k, v in sample.items() if k[0] != "_"} for sample in data]
    except Exception as error:
        return type(error).__name__


def read_all(dataset: Dataset) -> list[bytes | DamagedBlock]:
    """The bytes of each block's arrays, or what it raised."""
    blocks: list[bytes | DamagedBlock] = []
    for index in range(len(dataset.blocks)):
        try:
            blocks.append(b"".join(array.tobytes() for array in dataset.read_block(index)))
        except DamagedBlock as error:
            blocks.append(error)
    return blocks


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_flipped_byte_anywhere_in_a_shard_hurts_its_block_and_no_other(root, record_property):
    dataset = Dataset.open(root)
    sound = read_all(dataset)
    shard = root / "src/heldout/src-heldout-000000.tar"
    raw, theirs = shard.read_bytes(), samples_of(shard)
    tally: Counter[str] = Counter()
    for region, places in regions_of(shard).items():
        for place in places:
            damaged = bytearray(raw)
            damaged[place] ^= 0x01
            shard.write_bytes(damaged)
            for index, block in enumerate(read_all(Dataset.open(root))):
                row = dataset.blocks[index]
                inside = 0 <= place - int(row["offset"]) < int(row["nbytes"])
                if inside and dataset.shard_of(index) == shard:
                    assert isinstance(block, DamagedBlock), (region, place)
                    assert block.index == index and "src-heldout-000000.tar" in str(block)
                else:
                    assert block == sound[index]
            tally[compared(theirs, samples_of(shard))] += 1
            with pytest.raises(ValueError, match=r"src-heldout-000000\.tar: xxh3"):
                dataset.verify()
    gc.collect()  # webdataset leaves its files to the collector
    record_property("webdataset, one byte flipped", dict(tally))
    print(f"webdataset, one byte flipped: {tally}")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_shard_cut_off_anywhere_is_noticed(root, record_property):
    dataset = Dataset.open(root)
    sound = read_all(dataset)
    shard = root / "src/heldout/src-heldout-000000.tar"
    raw, theirs = shard.read_bytes(), samples_of(shard)
    tally: Counter[str] = Counter()
    for nbytes in range(0, len(raw), 512):
        shard.write_bytes(raw[:nbytes])
        with pytest.raises(ValueError, match=rf"src-heldout-000000\.tar has {nbytes} bytes"):
            Dataset.open(root)
        for index, block in enumerate(read_all(dataset)):  # opened before the damage
            row = dataset.blocks[index]
            if dataset.shard_of(index) == shard and row["offset"] + row["nbytes"] > nbytes:
                assert isinstance(block, DamagedBlock) and "src-heldout-000000.tar" in str(block)
            else:
                assert block == sound[index]
        tally[compared(theirs, samples_of(shard))] += 1
    gc.collect()
    record_property("webdataset, cut off", dict(tally))
    print(f"webdataset, cut off: {tally}")


def compared(whole: list[dict[str, bytes]] | str, found: list[dict[str, bytes]] | str) -> str:
    assert isinstance(whole, list)
    if isinstance(found, str):
        return "error"
    if found == whole:
        return "same"
    return "lost samples" if all(sample in whole for sample in found) else "wrong bytes"


def test_a_disk_error_is_damage(root, monkeypatch):
    """EIO is what a bad sector gives."""
    dataset = Dataset.open(root)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DamagedBlock, match=r"block 0 .*Input/output error"):
        dataset.read_block(0)


def test_a_pickled_dataset_maps_its_table_anew(root):
    dataset = Dataset.open(root)
    sent = pickle.dumps(dataset)
    assert len(sent) < 10_000
    copy = pickle.loads(sent)
    assert isinstance(copy.blocks, np.memmap) and copy.digest == dataset.digest
    assert read_all(copy) == read_all(dataset)


def calls_of(work: Callable[[], object]) -> int:
    """How many Python and C functions `work` calls."""
    num_calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return num_calls


def test_opening_costs_no_work_per_block(root):
    """A table of a million blocks is mapped; nothing of Python runs once per row."""
    num_calls = {}
    first, last = (Dataset.open(root).blocks[i].copy() for i in (0, -1))
    for num_blocks in (1_000, 1_000_000):
        table = np.full(num_blocks, first, BLOCK_DTYPE)
        table[-(num_blocks // 50) :] = last
        np.save(root / "blocks.npy", table)
        manifest = json.loads((root / "manifest.json").read_text())
        nbytes = (root / "blocks.npy").stat().st_size
        manifest["blocks"] = {
            "nbytes": nbytes,
            "xxh3": file_digest(root / "blocks.npy"),
            "num_blocks": num_blocks,
        }
        (root / "manifest.json").write_text(json.dumps(sealed(manifest)))

        def work(expected: int = num_blocks) -> None:
            dataset = Dataset.open(root)
            assert isinstance(dataset.blocks, np.memmap) and len(dataset.blocks) == expected
            assert len(dataset.block_indices("train", "src")) == expected - expected // 50

        work()
        num_calls[num_blocks] = calls_of(work)
    # the digest is taken of pieces of 1 MiB: two calls for each of the 43 MB; rows are checked 65,536 at a time
    assert num_calls[1_000_000] < num_calls[1_000] + 150 + 16 * 250
