"""Words and their hashes, in any script and length."""

import numpy as np
import pytest
from corpus_support import rows

from data.corpus.fingerprint import (
    BLOCK,
    content_hash,
    ngram_hashes,
    word_hashes,
    words_of,
)

TEXTS = {
    "empty": "",
    "no words": " \n … --- !?",
    "english": "The cat's 3rd DOG, the cat's 3rd dog.",
    "chinese": "他说：“你好。”然后走了……真的吗？！2024年",
    "thai and korean": "สวัสดีชาวโลก 안녕 세상",
    "marks": "नमस्ते दुनिया café café",
    "compatibility": "Ｆｕｌｌ ﬁne ①",
    "beyond the first plane": "𠀀𠀁 𝐛𝐨𝐥𝐝 🙂",
    "surrogate": "a\ud800b",
    "one endless word": "x" * (2 * BLOCK + 5) + " y",
    "many words": "ab cd " * BLOCK,
}


@pytest.mark.parametrize("name", TEXTS)
def test_hashes_follow_the_words(name: str) -> None:
    """Equal words have equal hashes, others others, wherever they stand."""
    text = TEXTS[name]
    words, hashes = words_of(text), word_hashes(text)
    assert len(words) == len(hashes)
    by_word = dict(zip(words, hashes.tolist(), strict=True))
    assert [by_word[word] for word in words] == hashes.tolist()
    assert len(set(by_word.values())) == len(by_word)
    for word in list(by_word)[:20]:
        (alone,) = word_hashes(word) if len(words_of(word)) == 1 else (by_word[word],)
        assert int(alone) == by_word[word]


def test_what_the_words_are() -> None:
    assert words_of("It's 3 DOGS-and-cats.") == ["it", "s", "3", "dogs", "and", "cats"]
    assert words_of("我有2只cat。") == ["我", "有", "2", "只", "cat"]
    assert words_of("Ｆｕｌｌ") == words_of("full")


def test_real_text_in_both_languages() -> None:
    for name in ("messy/dirty_mix.jsonl.xz",):
        for row in rows(name)[:200]:
            assert len(words_of(row["text"])) == len(word_hashes(row["text"]))


def test_ngrams() -> None:
    words = word_hashes("a b c d a b c")
    three = ngram_hashes(words, 3)
    assert len(three) == 5 and three[0] == three[4] and len(set(three.tolist())) == 4
    assert len(ngram_hashes(words, 50)) == 1  # a short text is one n-gram
    assert len(ngram_hashes(words[:0], 5)) == 0
    assert ngram_hashes(word_hashes("a b"), 2) != ngram_hashes(word_hashes("b a"), 2)


def test_content_is_the_same_for_other_case_spaces_and_punctuation() -> None:
    texts = ["Hello, World! 你好。", "hello world\n\n你好", "HELLO — WORLD 你 好"]
    assert len({content_hash(word_hashes(text)) for text in texts}) == 1
    assert content_hash(word_hashes("hello world 你")) != content_hash(word_hashes(texts[0]))


def test_hashes_never_change() -> None:
    """Signatures on disk are compared with those of later runs."""
    assert word_hashes("the cat 猫").tolist() == GOLDEN
    assert word_hashes("the cat 猫").dtype == np.uint64


GOLDEN = [14917605656580788023, 11254602786418739536, 1344167183768172538]
