"""Sentence splitting: a gold list of hard cases, and what holds for any text."""

import random

import numpy as np
import pytest

from data.hashing import hash_positions
from data.sentences import SLOW_CANDIDATE, sentence_ends, split_sentences

GOLD = [  # a bar stands where a sentence ends
    # English: plain, abbreviations, initials, numbers
    "It rained. |We stayed.",
    "Dr. Smith met Mrs. Jones. |They talked.",
    "Prof. Adams and St. John's College agreed.",
    "He lives in the U.S. Army base.",
    "He moved to the U.S. |The rest stayed.",
    "It happened in Washington D.C. |He was there.",
    "We met at 5 p.m. |It was dark.",
    "We met at 5 p.m. on Monday.",
    "See Fig. 3 and Eq. 2 for details.",
    "Symphony No. 5 was played. |It was loud.",
    "He said no. |Then he left.",
    "See pp. 12 and vol. 3 of it.",
    "J. K. Rowling wrote it. |George W. Bush read it.",
    "Many fruits, e.g. Apples, are red.",
    "The answer, i.e. Forty-two, is known.",
    "Apples, pears, etc. are fruit.",
    "Apples, pears, etc. |They are fruit.",
    "Apple Inc. announced it. |Nobody cared.",
    "Smith et al. (2019) showed it. |We agree.",
    "Smith et al. Found nothing.",
    "It cost $3.14 in 1999. |Prices rose.",
    "Version 2.0.1 is out. |Get it at example.com today.",
    "1. Introduction\n|2. Methods",
    "A. First item\n|B. Second item",
    "IV. The fourth chapter begins.",
    "She holds a Ph.D. from MIT. |He does not.",
    "On Jan. 5 it snowed. |On Feb. 6 it did not.",
    "Messrs. Brown vs. Green was decided. |It took years.",
    "World War I. |The next war was worse.",
    "He ran approx. Ten miles.",
    # English: marks in runs, quotes, brackets
    "What?! |No way!!! |Really.",
    "Wait... what? |Yes.",
    "He paused... |Then he spoke.",
    'He said "Go." |She went.',
    '"Really?" he asked. |"Yes!" |She laughed.',
    "“Stop!” |“Why?” |He ran.",
    "He left (at last.) |She stayed.",
    "It ended.[12] |Then it began.[3][4] |So it was.",
    "Yahoo! is a company. |Google is another.",
    "Open http://a.b/c?q=1.5&r=2 now. |Close it.",
    "He shouted 'Fire!' |Everyone left.",
    "Is it 5? |10 is more.",
    "I saw it. 'It' was big.".replace(". '", ". |'"),
    "no capital. and so it goes on.",
    "One line\n|another line\n\n|a paragraph",
    "Ends without a mark",
    "  Leading space. |Next.",
    "etc., and so on. |Done.",
    "e.g., this one. |Done.",
    # Chinese
    "今天下雨。|我们没有出门。",
    "他说：“你好。”|然后走了。",
    "真的吗？！|是的。",
    "太好了！！！|走吧。",
    "我……我不知道。|他说。",
    "“我不知道……”|他低下了头。",
    "“真的吗？”，他问。|没有人回答。",
    "「走吧！」|他站了起来。",
    "（完。）|下一章。",
    "圆周率是3.14。|约等于3。",
    "《红楼梦》写得好！|《水浒传》也好。",
    "他走了。“再见！”|她说。".replace("。“", "。|“"),
    "第一行\n|第二行",
    "你好吗?|我很好!|谢谢.",
    "他说.|然后走了.",
    "增长了2.5%，达到10.3亿元。|同比下降。",
    "全文完……\n|后记",
    # mixed
    "我用Python 3.11。|It works. |很好！",
    "Mr. Wang说：“好。”|Then he left.",
    "他在U.S.工作。|She works in China.",
    "GPT-4o发布了！|OpenAI Inc. said so. |真快。",
    '他说："好。"|然后走了。',
    '他走了。|"你好。"|她说。',
    "See 王等(2019)。|The end.",
]


@pytest.mark.parametrize("marked", GOLD)
def test_gold(marked):
    assert split_sentences(marked.replace("|", "")) == marked.split("|")


def test_gold_list_is_long_and_mixed():
    assert len(GOLD) >= 60
    assert sum(any("一" <= c <= "鿿" for c in case) for case in GOLD) >= 20


@pytest.mark.parametrize("seed", range(20))
def test_any_text_is_partitioned(seed):
    """Offsets ascend and cover the text, whatever it holds; newlines always end a sentence."""
    draw = random.Random(seed)
    text = "".join(draw.choice("aB1 .!?。！？…”“\"')]\n\t\u3000中，;U.S🎉") for _ in range(400))
    ends = sentence_ends(text)
    assert ends == sorted(set(ends)) and ends[-1] == len(text) and ends[0] > 0
    assert "".join(split_sentences(text)) == text
    assert all("\n" not in sentence.strip() for sentence in split_sentences(text))


def test_nothing_and_white_space():
    assert sentence_ends("") == []
    assert sentence_ends(" \n ") == [3]
    assert sentence_ends("a") == [1]


def test_the_fast_pattern_ends_sentences_where_the_slow_one_does():
    marks = [*".!?。！？…\"'”’)），,“「", "[1]", "[12]", ". ", ".\u00a0", " ", "\n"]
    words = [
        *"2aAZ你好xvi",
        "xviii",
        "approx",
        "messrs",
        "Thurs",
        "example",
        "e.g.",
        "Mr.",
        "No.",
        "Then",
    ]
    parts = marks + words
    for n in range(20_000):
        chosen = hash_positions(n, 3 + n % 20) % np.uint64(len(parts))
        text = "".join(parts[int(i)] for i in chosen)
        assert sentence_ends(text) == sentence_ends(text, SLOW_CANDIDATE), text
