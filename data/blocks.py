"""A block's bytes and its row of the block table in, its arrays out: one sample of a shard's tar."""

from typing import NamedTuple

import numpy as np

TOKEN_DTYPES = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
TAR_RECORD = 512  # bytes: header size, and what members are padded to
REGULAR = (b"0", b"\0")  # types of members that are plain files


class Block(NamedTuple):
    """The unit of reading and shuffling: some documents, cut into sentences. Arrays are read-only."""

    tokens: np.ndarray  # [num_tokens] uint16 or uint32: documents back to back
    document_lengths: np.ndarray  # [num_documents] uint32, tokens
    sentences_per_document: np.ndarray  # [num_documents] uint32
    sentence_lengths: np.ndarray  # [num_sentences] uint16, tokens
    word_starts: np.ndarray  # [ceil(num_tokens / 8)] uint8, little-endian bits
    document_ids: np.ndarray  # [num_documents] uint64


def member_dtypes(token_dtype: str) -> dict[str, np.dtype]:
    """Extension -> dtype of a sample's members, in the fixed order they have in the tar."""
    return {
        "doc.u32": np.dtype("<u4"),
        "ids.u64": np.dtype("<u8"),
        "nse.u32": np.dtype("<u4"),
        "sen.u16": np.dtype("<u2"),
        f"tok.{token_dtype}": TOKEN_DTYPES[token_dtype],
        "wrd.bit": np.dtype("u1"),
    }


def parse_block(data: bytes, token_dtype: str) -> Block:
    """The members of one sample: these, in this order, and plain files. ValueError for anything else.

    Whoever wrote a shard wrote its hashes too, so nothing is taken on trust. Members are never extracted, and
    only lengths are read of their headers.
    """
    arrays: dict[str, np.ndarray] = {}
    position = 0
    for extension, dtype in member_dtypes(token_dtype).items():
        header = data[position : position + TAR_RECORD]
        name, size = header[:100].rstrip(b"\0"), _size_in(header)
        if not name.endswith(b"." + extension.encode()) or header[156:157] not in REGULAR:
            raise ValueError(f"a member {name[-60:]!r} stands where a file .{extension} should")
        start = position + TAR_RECORD
        position = start + size + -size % TAR_RECORD
        if position > len(data) or size % dtype.itemsize:
            raise ValueError(f".{extension} has {size:,} bytes, which the block has no room for")
        arrays[extension[:3]] = np.frombuffer(data, dtype, size // dtype.itemsize, start)
    if position != len(data):
        raise ValueError(f"{len(data) - position:,} bytes follow the last member")
    names = ("tok", "doc", "nse", "sen", "wrd", "ids")
    return Block(*(arrays[name] for name in names))


def _size_in(header: bytes) -> int:
    """Bytes of the member that a tar header is of. ValueError when it does not say so in octal."""
    digits = header[124:136].rstrip(b"\0 ")
    if not digits.isdigit():
        raise ValueError(f"the size of a member is {digits!r}, which is no octal number")
    return int(digits, 8)


def block_problems(block: Block, row: np.void, vocab_size: int) -> list[str]:
    """Sums that do not agree, ids that no vocabulary entry has."""
    num_tokens, num_documents = len(block.tokens), len(block.document_lengths)
    sums = {
        "tokens against blocks.npy": (num_tokens, row["num_tokens"]),
        "documents against blocks.npy": (num_documents, row["num_documents"]),
        "sentences against blocks.npy": (len(block.sentence_lengths), row["num_sentences"]),
        "document lengths": (block.document_lengths.sum(dtype=np.int64), num_tokens),
        "sentence lengths": (block.sentence_lengths.sum(dtype=np.int64), num_tokens),
        "sentences per document": (
            block.sentences_per_document.sum(dtype=np.int64),
            len(block.sentence_lengths),
        ),
        "document ids": (len(block.document_ids), num_documents),
        "bytes of word starts": (len(block.word_starts), (num_tokens + 7) // 8),
    }
    problems = [f"{name}: {a} and {b}" for name, (a, b) in sums.items() if int(a) != int(b)]
    if num_tokens and int(block.tokens.max()) >= vocab_size:
        problems.append(f"token id {int(block.tokens.max())} with a vocabulary of {vocab_size}")
    return problems
