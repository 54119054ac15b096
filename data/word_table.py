"""Short words in, the row numbers they were given out: a hash table in arrays, looked up thousands at a time.

A word of at most 15 bytes and its length fill two integers of 64 bits, so keys are compared exactly. Next to
a Python dictionary the look-ups neither make a string each nor wait for memory one after the other.
"""

from typing import NamedTuple, final

import numpy as np

MAX_KEY_BYTES = 15
FACTORS = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xC2B2AE3D27D4EB4F),
    np.uint64(0x165667B19E3779F9),
)
MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)


class Spans(NamedTuple):
    """Where the words of a text lie that are parted by single spaces."""

    text: str
    data: bytes  # the text in UTF-8
    starts: np.ndarray  # [w] int64, bytes
    sizes: np.ndarray  # [w] int64, bytes; 0 between two spaces
    places: np.ndarray  # [w] int64: the starts in characters
    characters: np.ndarray  # [w] int64: the sizes in characters

    def words(self, numbers: np.ndarray) -> list[str]:
        starts = self.places[numbers]
        ends = starts + self.characters[numbers]
        text = self.text
        return [text[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


class Keys(NamedTuple):
    """Words of up to MAX_KEY_BYTES; of others the keys mean nothing."""

    low: np.ndarray  # [w] uint64: bytes 0 to 7
    high: np.ndarray  # [w] uint64: bytes 8 to 14, and the number of bytes

    def take(self, chosen: np.ndarray) -> "Keys":
        return Keys(self.low[chosen], self.high[chosen])


def find_spans(text: str) -> Spans:
    """The words of `text`; one more than there are spaces."""
    data = text.encode("utf-8")
    values = np.frombuffer(data, np.uint8)
    spaces = np.flatnonzero(values == 0x20)
    starts = np.concatenate([[0], spaces + 1])
    sizes = np.append(spaces, len(data)) - starts
    places, characters = starts, sizes
    if len(data) != len(text):
        spaces = np.flatnonzero(np.frombuffer(text.encode("utf-32-le"), "<u4") == 0x20)
        places = np.concatenate([[0], spaces + 1])
        characters = np.append(spaces, len(text)) - places
    return Spans(text, data, starts, sizes, places, characters)


def keys_of(spans: Spans) -> Keys:
    padded = spans.data + bytes(16)
    every = np.ndarray(
        (len(spans.data) + 9,), "<u8", padded, strides=(1,)
    )  # 8 bytes from each byte on
    low = every[spans.starts] & MASKS[np.minimum(spans.sizes, 8)]
    high = every[spans.starts + 8 * (spans.sizes > 8)] & MASKS[np.clip(spans.sizes - 8, 0, 7)]
    return Keys(low, high | np.minimum(spans.sizes, 255).astype(np.uint64) << np.uint64(56))


@final
class WordTable:
    """Rows by key. Open addressing, linear probing; keep it no more than half full."""

    def __init__(self, num_slots_log2: int) -> None:
        size = 1 << num_slots_log2
        self._shift, self._mask = np.uint64(64 - num_slots_log2), size - 1
        self._keys = Keys(np.zeros(size, np.uint64), np.zeros(size, np.uint64))
        self._rows = np.full(size, -1, np.int32)

    def find(self, keys: Keys) -> np.ndarray:
        """int64 [w]: the row of each key, -1 where there is none."""
        slots = self._slots(keys)
        found, settled = self._compare(slots, keys)
        waiting = np.flatnonzero(~settled)
        while len(waiting):
            slots = (slots[waiting] if len(slots) != len(waiting) else slots) + 1 & self._mask
            rows, settled = self._compare(slots, keys.take(waiting))
            found[waiting] = rows
            waiting, slots = waiting[~settled], slots[~settled]
        return found

    def add(self, keys: Keys, rows: np.ndarray) -> None:
        """Store keys that are not there, each once."""
        slots = self._slots(keys)
        while len(rows):
            free = self._rows[slots] < 0
            self._rows[slots[free]] = rows[free]
            won = self._rows[slots] == rows
            self._keys.low[slots[won]], self._keys.high[slots[won]] = keys.take(won)
            keys, rows, slots = keys.take(~won), rows[~won], slots[~won] + 1 & self._mask

    def _slots(self, keys: Keys) -> np.ndarray:
        mixed = keys.low * FACTORS[0] + keys.high * FACTORS[1]
        mixed ^= mixed >> np.uint64(32)
        return (mixed * FACTORS[2] >> self._shift).view(np.int64)

    def _compare(self, slots: np.ndarray, keys: Keys) -> tuple[np.ndarray, np.ndarray]:
        """(row or -1, whether that is the answer) at one slot for each key."""
        rows = self._rows[slots].astype(np.int64)
        equal = (self._keys.low[slots] == keys.low) & (self._keys.high[slots] == keys.high)
        empty = rows < 0
        return np.where(equal, rows, -1), equal & ~empty | empty
