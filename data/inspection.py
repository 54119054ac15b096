"""A dataset in, measurements of a sample of its blocks out: what `cloze doctor` judges.

Sampled blocks are chosen by hash, so the same dataset is always measured on the same blocks; a dataset
within the sample's size is measured whole.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from data.hashing import hash_order, stable_hash64
from data.pairs import IS_NEXT, IS_RANDOM, UNLABELLED
from data.rows import plan_rows
from data.shards import Block, DamagedBlock, Dataset, Split

SAMPLE_TOKENS = (
    1 << 24
)  # of training text: seconds of reading; a share of 0.1 % is still 16,777 tokens
MIN_BLOCKS = 4  # of a source, however small its share
NEAR_TOKENS = 1 << 22  # of documents that are compared with one another: a second or two
PLANNED_TOKENS = 1 << 19  # of a source: some thousand rows
SHORT_TOKENS = (
    16  # two halves of a handful of words: next-sentence prediction learns little from it
)
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")  # what sentencepiece falls back to


@dataclass
class SourceSurvey:
    """Of the sampled blocks of a source. Documents that were parted between blocks count by part."""

    name: str
    num_blocks: int  # of the source
    num_read: int
    counts: np.ndarray  # int64 [vocab_size]: of each token
    num_documents: int = 0
    num_tokens: int = 0
    num_sentences: int = 0
    num_single: int = 0  # documents of one sentence
    single_tokens: int = 0  # in those
    num_short: int = 0  # documents below SHORT_TOKENS
    num_copies: int = 0  # documents whose tokens another one of the sample has, too, seen before
    copied_tokens: int = 0  # in those
    damaged: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return self.num_read == self.num_blocks

    def share_of(self, ids: np.ndarray) -> float:
        """Of the tokens, those with an id of `ids`."""
        return float(self.counts[ids].sum()) / max(1, self.num_tokens)


@dataclass
class RowSurvey:
    """Rows planned from some blocks of a split."""

    sequence_length: int
    num_blocks: int = 0
    num_rows: int = 0
    num_slots_filled: int = 0
    num_next: int = 0  # pairs, by label
    num_random: int = 0
    num_unlabelled: int = 0

    @property
    def fill(self) -> float:
        return self.num_slots_filled / max(1, self.num_rows * self.sequence_length)

    @property
    def random_share(self) -> float:
        """Of the labelled pairs."""
        return self.num_random / max(1, self.num_next + self.num_random)

    @property
    def num_pairs(self) -> int:
        return self.num_next + self.num_random + self.num_unlabelled


def sampled_blocks(dataset: Dataset, source: str, split: Split, num_tokens: int) -> np.ndarray:
    """int64: rows of the block table, by hash, until they hold `num_tokens`; MIN_BLOCKS at least."""
    blocks = dataset.block_indices(split, source)
    order = hash_order(stable_hash64("inspection", source, split), len(blocks))
    tokens = np.cumsum(dataset.blocks["num_tokens"][blocks[order]], dtype=np.int64)
    enough = int(np.searchsorted(tokens, num_tokens)) + 1
    return blocks[order][: max(MIN_BLOCKS, enough)]


def source_tokens(dataset: Dataset) -> dict[str, int]:
    """Training tokens of every source that has any."""
    return {
        name: int(dataset.blocks["num_tokens"][rows].sum(dtype=np.int64))
        for name in dataset.sources
        if len(rows := dataset.block_indices("train", name))
    }


def survey_sources(dataset: Dataset, sample_tokens: int) -> list[SourceSurvey]:
    """Read a sample of the training blocks of every source, each in proportion to its size."""
    sizes = source_tokens(dataset)
    seen: dict[int, int] = {}
    surveys = []
    for name, size in sizes.items():
        chosen = sampled_blocks(
            dataset, name, "train", sample_tokens * size // max(1, sum(sizes.values()))
        )
        num_blocks = len(dataset.block_indices("train", name))
        counts = np.zeros(dataset.vocab_size, dtype=np.int64)
        survey = SourceSurvey(name, num_blocks, len(chosen), counts)
        for index in np.sort(chosen).tolist():
            try:
                _measure(survey, dataset.read_block(index), seen)
            except DamagedBlock as error:
                survey.damaged.append(str(error))
        surveys.append(survey)
    return surveys


def _measure(survey: SourceSurvey, block: Block, seen: dict[int, int]) -> None:
    """Add a block. seen: hash of a document's tokens -> id of the document that had them first."""
    lengths = block.document_lengths.astype(np.int64)
    single = block.sentences_per_document == 1
    survey.counts += np.bincount(block.tokens, minlength=len(survey.counts))
    survey.num_documents += len(lengths)
    survey.num_tokens += len(block.tokens)
    survey.num_sentences += len(block.sentence_lengths)
    survey.num_single += int(single.sum())
    survey.single_tokens += int(lengths[single].sum())
    survey.num_short += int((lengths < SHORT_TOKENS).sum())
    ends = np.cumsum(lengths) * block.tokens.itemsize
    raw = memoryview(block.tokens.tobytes())
    start = 0
    for end, own in zip(ends.tolist(), block.document_ids.tolist(), strict=True):
        first = seen.setdefault(xxhash.xxh3_64_intdigest(raw[start:end]), own)
        if first != own:
            survey.num_copies += 1
            survey.copied_tokens += (end - start) // block.tokens.itemsize
        start = end


def survey_rows(
    dataset: Dataset, blocks: np.ndarray, sequence_length: int, packing: bool, seed: int
) -> RowSurvey:
    """Plan the rows of blocks, as an epoch would. Damaged blocks are passed over: see SourceSurvey."""
    survey = RowSurvey(sequence_length)
    for index in blocks.tolist():
        try:
            block = dataset.read_block(index)
        except DamagedBlock:
            continue
        key = stable_hash64(seed, "inspection", index)
        plan = plan_rows(block, sequence_length, packing, key)
        labels = plan.pairs.label
        survey.num_blocks += 1
        survey.num_rows += plan.num_rows
        survey.num_slots_filled += int(plan.pairs.lengths.sum())
        survey.num_next += int((labels == IS_NEXT).sum())
        survey.num_random += int((labels == IS_RANDOM).sum())
        survey.num_unlabelled += int((labels == UNLABELLED).sum())
    return survey


def byte_ids(tokenizer: Path) -> np.ndarray:
    """int64: ids of a tokenizer's byte pieces. Empty where it has none, as with WordPiece."""
    path = tokenizer / "tokenizer.json"
    if not path.is_file():
        return np.zeros(0, dtype=np.int64)
    vocabulary = json.loads(path.read_bytes()).get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        pieces = [(piece, number) for piece, number in vocabulary.items()]
    else:
        pieces = [(entry[0], number) for number, entry in enumerate(vocabulary)]
    return np.array([n for piece, n in pieces if BYTE_PIECE.fullmatch(piece)], dtype=np.int64)
