"""Text that spells the name of a byte or a special token stays text, whatever the vocabulary lacks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from support import document, write_corpus
from transformers import AutoTokenizer

from data.prepare import PrepareConfig, prepare
from data.sentences import sentence_ends
from data.shards import Dataset
from data.tokenizer_hf import missing_characters, read_model
from data.tokenizer_literals import refuse_matched_literals
from data.tokenizer_train import train_tokenizer
from data.tokenizer_verify import verify_tokenizer
from data.vocab import MODEL_FILE, Tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LITERALS = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
EXTRA = {  # what a corpus has besides words -> characters of LITERALS that it lacks
    "": "0123456789<>[]",
    "<>": "0123456789[]",
    "0x41>": "<[]",
    "<0x41": "56789>[]",
    "01289 x4 1 [MASK]": "<>",
    "[ ]<0x3456789": "12>",
}


def texts() -> list[str]:
    every = [f"a{literal}b {literal} ＜{literal[1:]}" for literal in LITERALS]
    pairs = [f"<{literal}> [{literal}] {literal}{literal}.." for literal in LITERALS]
    broken = [
        "＜0x41＞ <<0x41>> <0x4 1> <0x4<0x41> <0xx41> <0x1> <0xg1> <0x4a>",
        "<" * 50,
        "[[" * 9,
    ]
    return [*LITERALS, *every, *pairs, *broken, "他说<0xE4><0xB8><0xAD>[MASK]。", document(7)]


def trained(folder: Path, extra: str, kind: str = "unigram") -> Path:
    words = [document(n) for n in range(300)] + [extra] * 300
    train_tokenizer(words, folder, vocab_size=380, kind=kind)  # pyright: ignore[reportArgumentType]
    return folder


def without_cure(folder: Path) -> None:
    """tokenizer.json as it was written before: nothing takes unknown characters apart."""
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    description["pre_tokenizer"] = description["pre_tokenizer"]["pretokenizers"][0]
    path.write_text(json.dumps(description))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("extra", EXTRA)
def test_literals_have_the_ids_of_transformers(tmp_path, extra, kind):
    folder = trained(tmp_path / "t", extra, kind)
    lacking = missing_characters(read_model((folder / MODEL_FILE).read_bytes()))
    assert set(EXTRA[extra]) <= set(lacking)
    tokenizer, exported = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts():
        ours = tokenizer.encode(text, sentence_ends(text)).ids.tolist()
        theirs = exported(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        assert theirs["input_ids"] == ours, text
    assert exported("a[MASK]b")["input_ids"].count(4) == 1  # still one where it is asked for
    assert "verified" in verify_tokenizer(tokenizer, texts())


def test_only_the_missing_characters_are_taken_apart(tmp_path):
    folder = trained(tmp_path / "t", "")
    exported = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = exported.pre_tokenizer.pre_tokenize_str("the▁red<0▁fox")  # pyright: ignore
    assert [word for word, _ in words] == ["▁the", "▁red", "<", "0", "▁fox"]


def test_a_given_tokenizer_of_the_first_versions(tmp_path):
    """Its tokenizer.json makes a byte of the literal: refused; the model alone is exported anew."""
    given = trained(tmp_path / "given", "")
    refuse_matched_literals(given)
    without_cure(given)
    with pytest.raises(ValueError, match="does not give the ids"):
        refuse_matched_literals(given)
    source = write_corpus(tmp_path / "a.jsonl", 120)
    config = PrepareConfig(
        output=str(tmp_path / "d"),
        sources={"a": (str(source),)},
        tokenizer=str(given),
        heldout_fraction=0.1,
        num_processes=1,
    )
    with pytest.raises(ValueError, match=r"'\[PAD\]' becomes .* alone: its Hugging Face form"):
        prepare(config)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(given / MODEL_FILE, alone)
    dataset = Dataset.open(prepare(replace(config, tokenizer=str(alone)), verify_tokenizer))
    trained(tmp_path / "again", "")
    for path in (tmp_path / "again").iterdir():
        assert (dataset.root / "tokenizer" / path.name).read_bytes() == path.read_bytes()
