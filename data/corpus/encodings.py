"""Bytes in, text and the charset they were written in out; or no text, and why.

UTF-8 is believed when it is valid; any other charset must earn it by what the text looks like then. Nothing
is ever decoded with replacement characters: what fits no charset has no text, only a reason.
"""

import codecs
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy

from data.corpus.characters import HAN, Kind, common_share, count_kinds

BOMS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
CHINESE = ("gb18030", "big5", "cp950", "big5hkscs")  # gb18030 reads gb2312 and gbk, too
JAPANESE = ("euc_jp", "cp932")
WESTERN = ("cp1252", "latin-1", "mac-roman")
NAMED_WRONGLY = frozenset(
    ("ascii", "cp1252", "iso8859-1")
)  # what servers say when they do not know
MIN_COMMON_SHARE = (
    0.42  # of Han characters; real text has 0.5 and more, Korean read as GB up to 0.4
)
MIN_KANA_SHARE = 0.2  # of all characters; any Japanese text has 0.4
MIN_LATIN_SCORE = 0.8  # of characters above ASCII: the share that stands where it may
EVIDENCE_BYTES = 1 << 16  # so much of a file is looked at to choose among charsets
MIN_WIDE_SHARE = 0.7  # of characters: Han, ASCII and their marks, when read as UTF-16
MIN_NUL_SHARE = 0.05  # of bytes, for UTF-16 and UTF-32 without a mark

HZ = re.compile(rb"~\{(?:[\x21-\x77][\x21-\x7e])+~\}")
UTF8_HAN_RUN = re.compile(rb"(?:[\xe3-\xe9][\x80-\xbf]{2}){4}")  # hardly ever in other charsets
UTF8_SEQUENCE = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)
HIGH_BYTE = re.compile(rb"[\x80-\xff]")
KANA_LETTER = re.compile("[\u3041-\u3096\u30a1-\u30fa]")  # full width
LATIN_HIGH = re.compile(r"[^\x00-\x7f]")
HAN_IN_WORD = re.compile(f"[a-z][{HAN}]")
LETTER_IN_PLACE = re.compile(  # a letter above ASCII where Western texts have one
    r"""(?<=[a-zß-ÿœšž])[ß-öø-ÿœšž]
      | (?<![A-Za-zÀ-ÿ])[à-öø-ÿœ](?![A-Z])
      | (?<=[A-Z'’-])[ß-öø-ÿœ](?![A-Z])  # Märchen, D’état, Fé
      | (?<![A-Za-zÀ-ÿ])[À-ÖØ-ÞŒŠŽ](?=[a-zß-ÿœ’]|[A-Z]{2})  # École, ÉTÉ
      | (?<=[A-ZÀ-Þ])[À-ÖØ-ÞŒŠŽ](?![a-z]) | (?<![^\s"“'(])[À-ÖØ-Þ](?=\s)""",
    re.VERBOSE,
)
MARK_IN_PLACE = re.compile(  # the same of marks
    r"""(?<![\w.,;:!?])[“‘«„‚](?=\S)
      | (?<=\S)[”’»](?![^\W\d_]{4})         # a quotation ends, I’ll, but no word of four begins
      | (?<=[\w“‘(])’(?=\w)
      | (?<![^\W\d_])[–—…†‡•·] | [–—…†‡•·](?![^\W\d_]) | (?<=l)·(?=l)
      | [§©®™\xa0\xad] | (?<=\s)[«»] | [«»](?=\s)
      | [£€¥](?=\s?\d) | (?<=\d)[°¢£€½¼¾²³ºª]|°(?=[CF]) | (?<=\s)[½¼¾¿¡] | (?<=[ ^])[±×÷µ](?=[ \d])""",
    re.VERBOSE,
)
DASH_IN_WORD = re.compile(r"(?<=[^\W\d_])[–—…](?=[^\W\d_])")  # usual in English, else a letter
WORDS = {  # frequent words in ASCII, to tell the languages of cp1252 from those of other charsets
    language: frozenset(words.split())
    for language, words in {
        "en": "the of and to in that is was he for it with as his on be at by had not",
        "de": "der die und in den von zu das mit sich des auf ist im dem nicht ein eine als auch",
        "fr": "de la le et les des en un du une que est dans qui par pour au pas sur ce",
        "es": "de la que el en y a los se del las un por con una su para es al lo",
        "it": "di e la il che in un a per del una si da non con le della i al sono",
        "pt": "de a o que e do da em um para com uma os no se na por mais as dos",
        "nl": "de het een en van in is dat op te zijn met voor niet aan er om ook als door",
        "nordic": "og i det at en den er som til av for med de har et och att till ett inte",
        "fi": "ja on ei se oli joka mutta kun ovat tai sen jokaisella oikeus olla ole niin vain",
        "cs": "a v se na je z s do to o k ve pro za by ze jeho nebo jako od po jsou",
        "pl": "i w na z do nie o od za jest jako przez oraz lub po ma dla jego ich ze",
        "hu": "a az hogy nem is egy van vagy minden ez csak meg mint ha volt joga",
        "tr": "ve bir bu da de ile her veya olarak hak ne gibi daha kadar var",
        "vi": "trong cho hay theo do ai khi ng nh th kh ph tr ngh ch nhau quy tham gia",
        "ro": "de la cu pe nu din sau orice care pentru prin ca este sa fi au un o",
    }.items()
}
EASTERN = frozenset(("cs", "pl", "hu", "tr", "vi", "ro"))  # what cp1252 cannot write
MIN_WORDS = 20  # fewer tell no language
LANGUAGE_CHARS = 8192  # so many tell it


class Decoded(NamedTuple):
    """What `decode` makes of a file; `text` is None exactly when there is a `reason`."""

    text: str | None
    encoding: str | None  # Python's name of the charset, "utf-8" also for plain ASCII
    reason: str | None = None  # "empty", or cut_utf8, damaged_utf8, mixed_charsets, unknown_charset
    detail: str = ""


def decode(data: bytes, declared: str | None = None) -> Decoded:
    """Find the charset of `data` by evidence.

    `declared` is what the source says of itself (an HTTP header): it decides where evidence cannot,
    but never against valid UTF-8. Raises ValueError if Python knows no such charset.
    """
    named = _known(declared)
    for mark, encoding in BOMS:
        if data.startswith(mark):
            return _marked(data[len(mark) :], encoding)
    if not data:
        return Decoded(None, None, "empty", "0 bytes")
    text = _attempt(data, "utf-8")
    if text is not None and data.count(0) < MIN_NUL_SHARE * len(data):
        return _seven_bit(data) or Decoded(text, "utf-8")
    if (wide := _wide(data)) is not None:
        return wide
    if text is not None:
        return Decoded(text, "utf-8")
    return _broken_utf8(data) or _by_evidence(data, named)


def _known(declared: str | None) -> str | None:
    try:
        return codecs.lookup(declared).name if declared else None
    except LookupError:
        raise ValueError(f"charset {declared!r} is unknown; name one that Python knows") from None


def _attempt(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _marked(data: bytes, encoding: str) -> Decoded:
    """Decode what a mark has announced."""
    if not data:
        return Decoded(None, encoding, "empty", f"a byte-order mark of {encoding} and nothing else")
    try:
        return Decoded(data.decode(encoding), encoding)
    except UnicodeDecodeError as error:
        return Decoded(None, encoding, "mixed_charsets", f"marked as {encoding}, but {error}")


def _seven_bit(data: bytes) -> Decoded | None:
    """Charsets that write Han in ASCII bytes, told by the marks that switch to them."""
    if not data.isascii():
        return None
    encoding = None
    if b"\x1b$" in data:
        encoding = "iso2022_kr" if b"\x1b$)C" in data else "iso2022_jp_2"
    elif HZ.search(data):
        encoding = "hz"
    text = _attempt(data, encoding) if encoding else None
    return Decoded(text, encoding) if text is not None else None


def _wide(data: bytes) -> Decoded | None:
    """UTF-16 or UTF-32 without a mark, if the bytes look like it."""
    if len(data) < 4 or len(data) % 2:
        return None
    best, best_share = None, MIN_WIDE_SHARE
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        sample = data[:EVIDENCE_BYTES].decode(encoding, "ignore")  # it may end in a character
        if sample and (share := _plausible_share(sample)) > best_share:
            text = _attempt(data, encoding)
            if text is not None:
                best, best_share = Decoded(text, encoding), share
    return best


def _plausible_share(text: str) -> float:
    """The share of characters that are ASCII, Han or their marks; 0 where the Han are rare ones."""
    codes = _codes(text)
    num_han, share = common_share(text)
    if num_han and share < MIN_COMMON_SHARE:
        return 0.0
    plausible = ((codes >= 32) & (codes < 127)) | (codes == 10) | (codes == 13) | (codes == 9)
    for first, last in ((0x2010, 0x2030), (0x3000, 0x303F), (0xFF00, 0xFF5F)):
        plausible |= (codes >= first) & (codes <= last)
    return (int(numpy.count_nonzero(plausible)) + num_han) / len(text)


def _codes(text: str) -> numpy.ndarray:
    return numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _broken_utf8(data: bytes) -> Decoded | None:
    """UTF-8 that was cut, damaged, or mixed with another charset: no text, but a reason."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        first = error
    else:
        raise AssertionError("valid UTF-8 does not come here")
    num_high = len(HIGH_BYTE.findall(data))
    num_fitting = sum(map(len, UTF8_SEQUENCE.findall(data)))
    # two sequences or three bytes may be chance in another charset; hundreds or a run are not
    if not UTF8_HAN_RUN.search(data) and (num_fitting < 0.8 * num_high or num_fitting < 6):
        return None
    if first.end == len(data) and "unexpected end" in first.reason:
        return Decoded(None, None, "cut_utf8", f"the last character is cut: {len(data)} bytes")
    detail = (
        f"{num_fitting} of {num_high} bytes above ASCII are UTF-8, but not from byte {first.start}"
    )
    damaged = num_fitting > 0.95 * num_high
    return Decoded(None, None, "damaged_utf8" if damaged else "mixed_charsets", detail)


def _by_evidence(data: bytes, declared: str | None) -> Decoded:
    if declared and declared not in NAMED_WRONGLY and not declared.startswith("utf"):
        text = _attempt(data, declared)
        if text is not None and (declared not in CHINESE or _chinese_share(text) > 0):
            return Decoded(text, declared)
    for encoding in JAPANESE:
        text = _attempt(data, encoding)
        if text and len(KANA_LETTER.findall(text)) >= MIN_KANA_SHARE * len(text):
            return Decoded(text, encoding)
    chinese, share = _best(data, CHINESE, _chinese_share)
    if chinese and share >= MIN_COMMON_SHARE:
        return chinese
    western, score = _best(data, WESTERN, _latin_score)
    if western and score >= MIN_LATIN_SCORE:
        return western
    return Decoded(
        None,
        None,
        "unknown_charset",
        f"best of {', '.join(CHINESE + WESTERN)}: {share:.2f} common Han characters "
        f"(at least {MIN_COMMON_SHARE}), {score:.2f} letters in place (at least {MIN_LATIN_SCORE})",
    )


def _best(
    data: bytes, encodings: tuple[str, ...], judge: Callable[[str], float]
) -> tuple[Decoded | None, float]:
    """The first of the charsets with the highest score, and the score."""
    best, best_score = None, 0.0
    for encoding in encodings:
        text = _attempt(data, encoding)
        if text is not None and (score := judge(text)) > best_score:
            best, best_score = Decoded(text, encoding), score
    return best, best_score


def _chinese_share(text: str) -> float:
    """The share of common among Han characters; 0 where there are none or other scripts abound."""
    sample = text[:EVIDENCE_BYTES]
    num_han, share = common_share(sample)
    codes = _codes(sample)
    num_foreign = numpy.count_nonzero((codes > 0xFF) & (codes < 0x2000))  # Greek, Cyrillic ...
    in_words = num_han < 10 and HAN_IN_WORD.search(sample)  # protégée, read as two Han
    if num_han < 2 or num_foreign > num_han or in_words:
        return 0.0
    return share


def _latin_score(text: str) -> float:
    """The share of characters above ASCII that stand where Western texts have them."""
    sample = text[:EVIDENCE_BYTES]
    places = [found.start() for found in LATIN_HIGH.finditer(sample)]
    num_high = len(places)
    counts = count_kinds(sample)
    if num_high > 0.4 * (counts[Kind.UPPER] + counts[Kind.LOWER]):
        return 0.0  # Russian or Greek bytes: almost nothing is ASCII
    language = _language(sample[:LANGUAGE_CHARS])
    if language in EASTERN:
        return 0.0
    patterns = [LETTER_IN_PLACE, MARK_IN_PLACE]
    if language == "en":  # elsewhere it is a letter that was read as a dash
        patterns.append(DASH_IN_WORD)
    in_place = sum(any(one.match(sample, place) for one in patterns) for place in places)
    return in_place / num_high


def _language(text: str) -> str | None:
    """The language with most of its frequent words in the text, which are ASCII and read alike."""
    words = Counter(re.findall("[a-z]+", text.lower()))
    if words.total() < MIN_WORDS:
        return None
    shares = {name: sum(words[word] for word in known) for name, known in WORDS.items()}
    return max(shares, key=lambda name: shares[name])
