"""A document in, the same with addresses and numbers of persons masked out: e-mail, phone, IP, identity, money.

What has a checksum is checked; what has none must look like nothing else: dates, versions, prices and numbers
of articles stay. Names, streets and the like need a model of language and are not looked for.
"""

import datetime
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from data.corpus.steps import Document, Verdict

Span = tuple[int, int] | None

PLACEHOLDERS = {  # angle brackets: pieces that every tokenizer has, and no rule finds again
    "email": "<EMAIL>",
    "iban": "<IBAN>",
    "card": "<CARD>",
    "chinese_id": "<ID>",
    "us_ssn": "<SSN>",
    "ip": "<IP>",
    "phone": "<PHONE>",
}
ZONE = re.compile(r"@|\d[\d .()-]{5,}\d|:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]")  # where anything may be
ZONE_BEFORE, ZONE_AFTER = 70, 90  # characters around: the longest find, with the word before it
EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]{1,4}){3,8}")
CARD = re.compile(
    r"(?<![A-Za-z0-9_.])(?:\d{12,19}|\d{4}(?P<sep>[ -])\d{4}(?P=sep)\d{4}(?P=sep)\d{1,4}(?:(?P=sep)\d{3})?"
    r"|\d{4}(?P<gap>[ -])\d{6}(?P=gap)\d{4,5})(?![A-Za-z0-9_])"
)
CHINESE_ID = re.compile(r"(?<![0-9A-Za-z])[1-9]\d{16}[0-9Xx](?![0-9A-Za-z])")
US_SSN = re.compile(r"(?<![\w-])(?!000|666)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])", re.ASCII)
IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d| ?[章节])", re.ASCII)
IPV6 = re.compile(
    r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,6}(?![\w:])", re.ASCII
)
VERSION_BEFORE = re.compile(
    r"(?:\b(?:v|version|release|section|chapter|§)|版本|版|节|章)[\s:.]*$", re.IGNORECASE
)
_EXTENSION = r"(?:\ ?(?:x|ext\.?)\ ?\d{1,5})?"
PHONE = re.compile(
    rf"""(?<![\w.+/-])(?:
      \+\d{{1,3}}[ .-]?(?:\(\d{{1,4}}\)[ .-]?)?\d{{1,5}}(?:[ .-]?\d{{2,5}}){{1,4}}{_EXTENSION}  # +46 (0)8 92 57
    | (?:(?:1|001)[-. ])?(?:\([2-9]\d\d\)[ -]?|[2-9]\d\d[-.])\d{{3}}[-.]\d{{4}}{_EXTENSION}  # 415-555-0144
    | (?:1[-. ])?\([2-9]\d\d\)\ \d{{3}}[- ]\d{{4}}
    | (?:(?:0086|86)[- ]?)?1[3-9]\d(?:[- ]?\d{{4}}){{2}}                         # a Chinese mobile
    | \(?0[1-9]\d{{1,2}}\)?-\d{{7,8}} | [48]00-\d{{3}}-\d{{4}} | [48]00-\d{{4}}-\d{{3}}  # 010-12345678
    )(?!\w|[-.]\d)""",
    re.VERBOSE | re.ASCII,
)
# Any grouping of digits is a phone number where a word before or behind says so.
PHONE_WORD = (
    r"(?:\b(?:phone|tel|telephone|mobile|cell|cellphone|call|dial|fax|whatsapp|ring)\b"
    r"|电话|手机|热线|传真|致电)"
)
_GROUPED = r"(?P<number>[+(]?\d[\d ().-]{5,18}\d)"
PHONE_AFTER_WORD = re.compile(
    PHONE_WORD + rf"(?:[^\n\d+(<]{{0,24}}|\s*:\s*)(?<![$€£¥#\w.]){_GROUPED}(?![\w%]|[-.:,/]\d)",
    re.IGNORECASE | re.ASCII,
)
PHONE_BEFORE_WORD = re.compile(
    rf"(?<![\w.+/$€£¥#-]){_GROUPED}[ -](?=(?:office|fax|mobile|cell|home)\b)",
    re.IGNORECASE | re.ASCII,
)
NO_PHONE = re.compile(
    r"(?:1[5-9]|20)\d\d(?:[ -]+(?:1[5-9]|20)\d\d)+|\d{4}[-.]\d{1,2}[-.]\d{1,2}.*|\d{1,2}[-.]\d{1,2}[-.]\d{4}"
)
MIN_PHONE_DIGITS, MAX_PHONE_DIGITS = 7, 15
# first digits and lengths: Visa, Mastercard, American Express, Diners, JCB, Maestro and others
CARD_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3[068]\d{12}|35\d{14}"
    r"|(?:1800|2131)\d{11}|(?:6\d\d|5[0678]\d)(?:\d{9}|\d{10}|\d{12,13}|\d{15,16})"
)
IBAN_LENGTHS = {
    item[:2]: int(item[2:])
    for item in """
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20
    EG29 ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30
    KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24
    PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SD18 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29
    VA22 VG24 XK20
    """.split()  # noqa: SIM905
}
MIN_IP_PART = 32  # some part is as large; numbers of sections and versions are small
ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


@dataclass(frozen=True)
class MaskPII:
    """Replace personal data by placeholders, counted by kind.

    Kinds: email, phone, ip (public addresses), chinese_id (checksum), card (Luhn), iban (checksum),
    us_ssn. `placeholders` replaces the text of single kinds; an empty one takes the data out;
    `kinds` says which are looked for (none given: all). Raises ValueError for other kinds.
    """

    placeholders: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str):
            raise ValueError(f"kinds is {self.kinds!r}; give a list, such as [email, phone]")
        object.__setattr__(self, "kinds", tuple(self.kinds) or tuple(PLACEHOLDERS))
        known = f"there are {', '.join(PLACEHOLDERS)}"
        problems = [
            f"{where} has {kind!r}; {known}"
            for where, given in (("kinds", self.kinds), ("placeholders", self.placeholders))
            for kind in given
            if kind not in PLACEHOLDERS
        ]
        for kind, shown in self.placeholders.items():
            if not isinstance(shown, str):
                problems.append(f"placeholders.{kind} is {shown!r}; give a text")
            elif any(character.isdigit() or character == "@" for character in shown):
                problems.append(
                    f"placeholders.{kind} is {shown!r}; digits and @ could be found again: leave them out"
                )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def name(self) -> str:
        return "mask_pii"

    def __call__(self, document: Document) -> Verdict:
        text = document.text
        shown = PLACEHOLDERS | dict(self.placeholders)
        changes: dict[str, int] = {}
        while finds := self._finds(text):  # again, for what a placeholder has set free
            pieces, end = [], 0
            for start, stop, kind in finds:
                pieces += (text[end:start], shown[kind])
                end = stop
                changes[kind] = changes.get(kind, 0) + 1
            text = "".join((*pieces, text[end:]))
        return Verdict(text, changes=changes)

    def _finds(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, kind) of all that is to be masked, in order, none over another."""
        finds: list[tuple[int, int, str]] = []
        zones = _zones(text)
        taken = bytearray(len(text) if zones else 0)
        for zone_start, zone_end in zones:
            for kind, pattern, judge in RULES:
                if kind not in self.kinds:
                    continue
                for found in pattern.finditer(text, zone_start, zone_end):
                    span = judge(found)
                    if span and taken.find(1, *span) < 0:
                        taken[span[0] : span[1]] = b"\1" * (span[1] - span[0])
                        finds.append((*span, kind))
        return sorted(finds)


def _zones(text: str) -> list[tuple[int, int]]:
    """The stretches of text that are looked at closely; most text is in none."""
    zones: list[tuple[int, int]] = []
    for found in ZONE.finditer(text):
        start = max(0, found.start() - ZONE_BEFORE)
        end = min(len(text), found.end() + ZONE_AFTER)
        if zones and start <= zones[-1][1]:
            zones[-1] = (zones[-1][0], end)
        else:
            zones.append((start, end))
    return zones


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _whole(found: re.Match[str]) -> Span:
    return found.span()


def _iban(found: re.Match[str]) -> Span:
    """ISO 13616: the length of its country; rearranged, letters as numbers, modulo 97 is 1."""
    length = IBAN_LENGTHS.get(found[0][:2].upper(), 0)
    places = [place for place, character in enumerate(found[0]) if character != " "][:length]
    if not length or len(places) < length:
        return None
    end = found.start() + places[-1] + 1
    code = found[0][: places[-1] + 1].replace(" ", "").upper()
    number = "".join(str(int(character, 36)) for character in code[4:] + code[:4])
    if int(number) % 97 != 1 or found.string[end : end + 1].isalnum():
        return None
    return found.start(), end


def _card(found: re.Match[str]) -> Span:
    """Luhn (ISO 7812), and the first digits and length of an issuer."""
    digits = _digits(found[0])
    if not CARD_ISSUER.fullmatch(digits) or len(set(digits)) < 2:
        return None
    total = 0
    for place, digit in enumerate(reversed(digits)):
        doubled = int(digit) * (1 + place % 2)
        total += doubled - 9 * (doubled > 9)
    return found.span() if total % 10 == 0 else None


def _chinese_id(found: re.Match[str]) -> Span:
    """GB 11643-1999: a date of birth and a check character modulo 11."""
    code = found[0].upper()
    try:
        birth = datetime.date(int(code[6:10]), int(code[10:12]), int(code[12:14]))
    except ValueError:
        return None
    total = sum(weight * int(digit) for weight, digit in zip(ID_WEIGHTS, code[:17], strict=True))
    valid = 1800 <= birth.year < 2100 and "10X98765432"[total % 11] == code[17]
    return found.span() if valid else None


def _public_ip(found: re.Match[str]) -> Span:
    """A valid address that could be somebody's; no version number, no address of inner networks."""
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:
        return None
    if VERSION_BEFORE.search(found.string, max(0, found.start() - 12), found.start()):
        return None
    if address.version == 4 and max(address.packed) < MIN_IP_PART:
        return None
    documentation = found[0].startswith(("192.0.2.", "198.51.100.", "203.0.113."))
    return found.span() if address.is_global or documentation else None


def _phone(found: re.Match[str]) -> Span:
    num_digits = len(_digits(re.split("[xe]", found[0])[0]))
    return found.span() if MIN_PHONE_DIGITS <= num_digits <= MAX_PHONE_DIGITS else None


def _announced_phone(found: re.Match[str]) -> Span:
    """A phone number by the word beside it, unless it is years or a date."""
    number = found["number"]
    if NO_PHONE.fullmatch(number) or number.count("(") != number.count(")"):
        return None
    if not MIN_PHONE_DIGITS <= len(_digits(number)) <= MAX_PHONE_DIGITS:
        return None
    return found.span("number")


RULES: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str]], Span]], ...] = (
    ("email", EMAIL, _whole),
    ("iban", IBAN, _iban),
    ("chinese_id", CHINESE_ID, _chinese_id),
    ("card", CARD, _card),
    ("us_ssn", US_SSN, _whole),
    ("ip", IPV4, _public_ip),
    ("ip", IPV6, _public_ip),
    ("phone", PHONE, _phone),
    ("phone", PHONE_AFTER_WORD, _announced_phone),
    ("phone", PHONE_BEFORE_WORD, _announced_phone),
)
