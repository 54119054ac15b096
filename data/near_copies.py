"""Blocks of a dataset in, how many of their documents are nearly the same as another out.

MinHash (Broder 1997; data/corpus/minhash.py) over token n-grams: no text is decoded. What the pipeline of
`cloze corpus` takes out is found by words; here a tokenizer's ids stand for them.
"""

from typing import NamedTuple

import numpy as np

from data.corpus.fingerprint import ngram_hashes
from data.corpus.minhash import MinHashConfig, signature_of, similarity
from data.hashing import mix64
from data.shards import DamagedBlock, Dataset

NGRAM_TOKENS = 8  # about five words
LEAST_TOKENS = 64  # of a document that is compared: shorter ones share phrases by chance
SPREAD = np.uint64(0x9FB21C651E98DF25)  # odd


class NearCopies(NamedTuple):
    num_documents: int  # compared
    num_tokens: int  # read
    num_copies: int  # documents that an earlier one is nearly the same as, exact copies not counted
    example: tuple[int, int] | None  # ids of two such documents


def near_copies(dataset: Dataset, blocks: np.ndarray) -> NearCopies:
    """Compare the documents of some blocks with one another. Damaged blocks are passed over."""
    config = MinHashConfig(ngram=NGRAM_TOKENS)
    signatures: dict[bytes, tuple[int, np.ndarray]] = {}  # of what is no exact copy
    num_tokens = 0
    for index in blocks.tolist():
        try:
            block = dataset.read_block(index)
        except DamagedBlock:
            continue
        num_tokens += len(block.tokens)
        ends = np.cumsum(block.document_lengths, dtype=np.int64)
        words = mix64(block.tokens.astype(np.uint64))
        for own, stop, length in zip(block.document_ids, ends, block.document_lengths, strict=True):
            if length >= LEAST_TOKENS:
                ngrams = ngram_hashes(words[stop - int(length) : stop], config.ngram)
                signature = signature_of(ngrams, config)
                signatures.setdefault(signature.tobytes(), (int(own), signature))
    pairs = _alike(signatures, config)
    ids = [own for own, _ in signatures.values()]
    example = (ids[pairs[0][0]], ids[pairs[0][1]]) if pairs else None
    num_copies = len({later for _, later in pairs})
    return NearCopies(len(signatures), num_tokens, num_copies, example)


def _alike(
    signatures: dict[bytes, tuple[int, np.ndarray]], config: MinHashConfig
) -> list[tuple[int, int]]:
    """(earlier, later) of documents that share a band with its first one, and reach the threshold."""
    if not signatures:
        return []
    table = np.stack([signature for _, signature in signatures.values()])
    ids = np.array([own for own, _ in signatures.values()], dtype=np.uint64)
    pairs = set()
    for band in range(config.bands):
        part = table[:, band * config.rows_per_band : (band + 1) * config.rows_per_band]
        keys = np.zeros(len(part), dtype=np.uint64)
        for column in part.T:
            keys = mix64(keys * SPREAD + column)
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        earlier = first[which]
        later = np.flatnonzero((earlier != np.arange(len(keys))) & (ids != ids[earlier]))
        close = similarity(table[later], table[earlier[later]]) >= config.threshold
        pairs |= set(zip(earlier[later[close]].tolist(), later[close].tolist(), strict=True))
    return sorted(pairs)
