"""A dataset or a text file in, batches for the step bench out."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from data.batch import Reader, build_loader
from data.collate import Batch, collate
from data.lanes import DataConfig, StreamState
from data.rows import Row

MASKED_FRACTION = 0.15


def batches_of_rows(
    dataset: Path, rows: int, length: int, number: int, *, packing: bool
) -> list[Batch]:
    """As the trainer reads them: pairs as long as their documents allow, one to a row, or packed."""
    config = DataConfig(path=str(dataset), sequence_length=length, packing=packing, num_lanes=rows)
    loader = build_loader(config, Reader(0, 1, rows, rows, seed=1), StreamState.start(rows, 1))
    return [next(loader).batch for _ in range(number)]


def batches_of_paragraphs(
    dataset: Path, text: Path, rows: int, length: int, number: int
) -> list[Batch]:
    """As people encode a text line by line: each pair is a paragraph and the next, cut to `length` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer", trust_remote_code=False)
    generator = np.random.default_rng(1)
    pairs = paragraph_pairs(text)
    batches = []
    for batch in range(number):
        made = []
        for _ in range(rows):
            first, second = next(pairs)
            encoded = tokenizer(first, second, truncation=True, max_length=length)
            ids = np.array(encoded["input_ids"], dtype=np.uint32)
            types = np.array(encoded["token_type_ids"], dtype=np.uint8)
            made.append(masked_row(ids, types, tokenizer.mask_token_id, generator))
        numbers = list(range(batch * rows, (batch + 1) * rows))
        batches.append(collate(made, numbers, length, tokenizer.pad_token_id))
    return batches


def paragraph_pairs(text: Path) -> Iterator[tuple[str, str]]:
    """Neighbouring paragraphs of the documents of a .jsonl file, each used once."""
    with text.open(encoding="utf-8") as file:
        for line in file:
            paragraphs = [part for part in json.loads(line)["text"].split("\n") if part.strip()]
            yield from zip(paragraphs[::2], paragraphs[1::2], strict=False)


def masked_row(
    ids: np.ndarray, types: np.ndarray, mask_id: int, generator: np.random.Generator
) -> Row:
    """One pair in a row of its own; its first and last slots are never masked."""
    num_slots = len(ids)
    num_masked = max(1, round(MASKED_FRACTION * num_slots))
    places = np.sort(generator.choice(np.arange(1, num_slots - 1), num_masked, replace=False))
    labels = ids[places].copy()
    ids[places] = mask_id
    return Row(
        input_ids=ids,
        token_type_ids=types,
        sequence_lengths=np.array([num_slots]),
        masked_positions=places.astype(np.int64),
        masked_labels=labels,
        pair_labels=np.zeros(1, dtype=np.int64),
        asked_slots=np.zeros((0, 2), dtype=np.int64),
        asked_labels=np.zeros(0, dtype=np.uint32),
        asked_tasks=np.zeros(0, dtype=np.uint8),
        seen=np.zeros(0, dtype=np.int32),
        recipe=np.zeros(1, dtype=np.uint64),
    )


def fill(batches: list[Batch]) -> float:
    """Share of the slots that hold tokens."""
    return sum(b.num_tokens for b in batches) / sum(b.input_ids.numel() for b in batches)


def labels_of(batch: Batch, ignored: int) -> torch.Tensor:
    """int64 [B, L]: the token to be predicted, or `ignored`."""
    labels = torch.full((batch.input_ids.numel(),), ignored)
    index, masked = batch.targets["mlm"]
    labels[index] = masked
    return labels.view_as(batch.input_ids)
