"""A text in, the hashes of its words, of its n-grams and of all of it out: what duplicates are found by.

A word is a run of letters, marks and digits of one text, in lower case; in scripts that write no
spaces (Han, Kana, Thai, Lao, Khmer, Myanmar) every character is a word. Punctuation, symbols and
white space are passed over. So are differences of case, and of compatibility forms (NFKC).
"""

import functools
import unicodedata

import numpy as np
import xxhash

from data.hashing import mix64

SEPARATOR, PART_OF_WORD, WORD = 0, 1, 2  # kinds of characters
UNSPACED = (  # first and last code point of scripts that write words together
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FDF), (0x3005, 0x3007),
    (0x3021, 0x3029), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xAA60, 0xAA7F), (0xF900, 0xFAFF), (0x1B000, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
BASE = np.uint64(0x9E3779B97F4A7C55)  # odd, so that it has an inverse modulo 2^64
STEP = np.uint64(0xC2B2AE3D27D4EB4F)
BLOCK = 1 << 16  # characters whose powers are kept


@functools.cache
def kinds_of_characters() -> np.ndarray:
    """uint8 [0x110000]: the kind of each code point."""
    kinds = np.zeros(0x110000, dtype=np.uint8)
    for code in range(0x110000):
        if unicodedata.category(chr(code))[0] in "LMN":
            kinds[code] = PART_OF_WORD
    for first, last in UNSPACED:
        part = kinds[first : last + 1]
        part[part == PART_OF_WORD] = WORD
    return kinds


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """uint64 [BLOCK + 1] each: powers of BASE and of its inverse, modulo 2^64."""
    inverse = np.uint64(pow(int(BASE), -1, 1 << 64))
    powers = []
    for factor in (BASE, inverse):
        values = np.full(BLOCK + 1, factor, dtype=np.uint64)
        values[0] = 1
        powers.append(np.multiply.accumulate(values))
    return powers[0], powers[1]


def word_hashes(text: str) -> np.ndarray:
    """uint64 [num_words]: a hash of each word, in order. `words_of` tells which words these are."""
    codes = np.frombuffer(_folded(text).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    if len(codes) == 0:
        return np.zeros(0, dtype=np.uint64)
    starts, ends = _spans(kinds_of_characters()[codes])
    powers, inverses = _powers()
    hashes = np.empty(len(starts), dtype=np.uint64)
    first = 0
    while first < len(starts):  # in parts, so that powers of any length of text are at hand
        offset = int(starts[first])
        last = max(first + 1, int(np.searchsorted(ends, offset + BLOCK, side="right")))
        if int(ends[last - 1]) - offset > BLOCK:  # one word longer than all powers
            hashes[first] = xxhash.xxh3_64_intdigest(codes[offset : ends[first]].tobytes())
            first += 1
            continue
        part = codes[offset : ends[last - 1]].astype(np.uint64) + np.uint64(1)
        sums = np.concatenate([[np.uint64(0)], np.cumsum(part * powers[: len(part)])])
        begin, end = starts[first:last] - offset, ends[first:last] - offset
        hashes[first:last] = (sums[end] - sums[begin]) * inverses[begin]
        first = last
    return mix64(hashes)


def _spans(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends) of the words of a text, int64, from the kinds of its characters."""
    in_word = kinds == PART_OF_WORD
    before = np.concatenate([[False], in_word[:-1]])
    after = np.concatenate([in_word[1:], [False]])
    alone = kinds == WORD
    starts = np.flatnonzero((in_word & ~before) | alone)
    ends = np.flatnonzero((in_word & ~after) | alone) + 1
    return starts, ends


def words_of(text: str) -> list[str]:
    """The words themselves: the slow twin of `word_hashes`."""
    words: list[str] = []
    run = ""
    for character in _folded(text):
        kind = int(kinds_of_characters()[ord(character)])
        if kind == PART_OF_WORD:
            run += character
            continue
        if run:
            words.append(run)
            run = ""
        if kind == WORD:
            words.append(character)
    return [*words, run] if run else words


def _folded(text: str) -> str:
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).lower()


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """uint64 [max(1, num_words - n + 1)] of every n words in a row; a shorter text is one n-gram.

    words: as from `word_hashes`. Empty for a text without words.
    """
    if len(words) == 0:
        return words
    width = min(n, len(words))
    sums = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for place in range(width):
        sums *= STEP
        sums += words[place : place + len(sums)]
    return mix64(sums)


def content_hash(words: np.ndarray) -> int:
    """128 bits of all words in order: equal for texts that differ in case, spacing and punctuation only."""
    return xxhash.xxh3_128_intdigest(words.tobytes())
