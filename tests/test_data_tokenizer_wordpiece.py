"""WordPiece tokenizers that are trained here: transformers loads them as BERT's, with the same ids."""

import json
import subprocess
import sys

import pytest
from support import ROOT, document
from test_data_vocab import HARD_TEXTS, real, strange_texts
from transformers import AutoTokenizer, BertTokenizerFast

from data.sentences import sentence_ends
from data.tokenizer_train import train_tokenizer
from data.tokenizer_verify import verify_tokenizer
from data.vocab import Tokenizer

SIZE = 250
SCRIPT = """
import sys
from support import document
from data.tokenizer_train import train_tokenizer
texts = (document(n) for n in range(300))
train_tokenizer(texts, sys.argv[1], vocab_size=250, kind="wordpiece", lowercase=True)
"""


def texts() -> list[str]:
    return [document(n) for n in range(300)]


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordpiece") / "t"
    train_tokenizer(texts(), folder, vocab_size=SIZE, kind="wordpiece", lowercase=request.param)
    return folder


def test_transformers_takes_it_for_berts(folder):
    for exported in (
        AutoTokenizer.from_pretrained(folder),
        BertTokenizerFast.from_pretrained(folder),
    ):
        assert "Bert" in type(exported).__name__
        pair = exported("Our captain", "the old clock")
        assert pair["input_ids"][0] == 2 and pair["input_ids"].count(3) == 2
        assert pair["token_type_ids"] == [0] * (pair["input_ids"].index(3) + 1) + [1] * (
            len(pair["input_ids"]) - pair["input_ids"].index(3) - 1
        )
        assert exported.model_max_length == 512
        lower = json.loads((folder / "tokenizer_config.json").read_text())["do_lower_case"]
        assert (exported.tokenize("OUR") == exported.tokenize("our")) == lower
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(lines) == SIZE
    assert exported.convert_ids_to_tokens(list(range(SIZE))) == lines


def test_ids_are_those_of_transformers(folder):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.kind == "wordpiece" and tokenizer.vocab_size == SIZE
    said = verify_tokenizer(tokenizer, [*texts()[:100], *HARD_TEXTS, *strange_texts(100)])
    assert "tokenizer verified" in said


def test_batches_give_what_words_by_themselves_give(folder, monkeypatch):
    monkeypatch.setattr("data.word_cache.MAX_WORDS", 100)
    tokenizer = Tokenizer.load(folder)
    every = [*texts()[:30], *HARD_TEXTS, *strange_texts(60), *texts()[:30]]
    for start in range(0, len(every), 13):
        batch = every[start : start + 13]
        ends = [sentence_ends(text) for text in batch]
        slow = tokenizer.encode_batch_slowly(batch, ends)
        for ours, theirs in zip(tokenizer.encode_batch(batch, ends), slow, strict=True):
            assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


def test_a_literal_special_token_is_text(folder):
    tokenizer = Tokenizer.load(folder)
    text = "a [MASK] b[SEP]"
    ids = tokenizer.encode(text, [len(text)]).ids.tolist()
    assert not set(ids) & {0, 2, 3, 4}
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids


def test_other_processes_train_the_same(tmp_path, folder):
    """Hashes differ from process to process; the vocabulary does not."""
    digests = set()
    for n in range(3):
        target = tmp_path / str(n)
        command = [sys.executable, "-c", SCRIPT, str(target)]
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": str(n)}
        subprocess.run(command, check=True, env=environment, cwd=ROOT, timeout=120)
        digests.add(Tokenizer.load(target).digest)
    assert len(digests) == 1


def test_vocabulary_sizes_that_cannot_be(tmp_path):
    with pytest.raises(
        ValueError, match=r"larger than this text supports: the largest possible is (\d+)"
    ):
        train_tokenizer(texts(), tmp_path / "t", vocab_size=9000, kind="wordpiece")
    with pytest.raises(ValueError, match=r"too small: .* alone need \d+"):
        train_tokenizer(texts(), tmp_path / "u", vocab_size=40, kind="wordpiece")


def test_real_text(tmp_path):
    every = [text for name in ("en_wiki", "zh_wiki", "zh_laws") for text in real(name, 25)]
    train_tokenizer((t[:3000] for t in every), tmp_path / "t", vocab_size=5000, kind="wordpiece")
    assert "tokenizer verified" in verify_tokenizer(Tokenizer.load(tmp_path / "t"), every)


def test_differences_are_told(folder, tmp_path):
    """A folder whose tokenizer.json is not what was loaded."""
    import shutil

    copy = shutil.copytree(folder, tmp_path / "t")
    tokenizer = Tokenizer.load(copy)
    description = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    vocabulary["the"], vocabulary["a"] = vocabulary["a"], vocabulary["the"]
    (copy / "tokenizer.json").write_text(json.dumps(description))
    (copy / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"other ids than transformers does for \d+ of \d+ texts"):
        verify_tokenizer(tokenizer, texts()[:20])
