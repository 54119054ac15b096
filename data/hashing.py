"""Addresses (integers, strings) in, 64-bit integer hashes and keyed permutations out.

Everything that decides an order, a pair or a mask draws its randomness here, from an address such as
(seed, epoch, block, row), never from generator state. So the stream is the same on every machine,
Python and numpy version, for any number of ranks and workers.
"""

import numpy as np
import xxhash

GOLDEN = 0x9E3779B97F4A7C15
MASK64 = (1 << 64) - 1


def stable_hash64(*parts: int | str | bytes) -> int:
    """64-bit hash of an address. Parts are typed and length-prefixed: ("a", "b") != ("ab",)."""
    encoded = bytearray()
    for part in parts:
        if isinstance(part, int):
            raw, kind = part.to_bytes(16, "little", signed=True), b"i"
        elif isinstance(part, str):
            raw, kind = part.encode("utf-8"), b"s"
        else:
            raw, kind = bytes(part), b"b"
        encoded += kind + len(raw).to_bytes(8, "little")
        encoded += raw  # may be a whole document: not copied more than once
    return xxhash.xxh3_64_intdigest(encoded)


def mix64(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser (Steele et al. 2014), element by element. x: uint64, of one axis or more."""
    return mix64_in_place(x.copy())


def mix64_in_place(x: np.ndarray) -> np.ndarray:
    """`mix64` of an array that nobody else needs: large ones take longer to allocate than to fill."""
    shifted = x >> np.uint64(30)
    x ^= shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x


def hash_positions(key: int, n: int) -> np.ndarray:
    """uint64 [n]: the hash of each position 0..n-1 under a 64-bit key."""
    steps = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return mix64(steps + np.uint64(key & MASK64))


def hash_order(key: int, n: int) -> np.ndarray:
    """int64 [n]: a permutation of 0..n-1, by sorting hashes (stable; ties cannot reorder)."""
    return np.argsort(hash_positions(key, n), kind="stable")


def _mix_int(x: int) -> int:
    x &= MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def permute(index: int, n: int, key: int) -> int:
    """Where `index` goes under a keyed permutation of [0, n): a Feistel network with cycle walking.

    Four rounds over the smallest even number of bits that holds n (Black and Rogaway 2002). Nothing
    is stored, so a dataset of any size starts, and resumes, in the same time.
    """
    if not 0 <= index < n:
        raise ValueError(f"index {index} is not in [0, {n})")
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_number in range(4):
            mixed = _mix_int(key + GOLDEN * (round_number + 1) + (right << 3))
            left, right = right, left ^ (mixed & half_mask)
        index = (left << half_bits) | right
        if index < n:
            return index
