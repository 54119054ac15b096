"""Where words start: by the pieces, or in Chinese by a segmenter; always at a token's first character."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
from prepare_support import config, corpus, dataset
from support import CHINESE, document
from test_data_vocab import make_wordpiece, real

from data.plan import make_plan
from data.prepare import prepare
from data.sentences import sentence_ends
from data.shards import Dataset
from data.tokenizer_train import train_tokenizer
from data.vocab import Tokenizer, is_han
from data.words import segment_starts

__all__ = ["config", "corpus", "dataset"]  # fixtures, used by name

TEXT = "南京市长江大桥在清华大学东边。Our captain来到北京,用GPT-4翻译。\n研究生命的起源 and then"


@pytest.fixture(scope="module", params=["unigram", "bpe", "wordpiece"])
def folder(request, tmp_path_factory):
    """Chinese pieces of one character and of several, some of which reach over the ends of words."""
    folder = tmp_path_factory.mktemp("tokenizer") / request.param
    texts = [document(n) for n in range(300)] + [TEXT, CHINESE] * 40
    sizes = {"unigram": 400, "bpe": 420, "wordpiece": 260}
    train_tokenizer(texts, folder, vocab_size=sizes[request.param], kind=request.param)
    return folder


def words_of(folder, text: str, kind) -> list[tuple[str, bool]]:
    """(piece, whether it starts a word) of each token."""
    import tokenizers

    encoded = Tokenizer.load(folder, kind).encode(text, sentence_ends(text))
    names = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = [names.id_to_token(index) or "" for index in encoded.ids.tolist()]
    return list(zip(pieces, encoded.word_starts.tolist(), strict=True))


def test_segmented_words(folder):
    """Against jieba's own words of the text, found here by the places of the exported tokenizer."""
    rjieba = pytest.importorskip("rjieba")
    import tokenizers

    starts, place = set(), 0
    for word in rjieba.cut(TEXT):
        starts.add(place)
        place += len(word)
    exported = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    offsets = exported.encode(TEXT, add_special_tokens=False).offsets
    found = words_of(folder, TEXT, "rjieba")
    by_pieces = words_of(folder, TEXT, "pieces")
    num_han = num_inside = 0
    for (piece, starts_word), (start, _), (_, plain) in zip(found, offsets, by_pieces, strict=True):
        if piece and (is_han(piece[0]) or "<0xE4>" <= piece <= "<0xE9>"):
            assert starts_word == (start in starts), (piece, start)
            num_han += 1
            num_inside += not starts_word
        else:
            assert starts_word == plain, piece  # English, digits, punctuation: as the pieces say
    assert num_han > 15 and num_inside > 3


def test_by_the_pieces_every_han_token_is_a_word(folder):
    for piece, starts_word in words_of(folder, TEXT, "pieces"):
        if (piece and is_han(piece[0])) or piece.startswith("▁"):
            assert starts_word, piece
        elif piece.startswith("##") or (
            folder.name != "wordpiece" and piece.isascii() and piece.isalpha()
        ):
            assert starts_word in (False, piece == "Our" or piece[:1] in "GOa"), piece
        if folder.name == "wordpiece":
            assert starts_word == (not piece.startswith("##")), piece


def test_characters_spelt_in_bytes(folder):
    """A rare character in three tokens: only the first can start a word."""
    pytest.importorskip("rjieba")
    if folder.name == "wordpiece":
        pytest.skip("WordPiece has no bytes")
    for kind in ("pieces", "rjieba"):
        found = dict(words_of(folder, "桥龘桥", kind))
        assert found["<0xE9>"] and not found["<0xBE>"] and not found["<0x98>"]


def test_batches_segment_as_words_by_themselves_do(folder):
    pytest.importorskip("rjieba")
    tokenizer = Tokenizer.load(folder, "rjieba")
    texts = [TEXT, *CHINESE.split("|"), "", TEXT[::-1], *(document(n) for n in range(20))]
    ends = [sentence_ends(text) for text in texts]
    slow = tokenizer.encode_batch_slowly(texts, ends)
    for ours, theirs in zip(tokenizer.encode_batch(texts, ends), slow, strict=True):
        assert np.array_equal(ours.ids, theirs.ids)
        assert np.array_equal(ours.word_starts, theirs.word_starts)


def test_starts_of_several_texts():
    rjieba = pytest.importorskip("rjieba")
    texts = ["", "清华大学", "GPT-4", "", "研究生命"]
    expected = []
    for text in texts:
        for word in rjieba.cut(text):
            expected += [True] + [False] * (len(word) - 1)
    assert segment_starts(texts).tolist() == expected
    assert expected.count(True) < len(expected)
    assert segment_starts([]).tolist() == [] and segment_starts([""]).tolist() == []


def test_real_chinese_has_words_of_several_tokens(tmp_path):
    pytest.importorskip("rjieba")
    texts = [text for name in ("zh_wiki", "zh_novels", "zh_laws") for text in real(name, 20)]
    train_tokenizer((text[:3000] for text in texts), tmp_path / "t", vocab_size=4000)
    plain, segmented = (Tokenizer.load(tmp_path / "t", kind) for kind in ("pieces", "rjieba"))
    shares = []
    for tokenizer in (plain, segmented):
        encoded = tokenizer.encode_batch(texts, [sentence_ends(text) for text in texts])
        starts = np.concatenate([part.word_starts for part in encoded])
        shares.append(starts.mean())
    assert shares[1] < 0.95 * shares[0]


def test_the_choice_is_recorded_and_carried_out(dataset, config, tmp_path):
    pytest.importorskip("rjieba")
    assert dataset.manifest["word_starts"] == "pieces"
    other = Dataset.open(prepare(replace(config, output=str(tmp_path / "d"), word_starts="rjieba")))
    assert other.manifest["word_starts"] == "rjieba"
    pairs = [(dataset.read_block(i), other.read_block(i)) for i in range(len(dataset.blocks))]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in pairs)
    assert any(not np.array_equal(a.word_starts, b.word_starts) for a, b in pairs)


def test_a_segmenter_that_is_not_there(config, tmp_path, monkeypatch):
    original = importlib.import_module

    def without(name, *more):
        if name == "rjieba":
            raise ImportError(name)
        return original(name, *more)

    monkeypatch.setattr(importlib, "import_module", without)
    changed = replace(config, output=str(tmp_path / "d"), word_starts="rjieba")
    with pytest.raises(ValueError, match=r"needs the package rjieba.*pip install"):
        make_plan(changed, [])
    with pytest.raises(ValueError, match="needs the package rjieba"):
        Tokenizer.load(
            make_wordpiece(tmp_path / "t", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]), "rjieba"
        )
    with pytest.raises(ValueError, match="word_starts 'jieba' is none of pieces, rjieba"):
        replace(config, word_starts="jieba")
