"""A document in; out the same with wrongly decoded text put right, or dropped where characters are lost.

Latin and Cyrillic mojibake (UTF-8 read as a single-byte charset) is ftfy's field. Chinese has rules of our own:
text is re-encoded with the charset it was wrongly read in and read again; the result is believed only if it
is valid to the last byte and its Han characters are as common as those of real text.
"""

import re
from dataclasses import dataclass

import ftfy
import ftfy.badness
import numpy

from data.corpus.characters import HAN, Kind, common_share, count_kinds, kinds_of
from data.corpus.steps import Document, Verdict

WINDOW = 64  # characters judged together, so that one damaged sentence shows in a sound document
MIN_WINDOW_HAN = 20
SUSPECT_SHARE = 0.1  # of common among a window's Han characters; verse falls to 0.15
SUSPECT_TEXT_SHARE = (
    0.3  # ... a text's: real ones have 0.49 and more, wrongly decoded ones up to 0.13
)
SOUND_SHARE = 0.5
MISREADINGS = (  # (charset it was read in, charset it is in)
    ("gb18030", "utf-8"),
    ("cp950", "utf-8"),
    ("big5hkscs", "utf-8"),
    ("big5hkscs", "gb18030"),
    ("cp950", "gb18030"),
    ("gb18030", "big5hkscs"),
)
CP1252_BYTES = {  # what cp1252 makes of the bytes that Latin-1 reads as controls
    ord(bytes([byte]).decode("cp1252")): byte
    for byte in range(0x80, 0xA0)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
HIGH_LATIN_RUN = re.compile(  # Chinese bytes read as Latin-1 or cp1252: no ASCII letters between
    "[\\x80-\\xff" + "".join(map(chr, CP1252_BYTES)) + "]{4,}"
)
# Two neighbours above ASCII that Western text does not put together; ftfy decides.
LATIN_SUSPECT = re.compile(
    r"[\x80-\x9f]|[\xa0-\u1fff\u20a0-\u2bff][\x80-\u2bff]|[‚„…†‡ˆ‰][\x80-\u024f]|[ÃĂ] |ï¿½"
)
LOST = re.compile("[\ufffd\ud800-\udfff]")
PRIVATE = "\ue000-\uf8ff\U000f0000-\U0010fffd"  # for what Unicode lacks; alone, an icon of a font
PRIVATE_IN_TEXT = re.compile(rf"(?<=[^\s{PRIVATE}])[{PRIVATE}]|[{PRIVATE}](?=[^\s{PRIVATE}])")
# "?" for a lost character: inside Chinese, not after a word that asks, in a text whose own mark is "？"
ASKING = "乎吗呢么哉耶焉何谁也与欤邪不否嗎麼誰與歟啊吧呀嘛去来之者矣歲岁人是有"
LOST_MARK = re.compile(rf"[{HAN}](?<![{ASKING}])\?+(?=[{HAN}])|[，。、：；“「]\?+(?=[{HAN}])")
QUESTION_RUN = re.compile(r"(?:\?[ ,.]?){8,}")


@dataclass(frozen=True)
class RepairMojibake:
    """Put mojibake right; drop what cannot be.

    Lines with lost characters are cut out as long as they hold at most `max_cut_share` of the
    document's characters; beyond that the document is dropped ("mojibake", "lost_characters",
    "private_use", "question_marks"). By default one lost character is enough.
    """

    max_cut_share: float = 0.0

    def __post_init__(self) -> None:
        share = self.max_cut_share
        if not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ValueError(f"max_cut_share is {share!r}; give 0 <= share < 1")

    @property
    def name(self) -> str:
        return "repair_mojibake"

    def __call__(self, document: Document) -> Verdict:
        text = document.text
        if text.isascii() and "????" not in text:
            return Verdict(text)
        changes: dict[str, int] = {}
        text, num_repaired = _repair(text)
        if num_repaired:
            changes["lines_repaired"] = num_repaired
        damaged = _damaged_lines(text)
        if not damaged:
            return Verdict(text, changes=changes)
        lines = text.split("\n")
        share = sum(len(lines[number]) for number in damaged) / len(text)
        number, (reason, found) = next(iter(damaged.items()))
        if share > self.max_cut_share:
            detail = f"{len(damaged)} of {len(lines)} lines damaged, the first is {number + 1}: {found!r}"
            return Verdict(None, reason, detail, changes)
        kept = [line for number, line in enumerate(lines) if number not in damaged]
        return Verdict("\n".join(kept), changes=changes | {"lines_cut": len(damaged)})


def _repair(text: str) -> tuple[str, int]:
    """The text with all that can be put right, and the number of lines that were."""
    num_han, share = common_share(text)
    if num_han >= 4 and share < SUSPECT_TEXT_SHARE and (right := _reread(text)) is not None:
        return right, right.count("\n") + 1
    suspects = _rare_lines(text) | _latin_suspects(text)
    if not suspects:
        return text, 0
    lines = text.split("\n")
    num_repaired = 0
    for number in suspects:
        right = _repair_line(lines[number])
        num_repaired += right != lines[number]
        lines[number] = right
    return "\n".join(lines), num_repaired


def _repair_line(line: str) -> str:
    num_han, share = common_share(line)
    if num_han >= 4 and share < SUSPECT_TEXT_SHARE and (right := _reread(line)) is not None:
        return right
    line = HIGH_LATIN_RUN.sub(_reread_latin, line)
    return ftfy.fix_encoding(line) if ftfy.badness.is_bad(line) else line


def _reread(text: str) -> str | None:
    """Chinese as it was before it was read in the wrong charset, if all of it comes back."""
    for wrong, right in MISREADINGS:
        try:
            candidate = text.encode(wrong).decode(right)
        except UnicodeError:
            continue
        num_han, share = common_share(candidate)
        if num_han >= 2 and share >= SOUND_SHARE:
            return candidate
    return None


def _reread_latin(found: re.Match[str]) -> str:
    """A run such as "ÖÐ¹ú" as the Chinese it was, if it is."""
    data = found[0].translate(CP1252_BYTES).encode("latin-1")
    for encoding in ("utf-8", "gb18030", "big5"):
        try:
            candidate = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding == "utf-8":
            return found[0]  # ftfy's field
        counts = count_kinds(candidate)
        num_common, num_rare = counts[Kind.COMMON_HAN], counts[Kind.RARE_HAN]
        if num_common >= 2 and num_common > num_rare and 2 * num_common >= len(candidate):
            return candidate
    return found[0]


def _damaged_lines(text: str) -> dict[int, tuple[str, str]]:
    """Line number -> (reason, what was found), of lines with lost characters; the worst reason first."""
    lines = text.split("\n")
    damaged: dict[int, tuple[str, str]] = {}
    for number in sorted(_latin_suspects(text)):
        if found := ftfy.badness.BADNESS_RE.search(lines[number]):
            damaged[number] = ("mojibake", found[0])
    for number in sorted(_rare_lines(text) | _wrong_lines(text, lines)):
        damaged.setdefault(number, ("mojibake", lines[number][:20]))
    for pattern, reason in _signs_of_loss(text):
        for number in sorted(_matching_lines(pattern, text)):
            if found := pattern.search(lines[number]):
                around = lines[number][max(0, found.start() - 8) : found.end() + 8]
                damaged.setdefault(number, (reason, around))
    return damaged


def _wrong_lines(text: str, lines: list[str]) -> set[int]:
    """Numbers of the lines without common Han characters, in a text that as a whole has too few."""
    num_han, share = common_share(text)
    if num_han < MIN_WINDOW_HAN or share >= SUSPECT_TEXT_SHARE:
        return set()
    return {n for n, line in enumerate(lines) if common_share(line)[1] < SUSPECT_TEXT_SHARE}


def _signs_of_loss(text: str) -> list[tuple[re.Pattern[str], str]]:
    """(pattern, reason) of those signs that the text may have at all."""
    counts = count_kinds(text)
    signs = []
    if counts[Kind.LOST]:
        signs.append((LOST, "lost_characters"))
    if counts[Kind.PRIVATE]:
        signs.append((PRIVATE_IN_TEXT, "private_use"))
    if "?" in text:
        signs.append((QUESTION_RUN, "question_marks"))
        if "？" in text:
            signs.append((LOST_MARK, "question_marks"))
    return signs


def _latin_suspects(text: str) -> set[int]:
    """Numbers of the lines that LATIN_SUSPECT matches; numpy clears most texts at once."""
    codes = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    low = (codes >= 0x80) & (codes < 0x2C00)
    alone = (codes == ord("Ã")) | (codes == ord("Ă")) | ((codes >= 0x80) & (codes < 0xA0))
    if (low[1:] & low[:-1]).any() or alone.any():
        return _matching_lines(LATIN_SUSPECT, text)
    return set()


def _matching_lines(pattern: re.Pattern[str], text: str) -> set[int]:
    """Numbers of the lines in which `pattern` is found."""
    numbers = set()
    at, line, counted = 0, 0, 0
    while found := pattern.search(text, at):
        line += text.count("\n", counted, found.start())
        counted = found.start()
        numbers.add(line)
        at = text.find("\n", found.end() - 1)
        if at < 0:
            break
    return numbers


def _rare_lines(text: str) -> set[int]:
    """Numbers of the lines that have a stretch of Han characters no real text has."""
    kinds = kinds_of(text)
    rare = kinds == Kind.RARE_HAN
    if numpy.count_nonzero(rare) < MIN_WINDOW_HAN // 2:
        return set()
    newlines = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4") == 10
    starts = numpy.union1d(numpy.flatnonzero(newlines), numpy.arange(0, len(text), WINDOW))
    num_rare = numpy.add.reduceat(rare, starts, dtype=numpy.int64)
    num_common = numpy.add.reduceat(kinds == Kind.COMMON_HAN, starts, dtype=numpy.int64)
    num_han = num_rare + num_common
    wrong = (num_han >= MIN_WINDOW_HAN) & (num_common < SUSPECT_SHARE * num_han)
    if not wrong.any():
        return set()
    line_of = numpy.cumsum(newlines)
    return set(line_of[numpy.minimum(starts[wrong] + 1, len(text) - 1)].tolist())
