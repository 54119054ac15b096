"""A dataset prepared with an exported model's tokenizer has, to the byte, that of the model's own dataset."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import document, write_corpus
from transformers import BertTokenizerFast

from data.prepare import PrepareConfig, prepare
from data.shards import Dataset
from data.tokenizer_train import train_tokenizer
from model.config import ModelConfig
from model.hf_tokenizer import copy_tokenizer


def foreign(folder: Path) -> Path:
    """A published BERT's folder: its own order of keys, length and words, and files that we never write."""
    words = [document(n) for n in range(100)]
    train_tokenizer(words, folder, vocab_size=200, kind="wordpiece", lowercase=True)
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_max_length=384)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    (folder / "added_tokens.json").write_text("{}")
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content = {"name": "modèle", **dict(reversed(content.items()))}
    content.pop("model_input_names", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "foreign"])
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_a_run_goes_on_with_the_tokenizer_that_it_exported(tmp_path, kind, architecture):
    config = PrepareConfig(
        output=str(tmp_path / "first"),
        sources={"a": (str(write_corpus(tmp_path / "a.jsonl", 120)),)},
        tokenizer_kind="unigram" if kind == "foreign" else kind,
        vocab_size=200 if kind == "wordpiece" else 380,
        heldout_fraction=0.1,
        num_processes=1,
    )
    if kind == "foreign":
        config = replace(config, tokenizer=str(foreign(tmp_path / "published")))
    first = Dataset.open(prepare(config))
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    model = ModelConfig(architecture=architecture, max_position_embeddings=128)
    copy_tokenizer(first.root / "tokenizer", hf, model)
    changed = json.loads((hf / "tokenizer_config.json").read_text())
    assert changed["model_max_length"] == 128
    again = replace(config, output=str(tmp_path / "second"), tokenizer=str(hf))
    second = Dataset.open(prepare(again))
    assert second.manifest["tokenizer"] == first.manifest["tokenizer"]
    assert second.digest == first.digest
    names = sorted(path.name for path in (first.root / "tokenizer").iterdir())
    assert names == sorted(path.name for path in (second.root / "tokenizer").iterdir())
