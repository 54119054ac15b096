"""A dataset in, its figures out, by source and split: how much there is, how long, how tokenised."""

from typing import Any, NamedTuple

import numpy as np

from data.entropy import unigram_entropy
from data.pool import run_tasks
from data.shards import SPLITS, Dataset, Split
from data.token_counts import count_tasks, count_tokens, no_counts
from data.tokenizer_hf import SPECIAL_TOKENS
from data.vocab import Tokenizer


class SplitStat(NamedTuple):
    """Of one split of one source. Characters and bytes are those of the normalised text that tokens spell."""

    source: str
    split: Split
    documents: int  # a document longer than a block counts once for each of its parts
    tokens: int
    sentences: int
    blocks: int
    shards: int
    bytes: int  # of the shards on disk
    tokens_per_document: float
    tokens_per_sentence: float
    sentences_per_document: float
    bytes_per_token: float
    characters_per_token: float
    unknown_share: float  # of tokens that are [UNK]
    special_share: float  # of tokens that are any other special token
    unigram_entropy_nats: float  # of this split of this source
    epochs: float | None  # of the train split in a number of tokens that is asked for


def dataset_stats(
    dataset: Dataset, num_processes: int, num_tokens: int | None = None
) -> list[SplitStat]:
    """Reads every block. num_tokens: what a run is to train on; gives `epochs`. ValueError: damage."""
    counts = no_counts(dataset.sources, dataset.vocab_size)
    for task, found in run_tasks(count_tokens, count_tasks(dataset), num_processes):
        counts[task.source, task.split] += found
    sizes = Tokenizer.load(dataset.root / "tokenizer").piece_sizes()
    total = sum(int(counts[source, "train"].sum()) for source in dataset.sources)
    epochs = None if num_tokens is None else num_tokens / total
    return [
        _stat(dataset, source, split, counts[source, split], sizes, epochs)
        for source in dataset.sources
        for split in SPLITS
    ]


def _stat(
    dataset: Dataset,
    source: str,
    split: Split,
    counts: np.ndarray,
    sizes: tuple[np.ndarray, np.ndarray],
    epochs: float | None,
) -> SplitStat:
    held: dict[str, Any] = dataset.manifest["sources"][source][split]
    tokens, documents, sentences = (held[f"num_{n}"] for n in ("tokens", "documents", "sentences"))
    special = [dataset.special_ids[token] for token in SPECIAL_TOKENS if token != "[UNK]"]
    characters, nbytes = (int(counts @ size) for size in sizes)
    return SplitStat(
        source=source,
        split=split,
        documents=documents,
        tokens=tokens,
        sentences=sentences,
        blocks=len(dataset.block_indices(split, source)),
        shards=len(held["shards"]),
        bytes=sum(entry["nbytes"] for entry in held["shards"]),
        tokens_per_document=_ratio(tokens, documents),
        tokens_per_sentence=_ratio(tokens, sentences),
        sentences_per_document=_ratio(sentences, documents),
        bytes_per_token=_ratio(nbytes, tokens),
        characters_per_token=_ratio(characters, tokens),
        unknown_share=_ratio(int(counts[dataset.special_ids["[UNK]"]]), tokens),
        special_share=_ratio(int(counts[special].sum()), tokens),
        unigram_entropy_nats=unigram_entropy(counts) + 0.0,  # no -0.0 of an empty split
        epochs=epochs if split == "train" else None,
    )


def _ratio(above: int, below: int) -> float:
    return above / below if below else 0.0
