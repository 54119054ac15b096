"""One form of every character, nothing invisible, and joiners where scripts need them."""

import pytest

from data.corpus.normalise import Normalise
from data.corpus.steps import Document


def normalise(text: str, **options: object) -> tuple[str | None, dict[str, int]]:
    verdict = Normalise(**options)(Document("a#0", text, {}))  # pyright: ignore[reportArgumentType]
    return verdict.text, verdict.changes


@pytest.mark.parametrize(
    ("text", "right", "changes"),
    [
        ("e\u0301", "é", {"NFC": 1}),
        ("a\r\nb\rc\u2028d\u2029e\x85f", "a\nb\nc\nd\ne\nf", {"line_break": 5}),
        ("a\n\n\n\nb", "a\n\nb", {"blank_lines": 1}),
        ("in\u00advis\u200bible\ufeff", "invisible", {"soft_hyphen": 1, "zero_width": 2}),
        ("\u202eabc\u202c \u2067x\u2069", "abc x", {"bidi": 4}),
        ("a\x00b\x1bc", "abc", {"control": 2}),
        ("a\xa0b\u3000c\td", "a b c d", {"odd_space": 3}),
        ("  a  b  \n c", "a b\nc", {"space_run": 3, "line_edge": 3}),
        ("x \ue001 y", "x y", {"icon": 1, "space_run": 1}),
        ("a\u200db", "ab", {"joiner": 1}),
        ("Ｈｅｌｌｏ， ｗｏｒｌｄ！", "Hello, world!", {"fullwidth": 2}),
        ("他有１２个ＣＤ，真的！", "他有12个CD，真的！", {"fullwidth": 2}),
    ],
)
def test_each_change_is_made_and_counted(text: str, right: str, changes: dict[str, int]) -> None:
    assert normalise(text) == (right, changes)


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cروم",  # Persian: without the non-joiner another word
        "क्\u200dष and ശ്രീ\u200d",
        "👨\u200d👩\u200d👧 and 🏳\ufe0f\u200d🌈",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "他说：“你好！”（笑）",
        "a\nb\n\nc",
    ],
)
def test_what_a_script_needs_stays(text: str) -> None:
    assert normalise(text) == (text, {})


def test_nfkc_and_other_options() -> None:
    assert normalise("ﬁne ２", form="NFKC")[0] == "fine 2"
    assert normalise("ﬁne Ａ", fold_fullwidth=False)[0] == "ﬁne Ａ"
    assert normalise("a\n\nb", max_blank_lines=0)[0] == "a\nb"
    with pytest.raises(ValueError, match=r"NFX.*max_blank_lines is -1"):
        normalise("a", form="NFX", max_blank_lines=-1)


def test_a_document_of_nothing_visible_is_dropped() -> None:
    verdict = Normalise()(Document("a#0", " \u200b\n\x00", {}))
    assert (verdict.text, verdict.reason) == (None, "empty")
