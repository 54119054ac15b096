"""Running text of any script is kept; what is none is dropped by a rule that tells its figure."""

import re
from collections import Counter
from typing import Any

import pytest

from data.corpus.characters import Kind, common_share, count_kinds
from data.corpus.quality import SPACED, Quality
from data.corpus.quality_rules import Words, measure
from data.corpus.steps import Document

ENGLISH = (
    "The river rose in the night and by morning the lower road was gone. We took what we could to "
    "the church on the hill, where the old women had lit a fire and made tea. Nobody spoke of the "
    "mill. When the water fell again, three days later, we walked down together to see what it had "
    "left us.\nIt had left the bridge, which was more than we had hoped for, and a boat."
)
CHINESE = (
    "河水在夜里涨了起来，到早上的时候，下面的路已经不见了。我们把能拿的东西都带到山上的庙里，"
    "老人们在那里生了火，煮了茶。没有人说起磨坊的事情。三天以后水退了，我们一起走下去，看它给我们留下了什么。\n"
    "它留下了那座桥，这比我们所希望的还多，还有一条船。"
)
POEM = "床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。\n" + (
    "春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。\n白日依山盡，黃河入海流。\n欲窮千里目，更上一層樓。"
)
NOISE = "ml6wnp7mzkj1 6m mrajn5wucaow0 l67qzls v7ls9jxfx05tzrl8qqrhrjd9pdo lpsv9nwccjbnje6dp9rhk "


def judge(text: str, language: str = "", **options: dict[str, Any]) -> tuple[str | None, str]:
    metadata = {"language": language} if language else {}
    verdict = Quality(**options)(Document("a#0", text, metadata))
    assert (verdict.text == text) == (verdict.reason is None)
    return verdict.reason, verdict.detail


@pytest.mark.parametrize(
    ("text", "language"),
    [(ENGLISH, "en"), (CHINESE, "zh"), (POEM, "zh"), (ENGLISH, ""), (POEM, "")],
)
def test_running_text_is_kept(text: str, language: str) -> None:
    assert judge(text, language) == (None, "")


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("Only a title", "too_few_words", "num_words 3, at least 50"),
        ("高血壓", "too_few_words", "num_words 3, at least 50"),
        (NOISE * 9, "gibberish", "at most 0.2"),
        ("1982\t4471\t8323\n" * 40, "few_alphabetic_words", "alphabetic_share 0.000, at least 0.7"),
        (ENGLISH.upper(), "all_capitals", "uppercase_share 1.000, at most 0.5"),
        ("丂丄丅丆丌丏丒丗" * 10, "rare_characters", "common_han_share 0.000, at least 0.35"),
        (
            "\n".join(f"* item number {i}, which is here." for i in range(40)),
            "bullet_lines",
            "1.000",
        ),
        (
            "\n".join(
                f"Nobody in the town had ever told the number {i} of it..." for i in range(40)
            ),
            "ellipsis_lines",
            "1.000",
        ),
        (ENGLISH.replace(" the", " #the"), "too_many_symbols", ""),
        ("a b of i x y z w q e " * 9, "short_words", "at least 2.5"),
        ("ein Wort ohne jedes Ende\n" * 3 + ENGLISH.replace("\n", " ").replace(".", "\n"), "", ""),
        ((ENGLISH + "\n") * 3, "duplicate_lines", "0.667, at most 0.3"),
        ("buy cheap pills online now. " * 40, "top_ngram", "top 2-gram"),
        ("免费领取优惠券加微信 " * 40, "top_ngram", "top 3-gram"),
        ((ENGLISH + " ").replace("\n", " ") * 3, "repeated_ngrams", "repeated 5-grams"),
        ((CHINESE + " ").replace("\n", "") * 3, "repeated_ngrams", "repeated 10-grams"),
    ],
)
def test_what_is_no_text_is_dropped_with_its_figure(text: str, reason: str, detail: str) -> None:
    found, told = judge(text)
    assert found == (reason or "lines_without_end")
    assert detail in told


def test_stop_words_are_those_of_the_language() -> None:
    words = Words(ENGLISH)
    assert words.num_found(frozenset(("the", "and", "zebra")), enough=3) == 2
    assert judge(ENGLISH, "fr")[0] == "few_stop_words"
    assert judge(ENGLISH, "xx")[0] is None  # no list: the rule is silent


def test_bounds_can_be_changed_and_switched_off() -> None:
    assert judge("Only a title.", spaced={"min_num_words": 2})[0] is None
    assert judge("Only a title.", spaced={"min_num_words": None})[0] is None
    assert judge(ENGLISH, spaced={"max_num_words": 60})[0] == "too_many_words"
    assert judge("不是这样的。", unspaced={"min_num_words": 3})[0] is None
    strict = {"max_repeated_ngram_share": {2: 0.01}}
    assert judge(ENGLISH, spaced=strict)[0] == "repeated_ngrams"
    assert SPACED.min_num_words == 50  # one recipe's bounds are not another's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spaced": {"min_words": 3}}, r"spaced\.min_words is no bound"),
        ({"unspaced": {"min_num_words": "3"}}, r"unspaced\.min_num_words is '3'"),
        ({"spaced": {"max_digit_share": -1}}, r"spaced\.max_digit_share is -1"),
        ({"spaced": {"max_top_ngram_share": 0.2}}, "give lengths and shares"),
    ],
)
def test_wrong_bounds_are_told_by_name(options: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quality(**options)


def plain_words(text: str) -> list[str]:
    return re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", text.lower())


def plain_repeated_share(words: list[str], length: int) -> float:
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for place in range(len(words) - length + 1):
        ngram = tuple(words[place : place + length])
        if ngram in seen:
            covered.update(range(place, place + length))
        seen.add(ngram)
    return sum(len(words[place]) for place in covered) / sum(map(len, words))


def plain_top_share(words: list[str], length: int) -> set[float]:
    """The shares of all n-grams that are commonest."""
    counts = Counter(zip(*(words[offset:] for offset in range(length)), strict=False))
    most = max(counts.values())
    total = sum(map(len, words))
    tops = [ngram for ngram, number in counts.items() if number == most]
    return {min(1.0, most * len("".join(ngram)) / total) if most > 1 else 0.0 for ngram in tops}


@pytest.mark.parametrize(
    "text",
    [ENGLISH, CHINESE, POEM, NOISE, ENGLISH + CHINESE + ENGLISH, "a b a b a b a", "一一一一"],
)
def test_words_and_ngrams_equal_plain_python(text: str) -> None:
    plain, words = plain_words(text), Words(text)
    assert words.sizes.tolist() == [len(word) for word in plain]
    same = {word: code for word, code in zip(plain, words.hashes.tolist(), strict=True)}
    assert [same[word] for word in plain] == words.hashes.tolist()
    assert len(set(same.values())) == len(same)
    for length in (2, 3, 5):
        assert words.repeated_share(length) == pytest.approx(plain_repeated_share(plain, length))
        shares = plain_top_share(plain, length) if len(plain) > length else {0.0}
        assert any(words.top_share(length) == pytest.approx(share) for share in shares)


def test_figures_of_a_small_text() -> None:
    text = "# One two THREE 44\n- four five.\n- four five.\n\nend..."
    figures = measure(text, Words(text))
    assert figures.num_words == 9
    assert figures.is_spaced
    assert figures.alphabetic_share == pytest.approx(8 / 9)
    assert figures.duplicate_line_share == pytest.approx(1 / 4)
    assert figures.bullet_line_share == pytest.approx(2 / 4)
    assert figures.ellipsis_line_share == pytest.approx(1 / 4)
    assert figures.ended_line_share == pytest.approx(3 / 4)
    assert figures.symbols_per_word == pytest.approx(2 / 9)


def test_empty_and_odd_texts_have_figures() -> None:
    for text in ("", " \n ", "...", "\ud800", "\U0010ffff", "١٢٣", "é" * 100):
        assert judge(text)[0] == "too_few_words"


def test_characters_are_counted_by_kind() -> None:
    counts = count_kinds("Ab 1的龘かก\ue000\ufffd\ud800!é\n")
    expected = {Kind.UPPER: 1, Kind.LOWER: 2, Kind.SPACE: 2, Kind.DIGIT: 1, Kind.OTHER: 1}
    expected |= {
        Kind.COMMON_HAN: 1,
        Kind.RARE_HAN: 1,
        Kind.UNSPACED: 2,
        Kind.PRIVATE: 1,
        Kind.LOST: 2,
    }
    assert dict(enumerate(counts)) == expected
    assert common_share("的龘") == (2, 0.5)
    assert common_share("no Han") == (0, 1.0)
