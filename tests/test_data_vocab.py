"""Tokenizers: ids agree with sentencepiece and with transformers, and every token has its sentence."""

import json
import lzma
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from support import ROOT, document
from transformers import AutoTokenizer

from data.encode_sentencepiece import SentencePieceWords
from data.hashing import hash_positions
from data.sentences import sentence_ends
from data.tokenizer_hf import export_tokenizer, read_model
from data.tokenizer_train import train_model, train_tokenizer
from data.vocab import Tokenizer

CORPORA = Path(os.environ.get("CLOZE_CORPORA") or ROOT.parent / "shared" / "corpora")
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
HARD_TEXTS = [
    "",
    " ",
    "\n\n a \n\n",
    "Two  spaces\tand\u3000wide ones \u00a0 end ",
    "\u200bzero\u200bwidth\u200b",
    "\x00nul\x00",
    "ﬁ ligature, ½, Ａ full width, e\u0301 accent",
    "他说：“你好。”“再见！”然后走了。《书》没有。",
    "我用GPT-4,很好。It works!真的吗?",
    "𠮷野家🎉🎉 emoji 👩‍👩‍👧 and 龘",
    "literal ▁ mark ▁▁ twice",
    "[MASK] [CLS]text[SEP] [PAD][UNK] <0x41> <unk>",
    "<0x41> is no byte here",
    "今天天气很好。\u00a0今天天气很好。\u2003“今天”。",
    "a" * 300,
    "很" * 300,
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / request.param
    train_tokenizer(training_texts(), folder, vocab_size=380, kind=request.param)
    return folder


def training_texts() -> list[str]:
    """Brackets, digits and capitals are frequent enough to be in the vocabulary."""
    return [document(n) for n in range(300)] + ["<0 x4 1> [M ASK CL SE P]"] * 300


@pytest.fixture(scope="module")
def texts():
    return [document(n) for n in range(900, 1000)] + HARD_TEXTS


def encode(tokenizer: Tokenizer, text: str):
    return tokenizer.encode(text, sentence_ends(text))


def processor_of(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))


def test_identity(folder):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.special_ids == SPECIAL
    assert tokenizer.vocab_size == 380
    assert tokenizer.kind == folder.name
    assert len(tokenizer.digest) == 32


def test_ids_are_those_of_the_whole_text(folder, texts):
    tokenizer, processor = Tokenizer.load(folder), processor_of(folder)
    for text in texts:
        assert encode(tokenizer, text).ids.tolist() == processor.encode(text), text


def test_transformers_gives_the_same_ids(folder, texts):
    tokenizer, exported = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts:
        if "[MASK]" in text:
            continue  # transformers takes a literal special token for one
        expected = exported(text, add_special_tokens=False)["input_ids"]
        assert encode(tokenizer, text).ids.tolist() == expected, text


def test_pairs_for_fine_tuning(folder):
    exported = AutoTokenizer.from_pretrained(folder)
    pair = exported("Our captain", "the old clock")
    a, b = (
        exported(t, add_special_tokens=False)["input_ids"] for t in ("Our captain", "the old clock")
    )
    assert pair["input_ids"] == [2, *a, 3, *b, 3]
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert exported.model_max_length == 512
    assert {t: exported.convert_tokens_to_ids(t) for t in SPECIAL} == SPECIAL
    masked = exported("今天[MASK]气", add_special_tokens=False)["input_ids"]
    word, rest = (exported(t, add_special_tokens=False)["input_ids"] for t in ("今天", "今天气"))
    assert masked == [*word, 4, *rest[len(word) :]]  # no word mark slips in after [MASK]


def test_text_never_becomes_a_special_token(folder):
    tokenizer = Tokenizer.load(folder)
    for text in ("[MASK]", "a [CLS] b", "中[SEP]文", "[PAD][UNK]", "<pad>", "\u2585"):
        ids = encode(tokenizer, text).ids
        assert len(ids) > 0 and not set(ids.tolist()) & set(range(5)), text


def test_exported_form_can_leave_special_tokens_as_text(folder):
    exported = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    exported.encode_special_tokens = True
    for text in ("[MASK]", "a [CLS] b [MASK].", "中[SEP]文"):
        expected = processor_of(folder).encode(text)
        assert exported.encode(text, add_special_tokens=False).ids == expected


def test_decoding_gives_the_normalised_text_back(folder, texts):
    tokenizer, processor = Tokenizer.load(folder), processor_of(folder)
    for text in texts:
        normalised = processor.normalize(text).replace("▁", " ").strip()
        decoded = processor.decode(encode(tokenizer, text).ids.tolist())
        assert decoded.strip() == normalised, text


def test_sentences_by_an_independent_way(folder, texts):
    """The Hugging Face form finds each token's place by its own offsets."""
    tokenizer = Tokenizer.load(folder)
    alone = folder.parent / f"{folder.name}-alone"
    alone.mkdir(exist_ok=True)
    shutil.copy(folder / "tokenizer.json", alone)
    other = Tokenizer.load(alone)
    assert other.kind == "hf"
    for text in texts:
        if "[MASK]" in text:
            continue
        if folder.name == "unigram" and "再" in text:
            continue  # tokenizers gives adjacent characters that are spelt in bytes one common place
        ours, theirs = encode(tokenizer, text), encode(other, text)
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.sentence_lengths.tolist() == theirs.sentence_lengths.tolist(), text
        assert ours.sentence_lengths.sum() == len(ours.ids) == len(ours.word_starts)


def test_tokens_fall_into_their_sentences(folder):
    tokenizer, processor = Tokenizer.load(folder), processor_of(folder)
    text = "The red fox followed. 今天天气很好。“你好！”他说。\n\n \nOur captain…"
    encoded = encode(tokenizer, text)
    ends = np.cumsum(encoded.sentence_lengths).tolist()
    pieces = [
        processor.decode(encoded.ids[a:b].tolist()) for a, b in zip([0, *ends], ends, strict=False)
    ]
    assert [p.strip() for p in pieces] == [
        "The red fox followed.",
        "今天天气很好。",
        "“你好!”",
        "他说。",
        "Our captain...",
    ]


def test_word_starts(folder):
    tokenizer, processor = Tokenizer.load(folder), processor_of(folder)
    encoded = encode(tokenizer, "The fox repaired 今天龘天。really")
    pieces = [processor.id_to_piece(i) for i in encoded.ids.tolist()]
    starts = dict(zip(range(len(pieces)), encoded.word_starts.tolist(), strict=True))
    for i, piece in enumerate(pieces):
        if piece.startswith("▁") or "一" <= piece[0] <= "鿿" or piece == "<0xE9>":
            assert starts[i], pieces[i]
        elif piece in ("<0xBE>", "<0x98>") or piece.isalpha():
            assert not starts[i], pieces[i]
    assert starts[pieces.index("。")]  # after a Han character a new word begins


def test_very_long_sentences_are_stored_in_pieces(folder):
    tokenizer = Tokenizer.load(folder)
    encoded = encode(tokenizer, "7 " * 70_000)
    assert encoded.sentence_lengths.dtype == np.uint16
    assert encoded.sentence_lengths[0] == 65535 and len(encoded.sentence_lengths) > 1
    assert encoded.sentence_lengths.sum(dtype=np.int64) == len(encoded.ids)


def test_training_is_deterministic(tmp_path, folder):
    train_tokenizer(training_texts(), tmp_path / "t", vocab_size=380, kind=folder.name)
    assert Tokenizer.load(tmp_path / "t").digest == Tokenizer.load(folder).digest


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_vocabulary_sizes_that_cannot_be(kind):
    texts = [document(n) for n in range(30)]
    with pytest.raises(
        ValueError, match=r"larger than this text supports: the largest possible is \d+"
    ) as error:
        train_model(texts, vocab_size=9000, kind=kind, num_threads=4)
    largest = int(str(error.value).split("possible is ")[1].split(".")[0])
    assert train_model(texts, vocab_size=largest, kind=kind, num_threads=4)
    with pytest.raises(ValueError, match=r"too small: .* alone need \d+"):
        train_model(texts, vocab_size=270, kind=kind, num_threads=4)
    with pytest.raises(ValueError, match="vocab_size 100 is below 262"):
        train_model(texts, vocab_size=100, kind=kind, num_threads=4)


def make_wordpiece(folder: Path, special: list[str]) -> Path:
    words = [
        *special,
        *"abcdefghijklmnopqrstuvwxyz.[]",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    vocabulary = {word: i for i, word in enumerate([*words, "fox", "red", "天", "mask"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()  # pyright: ignore
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    tokenizer.add_special_tokens(special)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_an_existing_wordpiece_tokenizer(tmp_path):
    special = ["[MASK]", "[SEP]", "[CLS]", "[UNK]", "[PAD]"]
    tokenizer = Tokenizer.load(make_wordpiece(tmp_path / "t", special))
    assert tokenizer.special_ids == {token: i for i, token in enumerate(special)}
    encoded = encode(tokenizer, "Red foxes. 天天 [MASK]\n")
    names = tokenizers.Tokenizer.from_file(str(tmp_path / "t/tokenizer.json"))
    pieces = [names.id_to_token(i) for i in encoded.ids.tolist()]
    assert pieces == ["red", "fox", "##e", "##s", ".", "天", "天", "[", "mask", "]"]
    assert encoded.sentence_lengths.tolist() == [5, 5]
    assert encoded.word_starts.tolist() == [p[:2] != "##" for p in pieces]


def test_tokenizers_that_cannot_be_used(tmp_path):
    folder = make_wordpiece(tmp_path / "t", ["[UNK]", "[CLS]", "[PAD]"])
    with pytest.raises(ValueError, match=r"lacks \['\[SEP\]', '\[MASK\]'\]"):
        Tokenizer.load(folder)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read by tokenizers"):
        Tokenizer.load(folder)


def strange_texts(count: int) -> list[str]:
    """Characters that normalise in every way, beside each other: marks, ligatures, wide forms, controls."""
    characters = (
        "aZ9.…—－，。「」％①½ﬁ ｶﾞｱか\u3099が각\u1100\u1161é e\u0301ñ\u00a0\u2003\u3000\t\r\n\u200b\x00\x85"
        "▁今天气很好龘𠮷🎉👩\u200d👧ΑЖб\u0438\u0306ا\u0653ก\u0e33<0x41>[MASK]ii…...---~～\ufeff\u00ad¨´\ufffd"
    )
    texts = []
    for n in range(count):
        order = hash_positions(n, 40)
        texts.append("".join(characters[int(i)] for i in order % np.uint64(len(characters))))
    return texts


def same(ours, theirs) -> bool:
    return all(
        np.array_equal(x, y)
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("max_words", [1 << 19, 30])
def test_batches_give_what_words_by_themselves_give(folder, texts, monkeypatch, max_words):
    """The cache, its table and the place of every token against the slow twin, also when it forgets."""
    monkeypatch.setattr("data.word_cache.MAX_WORDS", max_words)
    tokenizer = Tokenizer.load(folder)
    every = [*texts[:30], *HARD_TEXTS, *strange_texts(100), *texts[:20]]
    for start in range(0, len(every), 37):
        batch = every[start : start + 37]
        ends = [sentence_ends(text) for text in batch]
        slow = tokenizer.encode_batch_slowly(batch, ends)
        assert same(tokenizer.encode_batch(batch, ends), slow)


def test_places_by_widths_are_those_of_the_normaliser(folder):
    """Token offsets from a table of character widths against sentencepiece's own alignment."""
    model = SentencePieceWords(folder / "sentencepiece.model")
    words = [word for word in model.words([*strange_texts(150), *HARD_TEXTS]) if word]
    tokens = model.encode_words(words)
    ends = np.cumsum(tokens.counts).tolist()
    for word, start, end in zip(words, [0, *ends], ends, strict=False):
        expected = model._offsets_slowly(word, tokens.ids[start:end])
        assert tokens.offsets[start:end].tolist() == expected.tolist(), word


def test_orders_of_the_same_pieces_are_the_exported_ones(folder):
    """i+ii or ii+i: rounding decides, and the exported tokenizer's rounding is what counts."""
    tokenizer = Tokenizer.load(folder)
    exported = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for count in range(1, 60):
        text = f"a{'.' * count} b {'-' * count} {'i' * count}) {'好' * count}"
        assert (
            encode(tokenizer, text).ids.tolist()
            == exported.encode(text, add_special_tokens=False).ids
        )


def test_scores_decide_as_they_are_read_from_the_exported_file(tmp_path):
    """JSON's reader may change the last bit of a score, and that decides which order of pieces wins."""
    model = train_model(training_texts(), vocab_size=380, kind="unigram", num_threads=1)
    proto = read_model(model)
    scores = {"~": -7.557585716247559, "~~": -9.709409713745117, "@": -8.938536643981934}
    scores |= {"@@": -9.534934043884277}
    for piece, (text, score) in zip(proto.pieces[-4:], scores.items(), strict=True):
        piece.piece, piece.score = text, score
    (tmp_path / "sentencepiece.model").write_bytes(proto.SerializeToString())
    export_tokenizer(proto.SerializeToString(), tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for count in range(1, 30):
        for text in (f"({'~' * count}", f"a{'@' * count}"):
            expected = exported.encode(text, add_special_tokens=False).ids
            assert encode(tokenizer, text).ids.tolist() == expected, text


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_real_text(tmp_path, kind):
    """On encyclopedia articles, laws and books: exactly the exported tokenizer's ids.

    sentencepiece's own differ where it adds up the scores of thousands of characters in 32 bits.
    """
    texts = [
        text for name in ("en_wiki", "zh_wiki", "zh_laws", "en_books") for text in real(name, 40)
    ]
    train_tokenizer((text[:2000] for text in texts), tmp_path / "t", vocab_size=3500, kind=kind)
    tokenizer, processor = Tokenizer.load(tmp_path / "t"), processor_of(tmp_path / "t")
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    num_ties = 0
    for text in texts:
        ids = encode(tokenizer, text).ids.tolist()
        assert exported.encode(text, add_special_tokens=False).ids == ids
        other = processor.encode(text)
        if other != ids:
            num_ties += 1
            assert processor.decode(other) == processor.decode(ids)
            scores = [math.fsum(processor.get_score(i) for i in x) for x in (ids, other)]
            assert math.isclose(*scores, rel_tol=1e-6)
    assert num_ties <= (len(texts) // 10 if kind == "unigram" else 0)


def real(name: str, count: int) -> list[str]:
    if not CORPORA.is_dir():
        pytest.skip(f"no corpora in {CORPORA} (set CLOZE_CORPORA)")
    with lzma.open(CORPORA / f"{name}.jsonl.xz") as lines:
        return [json.loads(next(lines))["text"][:20_000] for _ in range(count)]
