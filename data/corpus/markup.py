"""A document with left-over HTML and Markdown in, its prose out.

Only what is certainly markup goes: tags by the names of HTML's elements, entities with a semicolon, and
Markdown only in a text that shows itself to be Markdown. "a < b", List<T> and 2 * 3 * 4 stay.
"""

import bisect
import html
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from data.corpus.steps import Document, Verdict

BLOCK_ELEMENTS = (
    "address|article|aside|blockquote|body|br|canvas|caption|center|dd|details|dialog|dir|div|dl|dt|"
    "fieldset|figcaption|figure|footer|form|frame|frameset|h[1-6]|head|header|hr|html|iframe|legend|li|"
    "link|main|menu|meta|nav|noframes|noscript|object|ol|optgroup|option|p|pre|section|select|summary|"
    "table|tbody|td|template|textarea|tfoot|th|thead|title|tr|ul|video"
)
INLINE_ELEMENTS = (
    "a|abbr|acronym|applet|area|audio|b|base|basefont|bdi|bdo|big|button|cite|code|col|colgroup|data|"
    "datalist|del|dfn|em|embed|font|i|img|input|ins|kbd|label|map|mark|marquee|meter|nobr|noembed|"
    "output|param|picture|progress|q|rb|rp|rt|ruby|s|samp|slot|small|source|span|strike|strong|sub|"
    "sup|svg|time|track|tt|u|var|wbr"
)
ATTRIBUTES = r"""(?:\s+[A-Za-z_:@][\w:.@-]*(?:\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>=]+))?)*"""
BLOCK_TAG = re.compile(rf"</?(?:{BLOCK_ELEMENTS}){ATTRIBUTES}\s*/?>", re.IGNORECASE)
INLINE_TAG = re.compile(rf"</?(?:{INLINE_ELEMENTS}){ATTRIBUTES}\s*/?>", re.IGNORECASE)
DECLARATION = re.compile(r"<!doctype[^<>]*>|<!\[CDATA\[|\]\]>", re.IGNORECASE)
HIDDEN = (
    ("<script", "</script>", "script"),
    ("<style", "</style>", "script"),
    ("<!--", "-->", "html_comment"),
)
AMPERSANDS = re.compile(r"&(?:(?:amp|#38|#[xX]26);)+(?=(?:#\d|#[xX]|[a-zA-Z])[a-zA-Z0-9]*;)")
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")

FRONT_MATTER = re.compile(
    r"\A---\n(?:[^\n]*\n)*?(?:---|\.\.\.)(?:\n|\Z)|\A\+\+\+\n(?:[^\n]*\n)*?\+\+\+(?:\n|\Z)"
)
FRONT_MATTER_KEY = re.compile(r"^[A-Za-z_][\w-]*\s*[:=]", re.MULTILINE)
FENCE = re.compile(r"^[ \t>]*(?P<fence>`{3,}|~{3,})(?P<info>[^\n`]*)$", re.MULTILINE)
LONGEST_FENCE = 8  # marks; longer ones count as so long
TABLE = re.compile(
    r"^[ \t]*\|?[^\n|]*\|[^\n]*\n"  # the header
    r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*(?:\n|\Z)"  # |---|---|
    r"(?:[^\n]*\|[^\n]*(?:\n|\Z))*",
    re.MULTILINE,
)
HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(?=\S)", re.MULTILINE)
HEADING_END = re.compile(r"[ \t]*\{#[\w-]+\}[ \t]*$", re.MULTILINE)
RULE = re.compile(
    r"^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,}|={3,})$\n?", re.MULTILINE
)
IMAGE = re.compile(r"!\[[^\[\]\n]*\]\([^()\s]*(?:\([^()\s]*\)[^()\s]*)*(?:\s+\"[^\"\n]*\")?\)")
LINK = re.compile(
    r"\[(?P<text>[^\[\]\n]+|!?\[[^\[\]\n]*\])\]"
    r"\((?P<url>[^()\s]*(?:\([^()\s]*\)[^()\s]*)*)(?:\s+\"[^\"\n]*\")?\)"
)
URL_LIKE = re.compile(
    r"\A(?:$|#|\.{0,2}/|[a-z][a-z+.-]*:|www\.|[^\s/]+/|[\w./%-]+\.[a-z]{2,5}(?:#|\Z))", re.I
)
REFERENCE = re.compile(
    r"^ {0,3}\[[^\[\]\n]+\]:[ \t]+\S+(?:[ \t]+[\"'(][^\n]*[\"')])?[ \t]*(?:\n|\Z)", re.MULTILINE
)
AUTO_LINK = re.compile(r"<((?:https?|ftp)://[^<>\s]+|mailto:[^<>\s]+)>")
TEMPLATE = re.compile(r"\{\{[<%][^\n{}]*[>%]\}\}\n?")
COMPONENT = re.compile(
    rf"^[ \t]*</?[A-Z][a-z]+[A-Za-z]*{ATTRIBUTES}\s*/?>[ \t]*$", re.MULTILINE
)  # MDX
BOLD = re.compile(r"\*\*(?=[^\s*])(?P<text>[^\n]{0,500}?[^\s*])\*\*")
UNDERLINED = re.compile(  # not names such as __init__: it holds a space or Han
    r"(?<![A-Za-z0-9_])(?P<mark>__?)(?=[^\s_])(?=[^_\n]*[ \u3400-\u9fff])"
    r"(?P<text>[^_\n]*[^\s_])(?P=mark)(?![A-Za-z0-9_])"
)
ITALIC = re.compile(r"(?<![\w*\\])\*(?=[^\s*])(?P<text>[^*\n]*?[^\s*\\])\*(?![A-Za-z0-9*])")
CODE_SPAN = re.compile(r"(?P<ticks>`{1,2})(?!`)(?P<text>[^`\n]+)(?P=ticks)(?!`)")
QUOTE = re.compile(r"^(?:[ \t]*>)+(?:[ \t]|$)", re.MULTILINE)
SPACE_AT_END = re.compile(r"(?<![ \t])[ \t]+$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n{3,}")
MIN_MARKDOWN_SIGNS = 2  # of different places: one pair of asterisks makes no Markdown
SIGNS = (  # (what every find holds, pattern)
    ("```", FENCE),
    ("~~~", FENCE),
    ("|", TABLE),
    ("# ", HEADING),
    ("**", BOLD),
    ("`", CODE_SPAN),
    ("](", LINK),
)


@dataclass(frozen=True)
class RemoveMarkup:
    """Take out tags, entities and Markdown; count each kind.

    `code` and `tables` say whether fenced code and Markdown tables are dropped or keep their text.
    A document of nothing but markup is dropped ("empty"). Its own output stays as it is.
    """

    code: Literal["drop", "keep"] = "drop"
    tables: Literal["drop", "keep"] = "drop"
    markdown: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{field} is {value!r}; choose drop or keep"
            for field, value in (("code", self.code), ("tables", self.tables))
            if value not in ("drop", "keep")
        ]
        if not isinstance(self.markdown, bool):
            problems.append(f"markdown is {self.markdown!r}; give true or false")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def name(self) -> str:
        return "remove_markup"

    def __call__(self, document: Document) -> Verdict:
        changes: Counter[str] = Counter()
        text = _replace(re.compile("\r\n?"), "\n", document.text, "line_break", changes)
        is_markdown = self.markdown and looks_like_markdown(text)
        before = None
        while before != text:  # taking out one mark may lay another bare; each pass shortens
            before = text
            text = _without_html(text, changes)
            if is_markdown:
                text = self._without_markdown(text, changes)
        if not text.strip():
            return Verdict(None, "empty", f"only markup in {len(document.text)} characters")
        if changes:  # what stood between tags and blocks
            text = BLANK_LINES.sub("\n\n", SPACE_AT_END.sub("", text)).strip("\n")
        return Verdict(text, changes=dict(changes))

    def _without_markdown(self, text: str, changes: Counter[str]) -> str:
        found = FRONT_MATTER.match(text)
        if found and FRONT_MATTER_KEY.search(found[0]):
            text = text[found.end() :]
            changes["front_matter"] += 1
        if "```" in text or "~~~" in text:
            text = _without_fences(text, self.code == "keep", changes)
        if self.tables == "drop":
            text = _replace(TABLE, "", text, "table", changes)
        if "](" in text:
            text = _replace(IMAGE, "", text, "image", changes)
            text = LINK.sub(lambda found: _link_text(found, changes), text)
        for pattern, new, kind in (
            (REFERENCE, "", "link_reference"),
            (AUTO_LINK, r"\1", "link"),
            (TEMPLATE, "", "template"),
            (COMPONENT, "", "tag"),
            (RULE, "", "rule"),
            (HEADING, "", "heading"),
            (HEADING_END, "", "heading"),
            (QUOTE, "", "quote"),
            (CODE_SPAN, r"\g<text>", "code_span"),
            (BOLD, r"\g<text>", "emphasis"),
            (ITALIC, r"\g<text>", "emphasis"),
            (UNDERLINED, r"\g<text>", "emphasis"),
        ):
            text = _replace(pattern, new, text, kind, changes)
        return text


def looks_like_markdown(text: str) -> bool:
    """Whether there is front matter, or at least two signs of Markdown that prose does not have."""
    found = FRONT_MATTER.match(text)
    if found and FRONT_MATTER_KEY.search(found[0]):
        return True
    num_signs = 0
    for held, pattern in SIGNS:
        if held not in text:
            continue
        for _ in pattern.finditer(text):
            num_signs += 1
            if num_signs >= MIN_MARKDOWN_SIGNS:
                return True
    return False


def _without_html(text: str, changes: Counter[str]) -> str:
    """No tags, comments, entities; scripts and style sheets go with what they hold."""
    if "&" in text:
        text = AMPERSANDS.sub("&", text)  # &amp;lt; was escaped twice
        while (new := ENTITY.sub(lambda found: _character(found, changes), text)) != text:
            text = new
    if "<" not in text:
        return text
    for start, end, kind in HIDDEN:
        text = _cut(text, start, end, kind, changes)
    text = _replace(DECLARATION, "", text, "tag", changes)
    text = _replace(BLOCK_TAG, "\n", text, "tag", changes)
    return _replace(INLINE_TAG, "", text, "tag", changes)


def _cut(text: str, start: str, end: str, kind: str, changes: Counter[str]) -> str:
    """`text` without what stands from `start` to the next `end`, whatever their case."""
    lowered = text.lower() if text.isascii() else re.sub("[A-Z]+", lambda up: up[0].lower(), text)
    pieces, at = [], 0
    while (first := lowered.find(start, at)) >= 0:
        last = lowered.find(end, first + len(start))
        if last < 0:
            break
        pieces.append(text[at:first])
        at = last + len(end)
        changes[kind] += 1
    return "".join((*pieces, text[at:])) if pieces else text


def _character(found: re.Match[str], changes: Counter[str]) -> str:
    character = html.unescape(found[0])
    if character.endswith(";") and character != ";":  # no entity of HTML's: prose such as "R&D;"
        return found[0]
    changes["entity"] += 1
    return " " if character.isspace() else character  # &nbsp; &ensp;


def _without_fences(text: str, keep: bool, changes: Counter[str]) -> str:
    """No fenced blocks, or only no fences. One that is never closed is none."""
    fences = list(FENCE.finditer(text))
    closing: dict[str, list[int]] = {}  # marks -> places in `fences` that can close so many
    for place, found in enumerate(fences):
        if not found["info"].strip():
            for length in range(3, min(len(found["fence"]), LONGEST_FENCE) + 1):
                closing.setdefault(found["fence"][:length], []).append(place)
    pieces, end, place = [], 0, 0
    while place < len(fences):
        opening = fences[place]
        places = closing.get(opening["fence"][:LONGEST_FENCE], [])
        next_one = bisect.bisect(places, place)
        if next_one == len(places):
            place += 1
            continue
        closer = fences[places[next_one]]
        pieces.append(text[end : opening.start()])
        if keep:
            pieces.append(text[opening.end() + 1 : closer.start()])
        end = min(closer.end() + 1, len(text))
        place = places[next_one] + 1
        changes["code_block"] += 1
    return "".join((*pieces, text[end:])) if pieces else text


def _link_text(found: re.Match[str], changes: Counter[str]) -> str:
    if not URL_LIKE.match(found["url"]):
        return found[0]  # prose: f[i](x)
    changes["link"] += 1
    return found["text"]


def _replace(
    pattern: re.Pattern[str], new: str, text: str, kind: str, changes: Counter[str]
) -> str:
    text, number = pattern.subn(new, text)
    if number:
        changes[kind] += number
    return text
