"""Scripts decide what they can; function words and lingua the rest."""

import pytest

from data.corpus.language import IdentifyLanguage, is_english
from data.corpus.steps import Document

TEXTS = {
    "en": "It was the best of times and the worst of times, for all that they had been told of it "
    "by those who came from the city to the river and had not gone back to where it began.",
    "zh": "这是最好的时代，也是最坏的时代。",
    "ja": "これは最良の時代であり、最悪の時代でもあった。",
    "ko": "최고의 시간이었고, 최악의 시간이었다.",
    "th": "มันเป็นช่วงเวลาที่ดีที่สุด",
    "el": "Ήταν οι καλύτερες εποχές",
    "he": "זה היה הזמן הטוב ביותר",
    "de": "Es war die beste und die schlimmste aller Zeiten, sagte der alte Mann am Fluss.",
    "fr": "C’était le meilleur et le pire de tous les temps, disait le vieil homme.",
    "ru": "Это было лучшее из всех времён, это было худшее из всех времён.",
    "uk": "Це був найкращий з усіх часів, це був найгірший з усіх часів, це був вік мудрості і вік "
    "безглуздя, це була епоха віри, це була епоха невіри, це були дні світла і темряви.",
    "fa": "این بهترین زمان‌ها بود و بدترین زمان‌ها بود",
    "ar": "كان أفضل الأوقات وكان أسوأ الأوقات",
}


def identify(text: str, **options: object) -> str:
    step = IdentifyLanguage(**options)  # pyright: ignore[reportArgumentType]
    return step(Document("a#0", text, {})).metadata["language"]


@pytest.mark.parametrize("language", TEXTS)
def test_language_is_told(language: str) -> None:
    assert identify(TEXTS[language]) == language


def test_only_wanted_languages_are_kept() -> None:
    step = IdentifyLanguage(languages=["en", "zh"])  # pyright: ignore[reportArgumentType]
    kept = {
        language
        for language, text in TEXTS.items()
        if step(Document("a#0", text, {})).text is not None
    }
    assert kept == {"en", "zh"}
    dropped = step(Document("a#0", TEXTS["de"], {}))
    assert dropped.reason == "other_language"
    assert dropped.detail == "de by lingua, wanted: en, zh"
    assert step(Document("a#0", "12 34 ...", {})).reason == "unknown_language"


def test_a_mixed_text_has_the_language_of_most_of_its_words() -> None:
    assert identify(TEXTS["zh"] * 5 + "a few English words") == "zh"
    assert identify(TEXTS["en"] + "时代") == "en"
    assert identify(TEXTS["zh"] * 20 + "（バラ）") == "zh"  # a quotation makes it not Japanese


def test_the_middle_of_a_long_document_counts() -> None:
    title = "Kottayam Malankara Thiruvananthapuram " * 8
    assert identify(title + (TEXTS["en"] + "\n") * 20, sample_chars=600) == "en"


def test_english_words_do_not_claim_other_languages() -> None:
    assert is_english(TEXTS["en"].split())
    assert not is_english((TEXTS["de"] * 3).split())
    assert not is_english(["the"] * 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": ["cn"]}, "languages cn are not among"),
        ({"languages": "en"}, r"give a list, such as \[en, zh\]"),
        ({"detector": "cld3"}, "choose lingua or fasttext"),
        ({"sample_chars": 1}, "sample_chars is 1"),
        ({"detector": "fasttext", "model_file": "/nowhere.bin"}, "/nowhere.bin"),
    ],
)
def test_wrong_options_are_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IdentifyLanguage(**options)  # pyright: ignore[reportArgumentType]
