"""Bytes of any charset become the right text or none; mojibake is put right or dropped."""

import pytest

from data.corpus.encodings import decode
from data.corpus.mojibake import RepairMojibake
from data.corpus.steps import Document, Verdict

CHINESE = "我们在这里说的是一个人的故事，天下的事情都是这样。\n他说：“不知道。”"
TRADITIONAL = "我們在這裡說的是一個人的故事，天下的事情都是這樣。\n他說：「不知道。」"
FRENCH = "Il était une fois, à l’orée de la forêt, un garçon très âgé : « Où êtes-vous ? »"
CZECH = (
    "Každý má právo vyhledat si útočiště v jiných zemích a požívat tam azylu, je to na nich. " * 3
)
JAPANESE = "すべての人間は、生まれながらにして自由である。"


def repair(text: str, **options: float) -> Verdict:
    return RepairMojibake(**options)(Document("a#0", text, {}))


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (text, encoding)
        for text, encodings in (
            (CHINESE, ("utf-8", "utf-8-sig", "gb18030", "gbk", "gb2312", "hz")),
            (CHINESE, ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")),
            (TRADITIONAL, ("utf-8", "big5", "big5hkscs", "cp950", "utf-16-le")),
            (FRENCH, ("utf-8", "cp1252", "mac-roman", "utf-16-be", "utf-32-le")),
            (JAPANESE, ("utf-8", "euc-jp", "shift_jis", "iso2022_jp")),
            ("Fête à Zürich, señor.", ("latin-1",)),
            ("plain ASCII", ("ascii", "utf-16-le", "utf-16")),
        )
        for encoding in encodings
    ],
)
def test_text_comes_back_from_every_charset(text: str, encoding: str) -> None:
    decoded = decode(text.encode(encoding))
    assert decoded.text == text, decoded
    assert decoded.reason is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (CHINESE.encode()[:-1], "cut_utf8"),
        (CHINESE.encode() + b"\xff" + CHINESE.encode(), "damaged_utf8"),
        (CHINESE.encode() + b"\n" + CHINESE.encode("gbk"), "mixed_charsets"),
        (b"\xff\xfe" + "a".encode("utf-16-le") + b"\x00", "mixed_charsets"),
        (bytes(range(128, 256)) * 4, "unknown_charset"),
        ("Все люди рождаются свободными и равными".encode("koi8-r"), "unknown_charset"),
        ("모든 인간은 태어날 때부터 자유로우며".encode("euc-kr"), "unknown_charset"),
        (CZECH.encode("cp1250"), "unknown_charset"),
    ],
)
def test_what_fits_no_charset_has_no_text_but_a_reason(data: bytes, reason: str) -> None:
    decoded = decode(data)
    assert (decoded.text, decoded.reason) == (None, reason)
    assert decoded.detail


def test_what_a_source_declares_decides_where_evidence_cannot() -> None:
    russian = "Все люди рождаются свободными и равными"
    assert decode(russian.encode("koi8-r"), declared="koi8-r").text == russian
    assert decode(russian.encode(), declared="koi8-r").text == russian  # valid UTF-8 is UTF-8
    assert decode(CHINESE.encode("gbk"), declared="iso-8859-1").text == CHINESE
    with pytest.raises(ValueError, match="utf-99"):
        decode(b"a", declared="utf-99")


@pytest.mark.parametrize(
    ("right", "written", "read"),
    [
        (FRENCH, "utf-8", "sloppy-windows-1252"),
        ("Все люди рождаются свободными", "utf-8", "cp1251"),
        (CHINESE.replace("“", "").replace("”", ""), "utf-8", "latin-1"),
        ("中国人民共和国的法律", "gb18030", "latin-1"),
        (TRADITIONAL, "big5", "gb18030"),
        ("我们在这里的人民", "utf-8", "gb18030"),
    ],
)
def test_text_read_in_a_wrong_charset_is_put_right(right: str, written: str, read: str) -> None:
    wrong = right.encode(written).decode(read)
    assert wrong != right
    verdict = repair(wrong)
    assert verdict.text == right
    assert verdict.changes["lines_repaired"] >= 1
    assert repair(right) == Verdict(right)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CHINESE.encode().decode("gbk", errors="replace"), "mojibake"),
        ("one lost \ufffd character", "lost_characters"),
        ("a lone surrogate \ud83d", "lost_characters"),
        ("权使三司使初除，\ue064门取旨", "private_use"),
        ("他？是的。花荣连?了许多合，卖个破绽", "question_marks"),
        ("name: ?????????? ??? ??????", "question_marks"),
    ],
)
def test_what_cannot_be_put_right_is_dropped_with_its_place(text: str, reason: str) -> None:
    verdict = repair("A sound line.\n" + text)
    assert (verdict.text, verdict.reason) == (None, reason)
    assert "the first is 2" in verdict.detail


@pytest.mark.parametrize(
    "text",
    [
        "What??? Really?!",
        "以为秦乎?以为魏乎?为魏则善",
        "naïve café – Ångström… “quoted” —",
        "Привет, мир! Все люди рождаются свободными.",
        "Ελληνικά και עברית",
        "□ marks a gap in old prints",
    ],
)
def test_sound_text_is_left_alone(text: str) -> None:
    assert repair(text) == Verdict(text)


def test_damaged_lines_may_be_cut_out_of_a_long_document() -> None:
    sound = "他说不是一个人的事，我们在这里。\n" * 50
    text = sound + "有\ufffd人"
    assert repair(text).reason == "lost_characters"
    verdict = repair(text, max_cut_share=0.05)
    assert verdict.text == sound.rstrip("\n")
    assert verdict.changes == {"lines_cut": 1}
    with pytest.raises(ValueError, match="max_cut_share is 2"):
        RepairMojibake(max_cut_share=2)


def test_long_files_are_decoded_like_short_ones() -> None:
    for text in (CHINESE * 3000, TRADITIONAL * 3000, FRENCH * 3000, "𠀀𠀁的一是" * 20000):
        for encoding in ("utf-8", "utf-16-le", "utf-16-be", "gb18030"):
            if text.startswith("Il") and encoding == "gb18030":
                continue  # nobody writes French so
            assert decode(text.encode(encoding)).text == text, encoding


def test_a_few_controls_make_no_utf16() -> None:
    assert (
        decode(b"plain\x00 text\x1b[31m with controls").text == "plain\0 text\x1b[31m with controls"
    )
    assert decode(b"~{ is no Chinese ~}").text == "~{ is no Chinese ~}"
