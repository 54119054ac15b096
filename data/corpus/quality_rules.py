"""A text in, the figures by which its quality is judged out: counts and shares of words, lines, n-grams.

Words are ours: a run of letters and digits, and every Han, Kana, Thai ... character by itself, so that rules
made for English hold for scripts without spaces, too. They never become Python strings: a word is a hash,
computed in numpy from its code points, and so is an n-gram.
"""

import functools
from collections import Counter
from dataclasses import dataclass

import numpy

from data.corpus.characters import Kind, kinds_of

BULLETS = frozenset("•●○■□▪▸►◆◇‣⁃∙·*+")
LINE_ENDS = frozenset(".!?。！？…；：;:，,、．｡\"'”’」』）)》]।॥؟۔،؛։።")
FACTOR = 0xD6E8FEB86659FD93  # odd: it has an inverse modulo 2^64
INVERSE = pow(FACTOR, -1, 1 << 64)
MIXER = numpy.uint64(0x9E3779B97F4A7C15)
SHIFT = numpy.uint64(29)
LONGEST_WORD = 40


@dataclass(frozen=True)
class Figures:
    """What is measured of a text; shares are fractions of one."""

    num_words: int
    is_spaced: bool  # whether most words stand between spaces
    mean_word_chars: float  # of words in scripts with spaces
    alphabetic_share: float  # of words: those with a letter
    odd_word_share: float  # of words: x7k2p, bcdfghk, or longer than any word
    digit_share: float  # of characters that are no space
    uppercase_share: float  # of letters with case
    common_han_share: float  # of Han characters; 1 of none
    symbols_per_word: float  # "#" and ellipses
    bullet_line_share: float
    ellipsis_line_share: float
    ended_line_share: float  # lines that end in punctuation
    duplicate_line_share: float  # lines that have stood before
    duplicate_line_char_share: float
    duplicate_paragraph_share: float


class Words:
    """The words of a text: `hashes` u64[words], `sizes` i64[words] in characters.

    Takes up to 80 bytes a character while it works.
    """

    def __init__(self, text: str) -> None:
        lowered = text.lower()
        codes = numpy.frombuffer(lowered.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        kinds = kinds_of(lowered)
        in_word = (kinds >= Kind.DIGIT) & (kinds <= Kind.UNSPACED)
        alone = (kinds >= Kind.COMMON_HAN) & (kinds <= Kind.UNSPACED)
        begins = in_word.copy()
        begins[1:] &= alone[1:] | ~in_word[:-1] | alone[:-1]
        self._starts = numpy.flatnonzero(begins)
        self._codes, self._kinds, self._in_word = codes, kinds, in_word
        self.num_unspaced = int(numpy.count_nonzero(alone))
        self.sizes = self._per_word(in_word)
        self.hashes = self._hash()

    def __len__(self) -> int:
        return len(self._starts)

    def _per_word(self, characters: numpy.ndarray) -> numpy.ndarray:
        """i64[words]: the sum over each word of a bool per character that is False between words."""
        if not len(self._starts):
            return numpy.zeros(0, numpy.int64)
        return numpy.add.reduceat(characters, self._starts, dtype=numpy.int64)

    def _hash(self) -> numpy.ndarray:
        """Sum of code x FACTOR^place, made independent of where in the text the word stands."""
        if not len(self._starts):
            return numpy.zeros(0, numpy.uint64)
        powers, inverses = _powers(max(16, len(self._codes).bit_length()))
        terms = self._codes.astype(numpy.uint64)
        terms += numpy.uint64(1)
        terms *= powers[: len(terms)]
        terms *= self._in_word
        hashes = numpy.add.reduceat(terms, self._starts)
        hashes *= inverses[self._starts]
        hashes ^= hashes >> SHIFT
        return hashes * MIXER

    def num_numbers(self) -> int:
        """Words without a letter."""
        return int(numpy.count_nonzero(self._per_word(self._kinds == Kind.DIGIT) == self.sizes))

    def num_odd(self) -> int:
        """Words like x7k2p (two changes between letters and digits), bcdfghk (no vowel), too long."""
        digits = self._kinds == Kind.DIGIT
        changes = numpy.zeros(len(digits), bool)
        changes[1:] = (digits[1:] != digits[:-1]) & self._in_word[1:] & self._in_word[:-1]
        changes[self._starts] = False
        consonants = _is_consonant().take(self._codes, mode="clip")
        odd = self._per_word(changes) >= 2
        odd |= (self._per_word(consonants) == self.sizes) & (self.sizes >= 6)
        odd |= self.sizes > LONGEST_WORD
        return int(numpy.count_nonzero(odd))

    def num_found(self, words: frozenset[str], enough: int) -> int:
        """How many of `words` (in lower case) stand in the text; it stops looking at `enough`."""
        wanted = _hashes_of(words)
        found = wanted.intersection(self.hashes[:300].tolist())
        if len(found) < enough:
            found = wanted.intersection(self.hashes.tolist())
        return len(found)

    def _ngrams(self, length: int) -> numpy.ndarray:
        """u64[words - length + 1], equal for equal runs of words."""
        size = len(self) - length + 1
        ngrams = self.hashes[:size].copy()
        for offset in range(1, length):
            ngrams *= numpy.uint64(FACTOR)
            ngrams += self.hashes[offset : offset + size]
        return ngrams

    def top_share(self, length: int) -> float:
        """Of the commonest n-gram: its characters in all its places, of all characters in words."""
        if len(self) <= length:
            return 0.0
        ngrams = self._ngrams(length)
        ordered = numpy.sort(ngrams)
        starts = numpy.flatnonzero(numpy.concatenate(([True], ordered[1:] != ordered[:-1])))
        counts = numpy.diff(numpy.append(starts, len(ordered)))
        most = int(counts.argmax())
        if counts[most] < 2:
            return 0.0
        first = int((ngrams == ordered[starts[most]]).argmax())
        num_chars = int(counts[most]) * int(self.sizes[first : first + length].sum())
        return min(1.0, num_chars / int(self.sizes.sum()))  # places may overlap

    def repeated_share(self, length: int) -> float:
        """Of all n-grams that have stood before: the characters they cover, each counted once."""
        if len(self) <= length:
            return 0.0
        ngrams = self._ngrams(length)
        order = numpy.argsort(ngrams)
        ordered = ngrams[order]
        differs = numpy.concatenate(([True], ordered[1:] != ordered[:-1]))
        starts = numpy.flatnonzero(differs)
        if len(starts) == len(ordered):
            return 0.0
        again = numpy.ones(len(ngrams), bool)
        again[numpy.minimum.reduceat(order, starts)] = False  # where each stands first
        edges = numpy.zeros(len(self) + 1, numpy.int64)
        places = numpy.flatnonzero(again)
        edges[places] += 1
        edges[places + length] -= 1
        covered = numpy.cumsum(edges[:-1]) > 0
        return int(self.sizes[covered].sum()) / int(self.sizes.sum())


def measure(text: str, words: Words) -> Figures:
    """All figures of `text` but those of n-grams; `words` are its own."""
    kinds = numpy.bincount(kinds_of(text), minlength=len(Kind)).tolist()
    num_han = kinds[Kind.COMMON_HAN] + kinds[Kind.RARE_HAN]
    num_words = len(words)
    num_spaced = num_words - words.num_unspaced
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    paragraphs = [part for part in map(str.strip, text.split("\n\n")) if part]
    line_share, char_share = _duplicates(lines)
    num_symbols = text.count("#") + text.count("...") + text.count("…")
    return Figures(
        num_words=num_words,
        is_spaced=2 * words.num_unspaced < num_words or not num_words,
        mean_word_chars=_share(int(words.sizes.sum()) - words.num_unspaced, num_spaced),
        alphabetic_share=1 - _share(words.num_numbers(), num_words),
        odd_word_share=_share(words.num_odd(), num_words),
        digit_share=_share(kinds[Kind.DIGIT], len(text) - kinds[Kind.SPACE]),
        uppercase_share=_share(kinds[Kind.UPPER], kinds[Kind.UPPER] + kinds[Kind.LOWER]),
        common_han_share=_share(kinds[Kind.COMMON_HAN], num_han) if num_han else 1.0,
        symbols_per_word=_share(num_symbols, num_words),
        bullet_line_share=_share(sum(map(_is_bullet, lines)), len(lines)),
        ellipsis_line_share=_share(sum(ln.endswith(("...", "…")) for ln in lines), len(lines)),
        ended_line_share=_share(sum(line[-1] in LINE_ENDS for line in lines), len(lines)),
        duplicate_line_share=line_share,
        duplicate_line_char_share=char_share,
        duplicate_paragraph_share=_duplicates(paragraphs)[0],
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _is_bullet(line: str) -> bool:
    return line[0] in BULLETS or line.startswith("- ")


def _duplicates(pieces: list[str]) -> tuple[float, float]:
    """(share of pieces, share of characters) in pieces that have stood before."""
    if len(pieces) < 2 or len(set(pieces)) == len(pieces):
        return 0.0, 0.0
    counts = Counter(pieces)
    chars_again = sum((number - 1) * len(piece) for piece, number in counts.items())
    return 1 - len(counts) / len(pieces), _share(chars_again, sum(map(len, pieces)))


@functools.lru_cache(maxsize=2)
def _powers(bits: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """FACTOR^n and FACTOR^-n modulo 2^64, for n below 2^bits."""
    tables = []
    for factor in (FACTOR, INVERSE):
        table = numpy.full(1 << bits, factor, numpy.uint64)
        table[0] = 1
        tables.append(numpy.multiply.accumulate(table))
    return tables[0], tables[1]


@functools.cache
def _is_consonant() -> numpy.ndarray:
    """Code point -> whether it is an ASCII consonant, bool[128]."""
    table = numpy.zeros(128, bool)
    table[[ord(letter) for letter in "bcdfghjklmnpqrstvwxz"]] = True
    return table


@functools.cache
def _hashes_of(words: frozenset[str]) -> frozenset[int]:
    return frozenset(Words(" ".join(sorted(words))).hashes.tolist())
