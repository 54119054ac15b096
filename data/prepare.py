"""Raw text in, a dataset out: scan, tokenizer, encode, shards, manifest. Restartable at any moment.

Every stage consists of tasks whose results appear under their names only when complete, and whose bytes
depend on nothing but the plan. So a run that was killed goes on where it stood, with any number of
processes, and the dataset is the same to the last byte.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.entropy import (
    context_free_accuracy,
    context_free_loss,
    unigram_cross_entropy,
    unigram_entropy,
)
from data.files import temporary_name
from data.inputs import find_files
from data.neighbours import bigram_facts
from data.plan import (
    WORK_FOLDER,
    PrepareConfig,
    abandon_folder,
    enter_folder,
    locked_folder,
    make_plan,
)
from data.progress import explain_full_disk, print_summary, stage
from data.scan import Scan, sample_of_files, sample_texts
from data.shard_writer import publish_dataset, table_of
from data.shards import SPLITS, Dataset, token_dtype_for
from data.stages import Job, count_buckets, encode, scan, write_shards
from data.token_counts import TokenCounts
from data.tokenizer_hf import export_tokenizer, forget_model
from data.tokenizer_literals import refuse_matched_literals
from data.tokenizer_train import publish_folder, train_tokenizer
from data.vocab import MODEL_FILE, Tokenizer, tokenizer_files

__all__ = ["PrepareConfig", "prepare"]

GIVE_MODEL_ALONE = (
    f". Give a folder with {MODEL_FILE} alone: its Hugging Face form is then written anew"
)
Verify = Callable[[Tokenizer, Iterable[str]], str]  # what to say; ValueError where ids differ


def prepare(config: PrepareConfig, verify: Verify | None = None) -> Path:
    """Make the dataset that `config` describes, or finish it; returns its folder.

    verify: checks the tokenizer on a sample of the text before anything is sharded, as
    data.tokenizer_verify.verify_tokenizer does; also of a dataset that is finished.

    ValueError, before any work is lost, when: the input is missing, damaged, of an unknown kind or not
    UTF-8; the folder holds something else, or is being worked on; no document would be held out, or none
    left; the text does not support the vocabulary; the tokenizer's ids are not those of its exported form
    (with verify; a given one is always tried on "<0x41>"); the disk is full (run again when there is room).
    ChildProcessError: a worker was killed. With several processes the caller's main module is imported
    anew in each worker, so a script must guard its own work by `if __name__ == "__main__"`.
    """
    root = Path(config.output)
    files, notes = find_files(config.sources)
    plan = make_plan(config, files)
    if config.tokenizer is not None:
        refuse_matched_literals(Path(config.tokenizer), GIVE_MODEL_ALONE)
    with locked_folder(root), explain_full_disk(root):
        if enter_folder(root, plan):
            shutil.rmtree(root / WORK_FOLDER, ignore_errors=True)
            Dataset.open(root)
            print(f"{root} is finished already, from the same text with the same options.")
            if verify is not None:
                sample = sample_of_files(files, config.read_options)
                print(verify(Tokenizer.load(root / "tokenizer"), sample))
            return root
        for note in notes:
            print(note)
        _carry_out(Job(config, root, files, str(root / WORK_FOLDER), 0, {}), verify)
    return root


def _carry_out(job: Job, verify: Verify | None) -> None:
    try:
        scans = scan(job)
        check_splits(job, scans)
        tokenizer = _make_tokenizer(job)
        if verify is not None:
            print(verify(tokenizer, sample_of_files(job.files, job.config.read_options)))
    except ValueError:
        abandon_folder(job.root)  # text or options will change: the plan must not stand in the way
        raise
    buckets = count_buckets(job, scans)
    encoded = encode(job, scans, tokenizer, buckets)
    written, counts = write_shards(job, scans, tokenizer, buckets)
    facts = _facts(job.config, tokenizer, counts)
    facts |= neighbour_facts(job, facts | {"sources": job.sources}, table_of(written))
    publish_dataset(job.root, facts, job.sources, written)
    shutil.rmtree(job.work)
    print_summary(job.root, scans, encoded, job.seconds)


def check_splits(job: Job, scans: list[Scan]) -> None:
    """ValueError unless some document is held out and every source keeps some for training.

    Where sources are added to a dataset, it has held-out documents already.
    """
    num_train = {source: job.totals(scans, source, "train")[0] for source in job.sources}
    num_heldout = sum(job.totals(scans, source, "heldout")[0] for source in job.sources)
    total = sum(num_train.values()) + num_heldout
    fraction = job.config.heldout_fraction
    hint = ""
    if job.config.txt_documents == "file" and any(".txt" in file.relative for file in job.files):
        hint = (
            ". A .txt file is one document now; if blank lines part the documents in it, "
            "use the option txt_documents=blank_line"
        )
    if total == 0:
        raise ValueError(
            f"no document holds any text ({sum(s.num_empty for s in scans)} are empty)"
        )
    if num_heldout == 0 and job.first_source == 0:
        raise ValueError(
            f"none of {total} documents is held out at heldout_fraction {fraction}: raise it to about "
            f"{min(0.5, 5 / total):.2g}, or give more documents{hint}"
        )
    if bare := [source for source, count in num_train.items() if count == 0]:
        raise ValueError(
            f"no document is left to train on in source {', '.join(bare)} at heldout_fraction {fraction}: "
            f"lower it, or give more documents{hint}"
        )


def _make_tokenizer(job: Job) -> Tokenizer:
    """Stage 2: train the tokenizer, or copy the one that was given."""
    folder = job.root / "tokenizer"
    with stage(job.seconds, "tokenizer", 1, "") as bar:
        if not folder.is_dir() and job.config.tokenizer is None:
            train_tokenizer(
                sample_texts(job.work, len(job.files)),
                folder,
                vocab_size=job.config.vocab_size,
                kind=job.config.tokenizer_kind,
                lowercase=job.config.lowercase,
            )
        elif not folder.is_dir():
            _copy_tokenizer(Path(str(job.config.tokenizer)), folder)
        bar.update()
    return Tokenizer.load(folder, job.config.word_starts)


def _copy_tokenizer(given: Path, folder: Path) -> None:
    """All files of a tokenizer, without what they say of a model that lies beside them.

    A sentencepiece model that is alone gets its Hugging Face form.
    """
    staged = temporary_name(folder)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    names = tokenizer_files(given)
    for name in names:
        shutil.copyfile(given / name, staged / name)
    if names == [MODEL_FILE]:
        export_tokenizer((given / MODEL_FILE).read_bytes(), staged)
        refuse_matched_literals(staged)
    if "tokenizer_config.json" in names and (given / "config.json").is_file():
        forget_model(staged / "tokenizer_config.json")
    publish_folder(staged, folder)


def _facts(config: PrepareConfig, tokenizer: Tokenizer, counts: TokenCounts) -> dict[str, Any]:
    """What the manifest says beside sources and blocks."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "token_dtype": token_dtype_for(tokenizer.vocab_size),
        "block_tokens": config.block_tokens,
        "tokenizer": {
            "digest": tokenizer.digest,
            "kind": tokenizer.kind,
            "special_ids": tokenizer.special_ids,
        },
        "word_starts": config.word_starts,
        "seed": config.seed,
        "heldout_fraction": config.heldout_fraction,
        **entropy_facts(counts, tokenizer.vocab_size - len(tokenizer.special_ids)),
    }


def entropy_facts(counts: TokenCounts, num_ordinary: int) -> dict[str, Any]:
    """What a model reaches without context. num_ordinary: tokens that are not special.

    ValueError when a split has no token.
    """
    train, heldout = (
        np.sum([found for (_, split), found in counts.items() if split == wanted], axis=0)
        for wanted in SPLITS
    )
    held = dict(zip(SPLITS, (train, heldout), strict=True))
    if bare := [split for split in SPLITS if not held[split].any()]:
        raise ValueError(
            f"the documents of {' and '.join(bare)} hold nothing but control characters"
        )
    return {
        "unigram_entropy_nats": unigram_entropy(train),
        "context_free_loss_nats": context_free_loss(train, num_ordinary),
        "heldout_unigram_nats": unigram_cross_entropy(train, heldout),
        "unigram_accuracy": round(int(train.max()) / int(train.sum()), 9),
        "context_free_accuracy": context_free_accuracy(train, num_ordinary),
        "source_unigram_entropy_nats": {
            source: unigram_entropy(found)
            for (source, split), found in counts.items()
            if split == "train"
        },
    }


def neighbour_facts(job: Job, manifest: dict[str, Any], table: np.ndarray) -> dict[str, Any]:
    """Stage 5: what a model reaches with one token of context, of shards that are not published yet.

    manifest: what is known of the dataset by now; table: its block table.
    """
    with stage(job.seconds, "pairs", 1, "") as bar:
        facts = bigram_facts(Dataset(job.root, manifest, "", table))
        bar.update()
    return facts
