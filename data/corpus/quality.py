"""A document in, a verdict out: kept, or dropped by the first rule it breaks, with the figure and its bound.

The rules are those of Gopher (Rae et al. 2021, appendix A.1.1: words, symbols, bullets, stop words, repetition)
and of FineWeb (Penedo et al. 2024, lines that end in punctuation), both heirs of C4 (Raffel et al. 2020, 2.2).
Ours differ: a Han character is a word; a repetition counts from its second time on; bounds for text without
spaces were found on Chinese laws, novels, poems and manuals; C4's ban on braces and code is left out.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from data.corpus.quality_rules import Figures, Words, measure
from data.corpus.steps import Document, Verdict

MAX_JUDGED_CHARS = 1_000_000  # a longer document is judged by so much of its beginning


@dataclass(frozen=True)
class Thresholds:
    """Bounds of one family of scripts; None switches a rule off. The numbers are Gopher's unless said.

    min_X and max_X bound the figure X of quality_rules.Figures.
    """

    min_num_words: int | None = 50
    max_num_words: int | None = None  # Gopher: 100,000; a whole book is longer
    min_mean_word_chars: float | None = 2.5  # Gopher: 3, of English; Korean has 2.9
    max_mean_word_chars: float | None = 10.0
    min_alphabetic_share: float | None = 0.7  # Gopher: 0.8, but of words that hold commas and dates
    max_odd_word_share: float | None = 0.2  # ours; clean text has up to 0.05, noise 0.6 and more
    max_digit_share: float | None = 0.3  # ours
    max_uppercase_share: float | None = 0.5  # ours
    min_common_han_share: float | None = None
    max_symbols_per_word: float | None = 0.1
    max_bullet_line_share: float | None = 0.9
    max_ellipsis_line_share: float | None = 0.3
    min_ended_line_share: float | None = 0.12  # FineWeb
    min_stop_words: int | None = 2
    max_duplicate_line_share: float | None = 0.3
    max_duplicate_line_char_share: float | None = 0.2
    max_duplicate_paragraph_share: float | None = 0.3
    max_top_ngram_share: dict[int, float] = field(
        default_factory=lambda: {2: 0.20, 3: 0.18, 4: 0.16}
    )
    max_repeated_ngram_share: dict[int, float] = field(  # Gopher: 5: 0.15 ... 10: 0.10, which costs
        default_factory=lambda: {5: 0.40, 10: 0.25}  # 3 % of Wikipedia: lists of seasons, places
    )


SPACED = Thresholds()
UNSPACED = Thresholds(  # a word is a character: n-grams are longer, formulas of law and verse abound
    min_mean_word_chars=None,
    max_mean_word_chars=None,
    max_uppercase_share=None,
    min_common_han_share=0.35,  # real text 0.49 and more, wrongly decoded or random at most 0.13
    min_ended_line_share=None,  # Thai has no such marks, old Chinese texts few
    max_duplicate_line_share=0.4,
    max_duplicate_line_char_share=0.3,
    max_top_ngram_share={3: 0.20, 5: 0.25, 8: 0.25},
    max_repeated_ngram_share={10: 0.60, 20: 0.45},
)
REASONS = {
    "min_num_words": "too_few_words",
    "max_num_words": "too_many_words",
    "max_odd_word_share": "gibberish",
    "min_mean_word_chars": "short_words",
    "max_mean_word_chars": "long_words",
    "min_alphabetic_share": "few_alphabetic_words",
    "max_digit_share": "too_many_digits",
    "max_uppercase_share": "all_capitals",
    "min_common_han_share": "rare_characters",
    "max_symbols_per_word": "too_many_symbols",
    "max_bullet_line_share": "bullet_lines",
    "max_ellipsis_line_share": "ellipsis_lines",
    "min_ended_line_share": "lines_without_end",
    "max_duplicate_line_share": "duplicate_lines",
    "max_duplicate_line_char_share": "duplicate_lines",
    "max_duplicate_paragraph_share": "duplicate_paragraphs",
}
STOP_WORDS = {  # for English, Gopher's own
    language: frozenset(words.split())
    for language, words in {
        "ar": "في من على إلى أن التي هذا كان",
        "cs": "a se na je v že s z do to",
        "da": "og i at det er en til af på for",
        "de": "der die und in den von zu das mit ist",
        "en": "the be to of and that have with",
        "es": "de la que el en y a los se del las un por con una",
        "fa": "و در به از که این را با است",
        "fi": "ja on ei se että oli hän mutta ovat",
        "fr": "de la le et les des en un du une que est dans qui",
        "he": "של את על לא כי זה הוא היא או כל",
        "hi": "के का की में है और को से पर यह",
        "hu": "a az és hogy nem is egy ez van",
        "id": "yang dan di dengan untuk dari pada ini dalam tidak",
        "it": "di e la il che in un a per è del una",
        "ja": "の は を に が と で も し た",
        "nb": "og i det er på en til som av for",
        "nl": "de het een en van in is dat op te zijn met",
        "pl": "i w na z się do nie że jest o to",
        "pt": "de a o que e do da em um para com não uma",
        "ro": "de și în a la cu pe este că nu din",
        "ru": "и в не на с что по как он это к из",
        "sv": "och i att det som en på är av för",
        "tr": "ve bir bu da de için ile olarak çok",
        "uk": "і в не на з що до та як у за",
        "vi": "và của là có trong được cho các với không",
        "zh": "的 了 是 在 不 有 和 以 之 而 其 为 為 于 於 也 者 无 無 何 与 與 所 则 則 乃 自 人 中 上 一",
    }.items()
}


@dataclass(frozen=True)
class Quality:
    """Drop what is no running text, by the bounds of its family of scripts.

    `spaced` and `unspaced` override single fields of Thresholds by name. Stop words are those of
    metadata["language"]; where it is not known, they are not asked for. Raises ValueError for names and
    values that are no bounds.
    """

    spaced: dict[str, Any] = field(default_factory=dict)
    unspaced: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [
            *_problems("spaced", self.spaced),
            *_problems("unspaced", self.unspaced),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        object.__setattr__(self, "_spaced", replace(SPACED, **self.spaced))
        object.__setattr__(self, "_unspaced", replace(UNSPACED, **self.unspaced))

    @property
    def name(self) -> str:
        return "quality"

    def __call__(self, document: Document) -> Verdict:
        text = document.text[:MAX_JUDGED_CHARS]
        words = Words(text)
        figures = measure(text, words)
        bounds: Thresholds = getattr(self, "_spaced" if figures.is_spaced else "_unspaced")
        broken = (
            _broken_bound(figures, bounds)
            or _stop_words(words, bounds, document.metadata.get("language"))
            or _repetition(words, bounds)
        )
        return Verdict(None, *broken) if broken else Verdict(document.text)


def _broken_bound(figures: Figures, bounds: Thresholds) -> tuple[str, str] | None:
    """(reason, detail) of the first figure that is out of its bound."""
    for name, reason in REASONS.items():
        bound = getattr(bounds, name)
        if bound is None:
            continue
        side, figure = name.split("_", 1)
        value = getattr(figures, figure)
        if value < bound if side == "min" else value > bound:
            shown = value if isinstance(value, int) else f"{value:.3f}"
            return reason, f"{figure} {shown}, at {'least' if side == 'min' else 'most'} {bound}"
    return None


def _stop_words(words: Words, bounds: Thresholds, language: str | None) -> tuple[str, str] | None:
    if bounds.min_stop_words is None or language not in STOP_WORDS:
        return None
    num_found = words.num_found(STOP_WORDS[language], bounds.min_stop_words)
    if num_found >= bounds.min_stop_words:
        return None
    return (
        "few_stop_words",
        f"{num_found} stop words of {language}, at least {bounds.min_stop_words}",
    )


def _repetition(words: Words, bounds: Thresholds) -> tuple[str, str] | None:
    for length, bound in bounds.max_top_ngram_share.items():
        if (share := words.top_share(length)) > bound:
            return "top_ngram", f"top {length}-gram has {share:.3f} of the text, at most {bound}"
    for length, bound in bounds.max_repeated_ngram_share.items():
        if (share := words.repeated_share(length)) > bound:
            return "repeated_ngrams", f"repeated {length}-grams {share:.3f}, at most {bound}"
    return None


def _problems(family: str, overrides: dict[str, Any]) -> list[str]:
    """What is wrong with a recipe's bounds, each told by its name."""
    known = {item.name for item in fields(Thresholds)}
    problems = []
    for name, value in overrides.items():
        if name not in known:
            problems.append(f"{family}.{name} is no bound; there are {', '.join(sorted(known))}")
        elif name.endswith("ngram_share"):
            if not isinstance(value, dict) or not all(
                isinstance(length, int) and length > 0 and _is_number(bound)
                for length, bound in value.items()
            ):
                problems.append(
                    f"{family}.{name} is {value!r}; give lengths and shares: {{2: 0.2}}"
                )
        elif value is not None and not _is_number(value):
            problems.append(f"{family}.{name} is {value!r}; give a number of 0 or more, or null")
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
