"""A small dataset written without a tokenizer, and its documents read back."""

from pathlib import Path

import numpy as np

from data.files import folder_digest
from data.shard_writer import ShardAddress, TokenisedDocument, publish_dataset, write_shard
from data.shards import Dataset, Split

VOCAB_SIZE = 90


def make_documents(num_documents: int, seed: int, dtype: str = "<u2") -> list[TokenisedDocument]:
    rng = np.random.default_rng(seed)
    documents = []
    for number in range(num_documents):
        num_tokens = int(rng.integers(1, 400))
        cuts = np.unique(np.append(rng.integers(1, num_tokens + 1, 4), num_tokens))
        tokens = rng.integers(5, VOCAB_SIZE, num_tokens).astype(dtype)
        words = rng.random(num_tokens) < 0.5
        own_id = f"文{number}" if number % 2 else None
        lengths = np.diff(cuts, prepend=0)
        key = int(rng.integers(1 << 63)) * 2 + 1
        documents.append(TokenisedDocument(key, own_id, "a/b.txt", number, tokens, lengths, words))
    return documents


def make_dataset(root: Path, token_dtype: str = "u16") -> list[TokenisedDocument]:
    """One source, two training shards and one held-out shard; returns the training documents."""
    documents = make_documents(
        60, seed=1, dtype="<" + token_dtype.replace("u16", "u2").replace("u32", "u4")
    )
    shares: dict[tuple[Split, int], list[TokenisedDocument]] = {
        ("train", 0): documents[:40],
        ("train", 1): documents[40:],
        ("heldout", 0): documents[:5],
    }
    written = []
    for (split, shard), share in shares.items():
        address = ShardAddress("src", 0, split, shard)
        shard_written = write_shard(
            root, address, share, block_tokens=1000, token_dtype=token_dtype, vocab_size=VOCAB_SIZE
        )
        written.append((address, shard_written))
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    facts = {
        "vocab_size": VOCAB_SIZE,
        "token_dtype": token_dtype,
        "block_tokens": 1000,
        "tokenizer": {"digest": folder_digest(root / "tokenizer"), "special_ids": {"[PAD]": 0}},
    }
    publish_dataset(root, facts, ["src"], written)
    return documents


def read_documents(
    dataset: Dataset, split: Split
) -> list[tuple[int, list[int], list[int], list[bool]]]:
    """(id, tokens, sentence lengths, word starts) of each document, in table order."""
    documents = []
    for index in dataset.block_indices(split):
        block = dataset.read_block(int(index))
        words = np.unpackbits(block.word_starts, bitorder="little").astype(bool)
        token = sentence = 0
        for i, length in enumerate(block.document_lengths.tolist()):
            count = int(block.sentences_per_document[i])
            documents.append(
                (
                    int(block.document_ids[i]),
                    block.tokens[token : token + length].tolist(),
                    block.sentence_lengths[sentence : sentence + count].tolist(),
                    words[token : token + length].tolist(),
                )
            )
            token, sentence = token + length, sentence + count
    return documents
