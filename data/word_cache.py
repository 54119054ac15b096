"""Texts and a model in, the tokens of every word out: each distinct word is given to the model once.

A word is a run of characters whose tokens depend on nothing around it (which runs those are, the model says).
Words of a language repeat: a dictionary look-up takes the place of most of the model's work.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, Protocol, final

import numpy as np

from data.word_table import MAX_KEY_BYTES, Keys, Spans, WordTable, find_spans, keys_of

TABLE_BITS = 20
MAX_WORDS = 1 << 19  # kept at a time, in about 100 MB; all are forgotten when there are more
MAX_CHARACTERS = (
    32  # of a word that is kept. Chinese without spaces comes in lines, which do not repeat
)


class WordTokens(NamedTuple):
    """The n tokens of w words, word after word. A pure function of each word."""

    counts: np.ndarray  # [w] int64: tokens of each word
    ids: np.ndarray  # [n] uint32
    offsets: np.ndarray  # [n] int64: of a token's first visible character, in its word
    starts: np.ndarray  # [n] bool: whether it starts a word, as masking understands that


class WordModel(Protocol):
    """What cuts texts into words, and words into tokens."""

    gap: int  # characters between one word and the next that belong to neither

    def spaced(self, texts: Sequence[str]) -> str | None:
        """ " ".join(texts) with a space for every character that parts words; None if not all are such."""
        ...

    def words(self, texts: Sequence[str]) -> list[str]:
        """All words of " ".join(texts), in order; with `gap` characters between them they fill it."""
        ...

    def encode_words(self, words: list[str]) -> WordTokens: ...


@final
class WordCache:
    """Looks words up, and has the model encode those that are new."""

    def __init__(self, model: WordModel) -> None:
        self._model = model
        self._forget()

    def encode(self, texts: Sequence[str]) -> WordTokens:
        """The tokens of " ".join(texts) as if it were one word: offsets count from its beginning.

        Same result as `encode_slowly`, in fewer calls of the model.
        """
        if self._num_kept > MAX_WORDS:
            self._forget()
        spaced = self._model.spaced(texts)
        if spaced is None:
            words = self._model.words(texts)
            rows = np.fromiter(map(self._index.__getitem__, words), np.int64, len(words))
            places = _places(np.fromiter(map(len, words), np.int64, len(words)), self._model.gap)
        else:
            spans = find_spans(spaced)
            rows, places = self._rows_of(spans), spans.places
        self._encode_new(rows)
        counts = self._counts.data[rows]
        ends = np.cumsum(counts)
        total = int(ends[-1])
        shift = self._firsts.data[rows] - (ends - counts)
        packed = self._packed.data[np.repeat(shift, counts) + np.arange(total)]
        self._drop_passing()
        return WordTokens(
            np.array([total]),
            packed.astype(np.uint32),
            (packed >> np.uint64(33)).view(np.int64) + np.repeat(places, counts),
            (packed >> np.uint64(32) & np.uint64(1)).astype(np.bool_),
        )

    def _forget(self) -> None:
        self._table = WordTable(TABLE_BITS)  # short words between spaces
        self._index = _Index()  # others
        self._num_kept = 0
        self._firsts = _Column(np.int64)  # of each row: where its tokens begin in _packed
        self._counts = _Column(np.int64)
        self._packed = _Column(np.uint64)  # of each token: offset << 33 | start << 32 | id

    def _rows_of(self, spans: Spans) -> np.ndarray:
        """int64 [w]: the row of each word. New ones are given rows and noted down."""
        keys = keys_of(spans)
        rows = self._table.find(keys)
        short = spans.sizes <= MAX_KEY_BYTES
        passing = spans.characters > MAX_CHARACTERS
        kept = np.flatnonzero(~short & ~passing)
        rows[kept] = [self._index[word] for word in spans.words(kept)]
        rows[passing] = self._index.pass_by(spans.words(np.flatnonzero(passing)))
        unknown = np.flatnonzero(short & (rows < 0))
        if len(unknown):
            firsts, inverse = _distinct(keys.take(unknown))
            firsts = unknown[firsts]
            fresh = len(self._index.new) + self._num_kept + np.arange(len(firsts))
            self._index.new += spans.words(firsts)
            self._table.add(keys.take(firsts), fresh)
            rows[unknown] = fresh[inverse]
        return rows

    def _encode_new(self, rows: np.ndarray) -> None:
        """Encode the words that were met for the first time; passing ones get their rows here."""
        index = self._index
        self._num_kept += len(index.new)
        passing = rows < 0
        rows[passing] = self._num_kept - 1 - rows[passing]
        self._num_kept_tokens = self._packed.length
        for words in (index.new, index.passing):
            if not words:
                continue
            tokens = self._model.encode_words(words)
            self._firsts.extend(np.cumsum(tokens.counts) - tokens.counts + self._packed.length)
            self._counts.extend(tokens.counts)
            packed = tokens.offsets.astype(np.uint64) << np.uint64(1) | tokens.starts
            self._packed.extend(packed << np.uint64(32) | tokens.ids)
            if words is index.new:
                self._num_kept_tokens = self._packed.length
        index.new, index.base = [], self._num_kept

    def _drop_passing(self) -> None:
        self._firsts.length = self._counts.length = self._num_kept
        self._packed.length = self._num_kept_tokens
        self._index.passing = []


def encode_slowly(model: WordModel, texts: Sequence[str]) -> WordTokens:
    """The slow twin of `WordCache.encode`: every word is encoded anew, by itself."""
    words = model.words(texts)
    tokens = [model.encode_words([word]) for word in words]
    places = _places(np.array([len(word) for word in words]), model.gap)
    return WordTokens(
        np.array([sum(int(t.counts[0]) for t in tokens)]),
        np.concatenate([t.ids for t in tokens]),
        np.concatenate([t.offsets + place for t, place in zip(tokens, places, strict=True)]),
        np.concatenate([t.starts for t in tokens]),
    )


def _places(characters: np.ndarray, gap: int) -> np.ndarray:
    """int64 [w]: where each word begins, of words with so many characters and gaps between."""
    ends = np.cumsum(characters + gap)
    return ends - characters - gap


def _distinct(keys: Keys) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the distinct keys, for each key the number of its distinct one)."""
    order = np.lexsort(keys)
    low, high = keys.take(order)
    first = np.append(True, (low[1:] != low[:-1]) | (high[1:] != high[:-1]))
    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.cumsum(first) - 1
    return order[first], inverse


class _Index(dict[str, int]):
    """Word -> row. A long word is not kept: it gets the row -1, -2, ... until the next text."""

    def __init__(self) -> None:
        super().__init__()
        self.base = 0  # rows that are encoded
        self.new: list[str] = []  # kept, and to be encoded
        self.passing: list[str] = []  # not kept

    def pass_by(self, words: list[str]) -> np.ndarray:
        """int64 [w]: the rows of long words."""
        first = len(self.passing) + 1
        self.passing += words
        return -np.arange(first, first + len(words))

    def __missing__(self, word: str) -> int:
        if len(word) > MAX_CHARACTERS:
            return int(self.pass_by([word])[0])
        self[word] = row = self.base + len(self.new)
        self.new.append(word)
        return row


class _Column:
    """An array that grows at its end."""

    def __init__(self, dtype: type) -> None:
        self.data, self.length = np.empty(1024, dtype), 0

    def extend(self, values: np.ndarray) -> None:
        end = self.length + len(values)
        if end > len(self.data):
            data = np.empty(max(end, 2 * len(self.data)), self.data.dtype)
            data[: self.length] = self.data[: self.length]
            self.data = data
        self.data[self.length : end] = values
        self.length = end


def flatten(lists: Sequence[list[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(counts int64 [w], values int64 [n]) of w lists, or of w arrays."""
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    if lists and isinstance(lists[0], np.ndarray):
        return counts, np.concatenate(lists, dtype=np.int64)
    return counts, np.fromiter(chain.from_iterable(lists), np.int64, int(counts.sum()))
