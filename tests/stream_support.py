"""A dataset without text or tokenizer: the same bytes on every machine, made from hashes in a second."""

from pathlib import Path

import numpy as np

from data.files import folder_digest
from data.hashing import hash_positions, stable_hash64
from data.shard_writer import ShardAddress, TokenisedDocument, publish_dataset, write_shard
from data.shards import Split

VOCAB_SIZE = 2000
SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}


def hashed_document(source: int, number: int) -> TokenisedDocument:
    """1 to 40 sentences of 2 to 60 tokens."""
    bits = hash_positions(stable_hash64("document", source, number), 41)
    num_sentences = int(bits[40] % np.uint64(40)) + 1
    lengths = (bits[:num_sentences] % np.uint64(59)).astype(np.int64) + 2
    num_tokens = int(lengths.sum())
    hashes = hash_positions(stable_hash64("tokens", source, number), num_tokens)
    tokens = (hashes % np.uint64(VOCAB_SIZE - 5) + np.uint64(5)).astype("<u2")
    words = (hashes >> np.uint64(32)) % np.uint64(2) == 0
    key = stable_hash64("key", source, number)
    return TokenisedDocument(key, None, "made.jsonl", number, tokens, lengths, words)


def hashed_dataset(
    root: Path, shards: dict[str, int], *, documents_per_shard: int = 60, block_tokens: int = 8192
) -> Path:
    """A dataset with a number of training shards for each source, and one held-out shard."""
    written = []
    for index, (source, num_shards) in enumerate(shards.items()):
        places: list[tuple[Split, int]] = [("train", n) for n in range(num_shards)]
        for split, shard in [*places, ("heldout", 0)]:
            first = (num_shards if split == "heldout" else shard) * documents_per_shard
            documents = [hashed_document(index, first + n) for n in range(documents_per_shard)]
            address = ShardAddress(source, index, split, shard)
            result = write_shard(
                root,
                address,
                documents,
                block_tokens=block_tokens,
                token_dtype="u16",
                vocab_size=VOCAB_SIZE,
            )
            written.append((address, result))
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    facts = {
        "vocab_size": VOCAB_SIZE,
        "token_dtype": "u16",
        "block_tokens": block_tokens,
        "tokenizer": {"digest": folder_digest(root / "tokenizer"), "special_ids": SPECIAL_IDS},
    }
    publish_dataset(root, facts, list(shards), written)
    return root
