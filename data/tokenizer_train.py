"""Texts in, a tokenizer folder out: a sentencepiece model and its fast Hugging Face form."""

import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece

from data.files import sync_folder, temporary_name
from data.tokenizer_hf import SPECIAL_TOKENS, export_tokenizer
from data.tokenizer_wordpiece import train_wordpiece
from data.vocab import MODEL_FILE

LINE_CHARACTERS = 1000  # at most 4000 bytes; sentencepiece leaves out lines of over 4192
NUM_TRAINING_THREADS = 16  # part of the result: floats are added up thread by thread
NUM_BYTE_PIECES = 256
# A unigram vocabulary is chosen from so many candidates, in rounds that keep this share. sentencepiece's own
# million, 0.75 and two passes a round take several times as long, for no fewer tokens of held-out text.
SEEDS_PER_PIECE = 8
LEAST_SEEDS = 100_000
SHRINKING_FACTOR = 0.6


def train_tokenizer(
    texts: Iterable[str],
    folder: str | Path,
    *,
    vocab_size: int,
    kind: Literal["unigram", "bpe", "wordpiece"] = "unigram",
    lowercase: bool = False,
    num_threads: int = NUM_TRAINING_THREADS,
) -> None:
    """Train on `texts` and publish `folder` (which must not exist). All of the texts are held in memory.

    lowercase: of wordpiece only. The same texts, options and num_threads give the same bytes. ValueError
    when the texts do not support `vocab_size` pieces (telling the largest size that works) or need more.
    """
    folder = Path(folder)
    staged = temporary_name(folder)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    if kind == "wordpiece":
        train_wordpiece(texts, staged, vocab_size=vocab_size, lowercase=lowercase)
    else:
        model = train_model(texts, vocab_size=vocab_size, kind=kind, num_threads=num_threads)
        (staged / MODEL_FILE).write_bytes(model)
        export_tokenizer(model, staged)
    publish_folder(staged, folder)


def publish_folder(staged: Path, folder: Path) -> None:
    """Make the files of `staged` durable, then give it its name."""
    for path in staged.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    os.replace(staged, folder)
    sync_folder(folder.parent)


def train_model(
    texts: Iterable[str], *, vocab_size: int, kind: Literal["unigram", "bpe"], num_threads: int
) -> bytes:
    """A sentencepiece model file's bytes; see `train_tokenizer`."""
    smallest = len(SPECIAL_TOKENS) + NUM_BYTE_PIECES + 1
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is below {smallest}: 5 special tokens, 256 bytes, 1 piece"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            pad_id=0,
            pad_piece=SPECIAL_TOKENS[0],
            unk_id=1,
            unk_piece=SPECIAL_TOKENS[1],
            bos_id=-1,
            eos_id=-1,
            control_symbols=list(SPECIAL_TOKENS[2:]),
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="nmt_nfkc",
            split_by_unicode_script=True,
            seed_sentencepiece_size=max(LEAST_SEEDS, SEEDS_PER_PIECE * vocab_size),
            shrinking_factor=SHRINKING_FACTOR,
            num_sub_iterations=1,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of all texts, those of over LINE_CHARACTERS in pieces, cut at a space if one is near."""
    for text in texts:
        for line in text.split("\n"):
            while len(line) > LINE_CHARACTERS:
                cut = line.rfind(" ", LINE_CHARACTERS // 2, LINE_CHARACTERS) + 1 or LINE_CHARACTERS
                yield line[:cut]
                line = line[cut:]
            if line:
                yield line


def _explain(error: str, vocab_size: int) -> str:
    """What a sentencepiece training error asks of the user."""
    if found := re.search(r"set it to a value <= (\d+)", error):
        return (
            f"vocab_size {vocab_size} is larger than this text supports: the largest possible is "
            f"{found[1]}. Lower vocab_size, or give more text"
        )
    if found := re.search(r"required_chars\.? *(\d+) vs (\d+)", error):
        return (
            f"vocab_size {vocab_size} is too small: the characters, bytes and special tokens of this text "
            f"alone need {found[2]}. Raise vocab_size"
        )
    return f"sentencepiece could not train a vocabulary of {vocab_size}: {error}"
