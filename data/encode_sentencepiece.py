"""Words in, sentencepiece's tokens out, each with its place in the word and whether a word starts there.

The ids are exactly those of the exported Hugging Face form, which also segments between spaces.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, final

import numpy as np
import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError

from data.tokenizer_hf import SPECIAL_TOKENS, build_tokenizer, model_kind, read_model
from data.word_cache import WordTokens, flatten

# Characters that every sentencepiece model of ours normalises to a space. A text that is cut beside one
# has the ids of its two sides, because no piece but its first character is ever a space.
SPACES = " \n\t\r\u3000"
WORD_MARK = "\u2581"
UNKNOWN, IRREGULAR = 255, 254  # widths: not measured yet; not to be taken alone
# Where each character is normalised by itself: Latin, Greek, Cyrillic, punctuation, kana, Han, Hangul,
# full-width forms. Elsewhere a mark may join the character before it.
REGULAR = ((0x21, 0x7E), (0xA1, 0x24F), (0x370, 0x481), (0x48A, 0x52F), (0x2010, 0x205E),
           (0x3001, 0x3029), (0x3030, 0x303F), (0x3041, 0x3096), (0x30A1, 0x30FF), (0x3400, 0x9FFF),
           (0xAC00, 0xD7A3), (0xFF01, 0xFF5E))  # fmt: skip
LONG_CHARACTERS = 64
SegmentStarts = Callable[[list[str]], np.ndarray]  # words -> bool [characters of all]


@final
class SentencePieceWords:
    """A sentencepiece model of ours, with tables over its pieces. A word is what lies between spaces."""

    gap = 1

    def __init__(self, path: Path, segment: SegmentStarts | None = None) -> None:
        raw = path.read_bytes()
        try:
            proto = read_model(raw)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
        except (DecodeError, RuntimeError) as error:
            raise ValueError(f"{path} is no sentencepiece model: {error}") from None
        self.vocab_size = int(self._processor.get_piece_size())
        self.kind: Literal["unigram", "bpe"] = model_kind(proto)
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        found = {token: pieces.index(token) for token in SPECIAL_TOKENS if token in pieces}
        if found != {token: index for index, token in enumerate(SPECIAL_TOKENS)}:
            raise ValueError(
                f"{path} is no sentencepiece model of ours: {list(SPECIAL_TOKENS)} must have the ids 0 to 4, "
                f"found {found}. Use the folder of its fast Hugging Face form (tokenizer.json) instead"
            )
        self.special_ids = found
        self._segment = segment
        self._proto = proto
        self._roots = _roots(pieces)
        is_byte = [self._processor.is_byte(i) for i in range(self.vocab_size)]
        self._make_tables(pieces, is_byte)
        self._widths = np.full(0x10000, IRREGULAR, np.uint8)  # character -> characters it becomes
        for first, last in REGULAR:
            self._widths[first : last + 1] = UNKNOWN

    def _make_tables(self, pieces: list[str], is_byte: list[bool]) -> None:
        both = list(zip(pieces, is_byte, strict=True))
        byte = np.array([int(p[3:5], 16) if b else -1 for p, b in both])
        self._continues = (byte >= 0x80) & (byte < 0xC0)  # inside a character spelt in bytes
        self._num_characters = np.array([1 if b else len(p) for p, b in both])
        self._num_characters[self._continues] = 0
        self._marked = np.array([p.startswith(WORD_MARK) for p in pieces])
        # From the end of a token, in normalised characters, to its first that is visible; less 1 for the mark
        # that every word begins with.
        self._first_steps = self._marked - np.maximum(self._num_characters, 1) - 1
        # A Han character spelt in bytes begins with E4 to E9 (U+4000 to U+9FFF).
        self._han = np.array([is_han(p[0]) for p in pieces]) | ((byte >= 0xE4) & (byte <= 0xE9))

    @functools.cached_property
    def _exported(self) -> tokenizers.Tokenizer:
        """Its Hugging Face form, for the few words that sentencepiece may take otherwise.

        Read from JSON, as the exported one is: a score read so can differ in its last bit, which decides a tie.
        """
        exported = tokenizers.Tokenizer.from_str(build_tokenizer(self._proto).to_str())
        exported.encode_special_tokens = True
        return exported

    def piece_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(characters, bytes) int64 [vocab_size]; a word mark is a space, a special token nothing."""
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        sizes = [len(p.replace(WORD_MARK, " ").encode("utf-8")) for p in pieces]
        nbytes = np.where([self._processor.is_byte(i) for i in range(self.vocab_size)], 1, sizes)
        special = list(self.special_ids.values())
        characters = self._num_characters.copy()
        characters[special] = nbytes[special] = 0
        return characters, nbytes

    def spaced(self, texts: Sequence[str]) -> str:
        text = " ".join(texts)
        for space in SPACES[1:]:
            text = text.replace(space, " ")
        return text

    def words(self, texts: Sequence[str]) -> list[str]:
        return self.spaced(texts).split(" ")

    def encode_words(self, words: list[str]) -> WordTokens:
        text = "".join(words)
        as_arrays = len(text) > LONG_CHARACTERS * len(words)  # the same, faster for long ones
        kind = "numpy" if as_arrays else int
        lists = self._processor.encode(words, num_threads=1, return_type=kind)
        counts, ids = flatten(lists)
        widths = self._width_of(text)
        doubtful = [*self._tied(counts, ids).tolist(), *self._normalised_otherwise(words, widths)]
        if doubtful:
            for word in doubtful:
                exported = self._exported.encode(words[word], add_special_tokens=False).ids
                lists[word] = np.array(exported, np.int32) if as_arrays else exported
            counts, ids = flatten(lists)
        offsets = self._offsets(words, widths, counts, ids)
        starts = self._starts(words, counts, ids, offsets)
        return WordTokens(counts, ids.astype(np.uint32), offsets, starts)

    def _tied(self, counts: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Words whose pieces would be as good in another order, as i+ii and ii+i, or ..+. and .+..

        Which order wins is a matter of rounding, and sentencepiece rounds otherwise than its exported form.
        """
        roots = self._roots[ids]
        pairs = np.flatnonzero((roots[1:] == roots[:-1]) & (ids[1:] != ids[:-1]))
        ends = np.cumsum(counts)
        words = np.searchsorted(ends, pairs, side="right")
        return np.unique(words[pairs + 1 < ends[words]])

    def _normalised_otherwise(self, words: list[str], widths: np.ndarray) -> list[int]:
        """Words that the exported tokenizer normalises in another way, as か and a voiced mark after it."""
        ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
        if not (odd := np.flatnonzero(widths == IRREGULAR)).size:
            return []
        irregular = np.searchsorted(ends, odd, side="right")
        return [word for word in np.unique(irregular).tolist() if self._differs(words[word])]

    def _differs(self, word: str) -> bool:
        ours = self._processor.normalize(word).replace(WORD_MARK, " ").strip(" ")
        theirs = self._exported.normalizer.normalize_str(word)  # pyright: ignore[reportOptionalMemberAccess]
        return ours != theirs.replace(WORD_MARK, " ").strip(" ")

    def _offsets(
        self, words: list[str], widths: np.ndarray, counts: np.ndarray, ids: np.ndarray
    ) -> np.ndarray:
        """int64 [n]: the character of its word that each token's first visible character comes from."""
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        token_ends, character_ends = np.cumsum(counts), np.cumsum(lengths)
        begins = character_ends - lengths
        stops = np.cumsum(self._num_characters[ids])  # of tokens, in normalised characters
        # A word becomes its mark and what its characters become.
        spelt = np.diff(np.append(0, stops)[token_ends], prepend=0)
        uneven = np.flatnonzero(widths != 1)
        owners = np.searchsorted(character_ends, uneven, side="right")
        irregular = widths[uneven] == IRREGULAR
        growth = np.where(irregular, 0, widths[uneven]).astype(np.int64) - 1
        made = lengths + np.bincount(owners, growth, len(words)).astype(np.int64)
        slow = spelt != made + (lengths > 0)
        slow[owners[irregular]] = True
        # A byte inside a character stands where the character does; a mark stands for a space before.
        made_ends, spelt_ends = np.cumsum(made), np.cumsum(spelt)
        shift = (made_ends - made) - (spelt_ends - spelt)
        if not len(uneven):  # each character stands where it stood
            offsets = stops + self._first_steps[ids] + np.repeat(shift - begins, counts)
        else:
            widths = np.where(widths == IRREGULAR, 0, widths)
            origins = np.append(np.repeat(np.arange(len(widths)), widths), 0)
            firsts = stops + self._first_steps[ids] + np.repeat(shift, counts)
            firsts = np.where(np.repeat(slow, counts), 0, firsts)
            offsets = origins[firsts] - np.repeat(begins, counts)
        for word in np.flatnonzero(slow).tolist():
            within = slice(int(token_ends[word] - counts[word]), int(token_ends[word]))
            offsets[within] = self._offsets_slowly(words[word], ids[within])
        return offsets

    def _offsets_slowly(self, word: str, ids: np.ndarray) -> np.ndarray:
        """The slow twin of `_offsets`, for one word of any characters."""
        if self._differs(word):
            encoding = self._exported.encode(word, add_special_tokens=False)
            return np.array([min(start, len(word) - 1) for start, _ in encoding.offsets], np.int64)
        normalised, origins = self._processor.normalize(word, with_offsets=True)
        widths = self._num_characters[ids]
        stops = np.cumsum(widths)
        assert len(ids) == 0 or stops[-1] == len(normalised)
        return np.array(origins, np.int64)[stops - np.maximum(widths, 1) + self._marked[ids]]

    def _width_of(self, text: str) -> np.ndarray:
        """uint8 [characters]: how many characters the normaliser makes of each."""
        # What lies beyond the table is as irregular as its last entry.
        codes = np.minimum(np.frombuffer(text.encode("utf-32-le"), "<u4"), len(self._widths) - 1)
        codes = codes.astype(np.int64)  # numpy's own type of an index: faster
        widths = self._widths[codes]
        if (widths == UNKNOWN).any():
            for code in np.unique(codes[widths == UNKNOWN]).tolist():
                around = self._processor.normalize(f"a{chr(code)}a")
                regular = around[:2] + around[-1] == f"{WORD_MARK}aa" and len(around) > 3
                regular = regular and WORD_MARK not in around[2:]
                self._widths[code] = len(around) - 3 if regular else IRREGULAR
            widths = self._widths[codes]
        return widths

    def _starts(
        self, words: list[str], counts: np.ndarray, ids: np.ndarray, offsets: np.ndarray
    ) -> np.ndarray:
        """bool [n]: marked tokens, Han tokens, and what follows one (a comma, a Latin name).

        With a segmenter, those Han tokens only whose first character it starts a word with.
        """
        han = self._han[ids]
        starts = self._marked[ids].copy()
        starts[1:] |= han[:-1] & ~han[1:] & ~self._continues[ids[1:]]
        if self._segment is None:
            return starts | han
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        places = np.repeat(np.cumsum(lengths) - lengths, counts) + offsets
        return starts | (han & self._segment(words)[places])


def _roots(pieces: list[str]) -> np.ndarray:
    """int64 [vocabulary]: equal for pieces that repeat the same string, as ".", "..." and "......"."""
    numbers: dict[str, int] = {}
    roots = []
    for piece in pieces:
        period = (piece + piece).find(piece, 1)
        roots.append(numbers.setdefault(piece[:period], len(numbers)))
    return np.array(roots)


def is_han(character: str) -> bool:
    """Whether this is a Chinese ideograph (the blocks that BERT's own tokenizer takes as such)."""
    code = ord(character)
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0xF900 <= code <= 0xFAFF
        or 0x20000 <= code <= 0x3134F
    )
