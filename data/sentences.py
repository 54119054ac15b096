"""A document's text in, the offsets at which its sentences end out. English and Chinese, by rules.

Terminators stay with the quotes and brackets that close after them, as in 他说：“你好。”; runs such as ？！
and …… stay together; a newline always ends a sentence. A full stop is weighed: abbreviations, initials,
decimals and list numbers do not end one. Where rules cannot know, the longer sentence is kept.
"""

import re

ENDS_ALWAYS = frozenset("。！？｡؟۔।॥")
OPENERS = "\"'“‘«‹（([{「『《【〈¿¡"
CONTINUES = frozenset("，、；：,;:")  # after a mark: the sentence goes on, as in “真的吗？”，他问
WORD = re.compile(r"[A-Za-z]+")
INITIAL = re.compile(
    r"(?:[A-Za-z]\.)*[A-Z]|(?:[A-Za-z]\.)+[A-Za-z]{1,2}"
)  # J, U.S, p.m, Ph.D is below
LIST_NUMBER = re.compile(r"[(（]?(?:\d{1,3}(?:\.\d{1,3})*|[A-Za-z]|[IVXivx]{1,5})")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEVER_LAST = _words(  # the name or phrase they belong to follows
    """dr mr mrs ms messrs mme prof st ste gen adm maj capt cpt cmdr col lt sgt cpl pvt rev hon
    pres gov sen rep amb supt mt ft vs v cf viz e.g i.e eg ie ca approx fr mlle esp
    incl resp"""
)
BEFORE_NUMBERS = _words(  # part of what follows if that is a number
    """no nos nr fig figs tab eq eqs eqn sec sect secs ch chap vol vols p pp pg pt art op par para
    ver ex app sch cl ser bk l ll n ed eds"""
)
MAY_BE_LAST = _words(  # a sentence ends here only if what follows often begins one
    """etc al inc ltd co corp bros llc plc jr sr esq dept univ assn est jan feb mar apr jun jul aug
    sep sept oct nov dec mon tue tues wed thu thur thurs fri sat sun ave blvd rd hwy ph.d m.d
    b.a m.a b.sc m.sc d.c a.d b.c b.c.e c.e a.k.a vol dist mfg min max avg"""
)
STARTERS = _words(  # words that often begin one
    """a after all also although an and another as at because before both but by critics despite
    during each even every few for from he her here his how however i if in indeed instead it
    its later like many meanwhile more most much my no nor not now of on once one only or other
    our over perhaps she since so some soon still such that the their then there therefore these
    they this those though thus to today two under unlike until we what when where whether which
    while who why with would yes yet you"""
)


MARKS = ".!?。！？｡…؟۔।॥"
CLOSERS = "\"'”’»›）)」』》】〉\\]}"


def _plain_word() -> str:
    """What stands before a full stop that surely is no abbreviation's or list number's: five small letters.

    No abbreviation of five letters and more may end in them, nor may they be a Roman number.
    """
    tails = {word[-5:] for word in NEVER_LAST | BEFORE_NUMBERS | MAY_BE_LAST if len(word) >= 5}
    exceptions = "".join(rf"(?<!{re.escape(tail)}\.)" for tail in sorted(tails))
    return rf"(?<=[a-z]{{5}}\.)(?<![ivx]{{5}}\.){exceptions}"


MARK = rf"""(?:[{MARKS}]*+)([{CLOSERS}]*+)  # quotes and brackets that close after the mark
        (?:\[\d{{1,3}}\])*+               # footnote marks, as in "... ended.[12] Then"
        (\s*+)"""
CLOSE, SPACE = 3, 4  # groups of a mark that is to be weighed; other matches end a sentence
SLOW_CANDIDATE = re.compile(rf"\n\s*+()()|[{MARKS}]{MARK}", re.VERBOSE)
CANDIDATE = re.compile(
    rf"""[\n{MARKS}](?:
        (?<=\n)\s*+()
      | (?:{_plain_word()}[ ](?=[A-Z])|(?<=[。！？])[”’」』]*+(?:(?=[\u4e00-\u9fff“])|\n\s*+))()
      | (?!(?<=\.)(?:[ ]?[a-z]|[A-Z0-9])){MARK}  # "3.5", "example.org", "p. of"
    )""",
    re.VERBOSE,
)


def sentence_ends(text: str, candidates: re.Pattern[str] = CANDIDATE) -> list[int]:
    """Character offsets, exclusive and ascending, at which the sentences of `text` end.

    The last is len(text). White space belongs to the sentence before it. Of an empty text: [].
    candidates: SLOW_CANDIDATE gives the same and weighs every mark.
    """
    ends: list[int] = []
    start = 0
    for found in candidates.finditer(text):
        if found.lastindex != SPACE:
            start = found.end()
        elif (end := _end_of(text, found, start)) is not None:
            start = end
        else:
            continue
        ends.append(start)
    if start < len(text):
        ends.append(len(text))
    return ends


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, which are the whole of it when joined."""
    ends = sentence_ends(text)
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _end_of(text: str, found: re.Match[str], start: int) -> int | None:
    """Where the sentence that began at `start` ends, if it ends at this mark; else None."""
    close, space, end = found[CLOSE], found[SPACE], found.end()
    if end == len(text) or "\n" in space:
        return end
    following = text[end]
    if following in CONTINUES:
        return None
    if not space and close.startswith('"') and _opens(text, found.start(CLOSE)):
        end = found.start(CLOSE)  # 他走了。"你好": the quote begins the next sentence
    mark = text[found.start() : found.start(CLOSE)]
    if not ENDS_ALWAYS.isdisjoint(mark):
        return end
    if not space:
        return end if _ends_before_han(text, found, following) else None
    first = end
    while first < len(text) - 1 and text[first] in OPENERS:
        first += 1
    if text[first].islower():
        return None
    if mark == "." and _is_abbreviation(text, found.start(), first, start):
        return None
    return end


def _opens(text: str, quote: int) -> bool:
    """Whether a straight quote opens: an even number of them stand before it in its line."""
    return text.count('"', text.rfind("\n", 0, quote) + 1, quote) % 2 == 0


def _ends_before_han(text: str, found: re.Match[str], following: str) -> bool:
    """Whether . ! ? or an ellipsis ends a sentence although no space follows: in Chinese it may."""
    if not (_is_cjk(following) or following in "“「『《【"):
        return False
    mark = text[found.start() : found.start(CLOSE)]
    if "!" in mark or "?" in mark:
        return True
    if "…" in mark or len(mark) > 1:  # 我……我不知道 goes on, “我……”他说 does not
        return bool(found[CLOSE])
    return found.start() > 0 and _is_cjk(text[found.start() - 1])


def _is_cjk(character: str) -> bool:
    """Chinese ideographs and Japanese kana."""
    return "\u3040" <= character <= "\u9fff" or "\U00020000" <= character <= "\U0003134f"


def _is_abbreviation(text: str, dot: int, first: int, start: int) -> bool:
    """Whether the full stop at `dot` belongs to its word. first: offset of what follows the space."""
    words = text[max(start, dot - 24) : dot].split()
    word = words[-1].lstrip(OPENERS) if words else ""
    lower = word.lower()
    if lower in NEVER_LAST:
        return True
    if lower in BEFORE_NUMBERS and text[first].isdigit():
        return True
    if LIST_NUMBER.fullmatch(text[start:dot].strip()):
        return True
    if lower in MAY_BE_LAST or INITIAL.fullmatch(word):
        if text[first].isdigit():
            return True
        following = WORD.match(text, first)
        return following is not None and following[0].lower() not in STARTERS
    return False
