"""cloze shards: verify finds every kind of damage at once; stat counts what is there."""

import argparse
import json
import os
import shutil

import numpy as np
import pytest
from prepare_support import config, corpus, dataset

from data.dataset_check import dataset_problems
from data.manifest import OPTIONAL, sealed
from data.shards import SPLITS, Dataset
from data.vocab import Tokenizer
from launcher.shards import add_arguments, run

__all__ = ["config", "corpus", "dataset"]  # fixtures, used by name


def shards(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset.root, tmp_path / "dataset")


def test_a_sound_dataset(dataset, capsys):
    assert shards("verify", dataset.root, "--processes", 2) == 0
    assert f"is sound: {len(dataset.blocks):,} blocks" in capsys.readouterr().out


def test_all_damage_is_told_together(copy):
    tars = sorted((copy / "mixed" / "train").iterdir())
    data = bytearray(tars[0].read_bytes())
    data[5000] ^= 1
    tars[0].write_bytes(data)
    tars[1].write_bytes(tars[1].read_bytes()[:-1024])
    tars[2].unlink()
    metas = sorted((copy / "mixed" / "meta").glob("*train*"))
    metas[0].unlink()
    shutil.copy(metas[3], metas[4])
    (copy / "thesis.tex").write_text("does not belong here")
    (copy / ".work").mkdir()
    (copy / ".work" / "x.spill").write_text("")
    (copy / "mixed" / "train" / f"x.tar.tmp-{os.getpid()}").write_text("")
    with pytest.raises(ValueError) as error:
        shards("verify", copy, "--processes", 1)
    message = str(error.value)
    for part in (
        f"{tars[0].name}: xxh3 is",
        f"{tars[0].name}, bytes 0 to",  # the block, by its own hash
        f"{tars[0].name}: __index__ says digest",
        f"{tars[1].name} has",
        f"{tars[2].name} is missing",
        f"{metas[0].name} is missing",
        f"{metas[4].name}: num_tokens is",
        "thesis.tex does not belong here",
        ".work/x.spill was left over",
        "x.tar.tmp-",
    ):
        assert part in message, part


@pytest.mark.parametrize("region", ["first", "middle", "index", "padding"])
def test_a_flipped_bit_anywhere_is_found(copy, region):
    path = sorted((copy / "long" / "train").iterdir())[0]
    size = path.stat().st_size
    place = {"first": 3, "middle": size // 2, "index": size - 10_000, "padding": size - 5}[region]
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)
    assert any(f"{path.name}: xxh3 is" in problem for problem in dataset_problems(copy, 1))


def test_a_manifest_that_disagrees_with_the_table(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["sources"]["long"]["train"]["num_tokens"] += 1
    moved = manifest["sources"]["mixed"]["train"]["shards"].pop()
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    problems = "\n".join(dataset_problems(copy, 1))
    assert "long train: num_tokens is" in problems
    assert f"{moved['path']} is not in the manifest" in problems
    assert f"{moved['path']} does not belong here" in problems


def test_damaged_tables(copy):
    (copy / "blocks.npy").write_bytes(b"nonsense")
    problems = dataset_problems(copy, 1)
    assert any("blocks.npy has 8 bytes" in problem for problem in problems)
    assert "needs a sound blocks.npy" in problems[-1]
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        shards("verify", copy)


def test_stat_counts_what_is_there(dataset, capsys):
    assert shards("stat", dataset.root, "--json", "--tokens", 1_000_000, "--processes", 1) == 0
    stats = json.loads(capsys.readouterr().out)
    assert [(s["source"], s["split"]) for s in stats] == [
        (source, split) for source in dataset.sources for split in SPLITS
    ]
    train = sum(s["tokens"] for s in stats if s["split"] == "train")
    processor = Tokenizer.load(dataset.root / "tokenizer")
    for found in stats:
        rows = dataset.block_indices(found["split"], found["source"])
        blocks = [dataset.read_block(int(index)) for index in rows]
        tokens = np.concatenate([np.array([], np.uint16), *(block.tokens for block in blocks)])
        assert found["tokens"] == len(tokens)
        assert found["documents"] == sum(len(block.document_lengths) for block in blocks)
        assert found["sentences"] == sum(len(block.sentence_lengths) for block in blocks)
        assert found["blocks"] == len(blocks)
        unknown = np.count_nonzero(tokens == processor.special_ids["[UNK]"])
        assert found["unknown_share"] == unknown / max(1, len(tokens))
        assert found["epochs"] == (1_000_000 / train if found["split"] == "train" else None)


def test_bytes_per_token_are_those_of_the_text(dataset):
    """By the tokenizer's own decoding of every document."""
    import sentencepiece

    from data.dataset_stat import dataset_stats

    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(dataset.root / "tokenizer" / "sentencepiece.model")
    )
    nbytes = num_tokens = 0
    for index in dataset.block_indices("heldout", "mixed").tolist():
        block = dataset.read_block(index)
        ends = np.cumsum(block.document_lengths).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            text = processor.decode(block.tokens[start:end].tolist())
            nbytes += len(text.encode()) + 1  # the space before a document's first word
        num_tokens += len(block.tokens)
    stats = {(s.source, s.split): s for s in dataset_stats(Dataset.open(dataset.root), 1)}
    assert stats["mixed", "heldout"].bytes_per_token == pytest.approx(nbytes / num_tokens)


def test_the_table(dataset, capsys):
    shards("stat", dataset.root, "--tokens", 123_456_789, "--processes", 1)
    output = capsys.readouterr().out
    assert "mixed   train" in output and "UNK" in output
    assert "123,456,789 tokens are" in output
    manifest = dataset.manifest
    assert f"{manifest['bigram_entropy_nats']:.4f} given the token before it" in output
    assert f"{manifest['source_unigram_entropy_nats']['mixed']:.4f}\n" in output


def test_a_dataset_of_an_earlier_version_has_no_word_of_pairs(copy, capsys):
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in OPTIONAL:
        del manifest[name]
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    shards("stat", copy, "--processes", 1)
    assert "says nothing of pairs of tokens" in capsys.readouterr().out
    manifest["bigram_entropy_nats"] = "4"
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ValueError, match="bigram_entropy_nats is '4', not a number from 0 on"):
        Dataset.open(copy)
