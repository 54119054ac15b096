"""A document in, the same out with one form for what Unicode can write in several, and nothing invisible.

Everything that is changed is counted by kind. Applying the step to its own output changes nothing.
"""

import functools
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from enum import IntFlag
from typing import Literal

import numpy

from data.corpus.characters import UNSPACED
from data.corpus.steps import Document, Verdict

BREAKS = "\r\v\f\x1c-\x1e\x85\u2028\u2029"
LINE_BREAK = re.compile(f"\r\n|[{BREAKS}]")
ODD_SPACE = "\t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
ODD_SPACES = re.compile(f"[{ODD_SPACE}]")
REMOVED = {  # kind -> characters that carry no text
    "control": "\x00-\x08\x0e-\x1b\x1f\x7f\x80-\x84\x86-\x9f",
    "soft_hyphen": "\xad",
    "zero_width": "\u200b\u2060-\u2064\ufeff\u180e\u034f\u115f\u1160\u3164\uffa0",
    "bidi": "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f",
    "annotation": "\ufff9-\ufffc\U000e0001",
    "noncharacter": "\ufdd0-\ufdef\ufffe\uffff\U0001fffe\U0001ffff\U0010fffe\U0010ffff",
    "surrogate": "\ud800-\udfff",
}
INVISIBLE = re.compile("|".join(f"(?P<{kind}>[{chars}]+)" for kind, chars in REMOVED.items()))
PRIVATE = "\ue000-\uf8ff\U000f0000-\U0010fffd"
ICON = re.compile(f"(?<!\\S)[{PRIVATE}]+(?!\\S)")  # of a font with pictures
JOINERS = "\u200c\u200d"
TAG_CHARACTERS = "\U000e0020-\U000e007f"
# Scripts that form letters with joiners: Arabic to Thaana, Indic to Burmese, Khmer, Mongolian.
JOINING = "\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\ufb50-\ufdff\ufe70-\ufefc"
EMOJI = "\u2190-\u2bff\ufe0f\u20e3\U0001f000-\U0001faff"
STRAY_JOINER = re.compile(
    f"(?<![{JOINING}{EMOJI}])[\u200c\u200d]+"
    f"|(?<=[{EMOJI}])(?:\u200c[\u200c\u200d]*|\u200d(?![{EMOJI}])[\u200c\u200d]*)"
    "|(?<=[\u200c\u200d])[\u200c\u200d]+"
)
TAGS = re.compile("(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0020-\U000e007f]+")  # not of flags
HALVES = "\uff01-\uff5e"
FULLWIDTH = re.compile("[０-９Ａ-Ｚａ-ｚ]+")
FULLWIDTH_ALL = re.compile(f"[{HALVES}]+")
TO_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
EAST_ASIAN = re.compile(f"[{UNSPACED}\uac00-\ud7a3\u3001\u3002]")
SPACE_RUN = re.compile("  +")
LINE_EDGE = re.compile("^ +| +$", re.MULTILINE)


@dataclass(frozen=True)
class Normalise:
    """One Unicode form, plain spaces and line breaks, no invisible characters.

    `form` NFKC also folds ligatures, superscripts and all full-width characters; it turns Chinese
    punctuation into ASCII, so NFC is the default, and full-width letters and digits are folded
    apart (`fold_fullwidth`; their punctuation only in a text without East Asian letters).
    Zero-width joiners stay where Arabic, Indic and other scripts or emoji need them.
    """

    form: Literal["NFC", "NFKC"] = "NFC"
    fold_fullwidth: bool = True
    max_blank_lines: int = 1  # in a row

    def __post_init__(self) -> None:
        problems = []
        if self.form not in ("NFC", "NFKC"):
            problems.append(f"form is {self.form!r}; choose NFC or NFKC")
        if not isinstance(self.max_blank_lines, int) or self.max_blank_lines < 0:
            problems.append(f"max_blank_lines is {self.max_blank_lines!r}; give 0 or more")
        if not isinstance(self.fold_fullwidth, bool):
            problems.append(f"fold_fullwidth is {self.fold_fullwidth!r}; give true or false")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def name(self) -> str:
        return "normalise"

    def __call__(self, document: Document) -> Verdict:
        changes: Counter[str] = Counter()
        text = document.text
        while (changed := self._pass(text, changes)) != text:  # what is removed may join a pair
            text = changed
        if not text:
            return Verdict(None, "empty", f"nothing visible in {len(document.text)} characters")
        return Verdict(text, changes=dict(+changes))

    def _pass(self, text: str, changes: Counter[str]) -> str:
        needs = _needs(text)
        if needs & Need.BREAK:
            text = _substitute(LINE_BREAK, "\n", text, "line_break", changes)
        if needs & Need.INVISIBLE:
            text = _remove(INVISIBLE, text, changes)
        if needs & Need.JOINER:
            text = _substitute(STRAY_JOINER, "", text, "joiner", changes)
        if needs & Need.TAG:
            text = _substitute(TAGS, "", text, "annotation", changes)
        if needs & Need.ICON:
            text = _substitute(ICON, "", text, "icon", changes)
        if needs & Need.FULLWIDTH and self.fold_fullwidth:
            pattern = FULLWIDTH if EAST_ASIAN.search(text) else FULLWIDTH_ALL
            text, number = pattern.subn(lambda found: found[0].translate(TO_ASCII), text)
            changes["fullwidth"] += number
        if not unicodedata.is_normalized(self.form, text):
            text = unicodedata.normalize(self.form, text)
            changes[self.form] += 1
        if needs & Need.SPACE:
            text = _substitute(ODD_SPACES, " ", text, "odd_space", changes)
        return self._tidy(text, changes)

    def _tidy(self, text: str, changes: Counter[str]) -> str:
        """No runs of spaces or blank lines, no spaces at the edges of lines."""
        if "  " in text:
            text = _substitute(SPACE_RUN, " ", text, "space_run", changes)
        if " \n" in text or "\n " in text:
            text = _substitute(LINE_EDGE, "", text, "line_edge", changes)
        blank = "\n" * (self.max_blank_lines + 1)
        if blank + "\n" in text:
            text = _substitute(re.compile(blank + "\n+"), blank, text, "blank_lines", changes)
        return text.strip("\n ")


class Need(IntFlag):
    """What a character may call for."""

    BREAK = 1
    INVISIBLE = 2
    JOINER = 4
    TAG = 8
    ICON = 16
    FULLWIDTH = 32
    SPACE = 64


def _needs(text: str) -> int:
    """All that the characters of `text` may call for, in one look at each."""
    codes = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return int(numpy.bitwise_or.reduce(_need_table().take(codes))) if text else 0


@functools.cache
def _need_table() -> numpy.ndarray:
    """Code point -> Need, u8[0x110000]."""
    table = numpy.zeros(0x110000, numpy.uint8)
    for need, characters in (
        (Need.BREAK, BREAKS),
        (Need.INVISIBLE, "".join(REMOVED.values())),
        (Need.JOINER, JOINERS),
        (Need.TAG, TAG_CHARACTERS),
        (Need.ICON, PRIVATE),
        (Need.FULLWIDTH, HALVES),
        (Need.SPACE, ODD_SPACE),
    ):
        for first, last in re.findall("(.)(?:-(.))?", characters, re.DOTALL):
            table[ord(first) : ord(last or first) + 1] |= int(need)
    return table


def _remove(pattern: re.Pattern[str], text: str, changes: Counter[str]) -> str:
    """`text` without what `pattern` finds, counted by the name of the group."""
    for found in pattern.finditer(text):
        changes[found.lastgroup or "control"] += found.end() - found.start()
    return pattern.sub("", text)


def _substitute(
    pattern: re.Pattern[str], new: str, text: str, kind: str, changes: Counter[str]
) -> str:
    text, number = pattern.subn(new, text)
    if number:
        changes[kind] += number
    return text
