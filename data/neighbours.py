"""A dataset's training blocks in, the entropy of a token given the one before it out, from a fixed sample."""

import numpy as np

from data.entropy import bigram_entropy, neighbour_codes
from data.hashing import stable_hash64
from data.shards import Dataset

SAMPLE_TOKENS = 1 << 24  # of training text; sorting their pairs takes a fraction of a second


def bigram_facts(dataset: Dataset, sample_tokens: int = SAMPLE_TOKENS) -> dict[str, float | int]:
    """What the manifest says of pairs; nothing, where no training document has two tokens.

    The sample is the first `sample_tokens` tokens of all training blocks in the order of a hash of their
    places: it depends on the text and the options alone, not on the order in which sources were added.
    ValueError or OSError where a block cannot be read.
    """
    parts: list[np.ndarray] = []
    num_left = sample_tokens
    for index in sample_order(dataset):
        if num_left <= 0:
            break
        block = dataset.read_block(index)
        tokens = block.tokens[:num_left]
        lengths = np.diff(np.minimum(np.cumsum(block.document_lengths), len(tokens)), prepend=0)
        parts.append(neighbour_codes(tokens, lengths[lengths > 0], dataset.vocab_size))
        num_left -= len(tokens)
    codes = np.concatenate(parts) if parts else np.array([], np.uint32)
    del parts
    if len(codes) == 0:
        return {}
    entropy = bigram_entropy(codes, dataset.vocab_size)
    return {"bigram_entropy_nats": entropy, "bigram_sample_pairs": len(codes)}


def sample_order(dataset: Dataset) -> list[int]:
    """Rows of the block table that are for training, by a hash of source, shard and offset."""
    rows = dataset.block_indices("train").tolist()
    places = (dataset.address_of(row) for row in rows)
    keys = [stable_hash64("neighbours", place.shard, place.offset) for place in places]
    return [row for _, row in sorted(zip(keys, rows, strict=True))]
