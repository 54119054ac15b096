"""A document in, the same with its language in the metadata out; or dropped if it is not one of those wanted.

Scripts decide first: they cost nothing and are never wrong where a script has one language. Latin, Cyrillic,
Arabic and Devanagari go to lingua, whose models come with its package, or to a fastText model file of the
user's. Nothing is downloaded.
"""

import functools
import importlib.util
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.corpus.characters import HAN, HANGUL, KANA
from data.corpus.steps import Document, Verdict

UNKNOWN = "und"  # ISO 639's code for it
SCRIPTS = {  # script -> (characters, its language; None: a detector must tell)
    "latin": (
        "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\u0300-\u036f",
        None,
    ),
    "han": (HAN, "zh"),
    "kana": (KANA, "ja"),
    "hangul": (HANGUL, "ko"),
    "cyrillic": ("\u0400-\u052f", None),
    "arabic": ("\u0620-\u065f\u066e-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc\u200c", None),
    "devanagari": ("\u0900-\u097f", None),
    "thai": ("\u0e01-\u0e5b", "th"),
    "hebrew": ("\u0591-\u05f4", "he"),
    "greek": ("\u0370-\u03ff\u1f00-\u1fff", "el"),
    "armenian": ("\u0531-\u0589", "hy"),
    "georgian": ("\u10a0-\u10ff", "ka"),
    "bengali": ("\u0980-\u09fe", "bn"),
    "gurmukhi": ("\u0a01-\u0a76", "pa"),
    "gujarati": ("\u0a81-\u0aff", "gu"),
    "tamil": ("\u0b82-\u0bfa", "ta"),
    "telugu": ("\u0c00-\u0c7f", "te"),
    "kannada": ("\u0c80-\u0cf2", "kn"),
    "malayalam": ("\u0d00-\u0d7f", "ml"),
    "sinhala": ("\u0d81-\u0df4", "si"),
    "lao": ("\u0e81-\u0edf", "lo"),
    "tibetan": ("\u0f00-\u0fda", "bo"),
    "burmese": ("\u1000-\u109f", "my"),
    "khmer": ("\u1780-\u17f9", "km"),
    "ethiopic": ("\u1200-\u1399", "am"),
}
UNSPACED_SCRIPTS = frozenset(("han", "kana", "thai", "lao", "tibetan", "burmese", "khmer"))
RUN = re.compile(  # what is no letter in ASCII first: it is the commonest, and of no script
    "[\\x00-@\\[-`{-\\x7f]+|"
    + "|".join(f"(?P<{script}>[{chars}]+)" for script, (chars, _) in SCRIPTS.items())
)
BY_LINGUA = frozenset(
    """
    af ar az be bg bn bs ca cs cy da de el en eo es et eu fa fi fr ga gu he hi hr hu hy id is it ja
    ka kk ko la lg lt lv mi mk mn mr ms nb nl nn pa pl pt ro ru sk sl sn so sq sr st sv sw ta te th
    tl tn tr ts uk ur vi xh yo zh zu
    """.split()  # noqa: SIM905
)
BY_SCRIPT = frozenset(language for _, language in SCRIPTS.values() if language)
MIN_KANA_SHARE = 0.05  # of Han and Kana: a Chinese text quotes hardly any, a Japanese one has half
# English tells itself by words that no other language with the Latin script has as often.
ENGLISH_WORDS = frozenset(
    "the of and to that with for from are were this which his by have had not it be or at".split()  # noqa: SIM905
)
MIN_ENGLISH_WORDS = 20
MIN_ENGLISH_SHARE = 0.12
MIN_THE_SHARE = 0.025


@dataclass(frozen=True)
class IdentifyLanguage:
    """Tell the language by up to `sample_chars` characters; keep documents of `languages` only.

    Codes are ISO 639-1. With no `languages` all documents are kept and only marked. The language
    of a mixed text is that of most of its words. `detector` fasttext needs `model_file` (such as
    lid.176.bin). Raises ValueError for unknown codes or missing packages and files.
    """

    languages: tuple[str, ...] = ()
    detector: Literal["lingua", "fasttext"] = "lingua"
    model_file: str = ""
    sample_chars: int = 900

    def __post_init__(self) -> None:
        if isinstance(self.languages, str):
            raise ValueError(f"languages is {self.languages!r}; give a list, such as [en, zh]")
        object.__setattr__(self, "languages", tuple(self.languages))  # a recipe's list
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if self.detector not in ("lingua", "fasttext"):
            problems.append(f"detector is {self.detector!r}; choose lingua or fasttext")
        elif importlib.util.find_spec(self.detector) is None:
            package = {"lingua": "lingua-language-detector", "fasttext": "fasttext-wheel"}
            problems.append(f"detector {self.detector} needs: pip install {package[self.detector]}")
        if self.detector == "fasttext" and not Path(self.model_file).is_file():
            problems.append(f"model_file {self.model_file!r} is no file; give a fastText model")
        unknown = [code for code in self.languages if code not in BY_LINGUA | BY_SCRIPT]
        if unknown and self.detector == "lingua":
            problems.append(
                f"languages {', '.join(map(str, unknown))} are not among those that can be told: "
                f"{' '.join(sorted(BY_LINGUA | BY_SCRIPT))}"
            )
        if not isinstance(self.sample_chars, int) or self.sample_chars < 30:
            problems.append(f"sample_chars is {self.sample_chars!r}; give at least 30")
        return problems

    @property
    def name(self) -> str:
        return "identify_language"

    def __call__(self, document: Document) -> Verdict:
        language, by = self._identify(document.text)
        if not self.languages or language in self.languages:
            return Verdict(document.text, metadata={"language": language})
        reason = "unknown_language" if language == UNKNOWN else "other_language"
        detail = f"{language} by {by}, wanted: {', '.join(self.languages)}"
        return Verdict(None, reason, detail, metadata={"language": language})

    def _identify(self, text: str) -> tuple[str, str]:
        """(language, what told it)."""
        words = words_by_script(_sample(text, self.sample_chars))
        weights = Counter(
            {
                script: sum(map(len, runs)) if script in UNSPACED_SCRIPTS else len(runs)
                for script, runs in words.items()
            }
        )
        if not weights:
            return UNKNOWN, "script"
        num_kana = weights.pop("kana", 0)
        weights["han"] += num_kana
        script = max(weights, key=lambda script: (weights[script], script))
        if script == "han":
            return ("ja" if num_kana > MIN_KANA_SHARE * weights["han"] else "zh"), "script"
        if language := SCRIPTS[script][1]:
            return language, "script"
        if script == "latin" and is_english(words[script]):
            return "en", "words"
        sample = " ".join(words[script])
        if self.detector == "fasttext":
            return _by_fasttext(self.model_file, sample), "fasttext"
        return _by_lingua(sample), "lingua"


def _sample(text: str, size: int) -> str:
    """Three equal pieces: beginning, middle and end may differ, and titles are mostly names."""
    if len(text) <= size:
        return text
    piece = size // 3
    middle = (len(text) - piece) // 2
    return "\n".join((text[:piece], text[middle : middle + piece], text[-piece:]))


def words_by_script(text: str) -> dict[str, list[str]]:
    """Runs of letters of one script, by script."""
    words: dict[str, list[str]] = {}
    for found in RUN.finditer(text):
        if found.lastgroup:
            words.setdefault(found.lastgroup, []).append(found[0])
    return words


def is_english(words: list[str]) -> bool:
    """Whether function words alone show that these Latin words are English."""
    if len(words) < MIN_ENGLISH_WORDS:
        return False
    counts = Counter(map(str.lower, words))
    num_found = sum(counts[word] for word in ENGLISH_WORDS)
    enough_the = counts["the"] >= MIN_THE_SHARE * len(words)
    return enough_the and num_found >= MIN_ENGLISH_SHARE * len(words)


def _by_lingua(text: str) -> str:
    found = _lingua().detect_language_of(text)
    return found.iso_code_639_1.name.lower() if found else UNKNOWN


@functools.cache
def _lingua() -> Any:
    """Loaded once a process: about 100 MB. Low accuracy equals high from 120 characters on."""
    from lingua import LanguageDetectorBuilder

    return LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()


def _by_fasttext(model_file: str, text: str) -> str:
    labels, _ = _fasttext(model_file).predict(text.replace("\n", " "))
    return labels[0].removeprefix("__label__").split("_")[0] if labels else UNKNOWN


@functools.cache
def _fasttext(model_file: str) -> Any:
    import fasttext  # pyright: ignore[reportMissingImports]

    return fasttext.load_model(model_file)
