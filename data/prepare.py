"""Raw text in, a dataset out: scan, tokenizer, encode, shards, manifest. Restartable at any moment.

Every stage consists of tasks whose results appear under their names only when complete, and whose bytes
depend on nothing but the plan. So a run that was killed goes on where it stood, with any number of
processes, and the dataset is the same to the last byte.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.entropy import context_free_loss, unigram_cross_entropy, unigram_entropy
from data.files import read_json, temporary_name
from data.inputs import InputFile, capped, find_files
from data.plan import (
    WORK_FOLDER,
    PrepareConfig,
    abandon_folder,
    enter_folder,
    locked_folder,
    make_plan,
)
from data.pool import run_tasks
from data.prepare_tasks import (
    Buckets,
    EncodeTask,
    Scan,
    ScanTask,
    ShardTask,
    encode_result_path,
    encode_stripe,
    load_scan,
    load_shard,
    sample_texts,
    scan_file,
    shard_result_path,
    write_bucket,
)
from data.progress import explain_full_disk, print_summary, stage
from data.shard_writer import ShardAddress, WrittenShard, publish_dataset
from data.shards import SPLITS, Dataset, Split, token_dtype_for
from data.tokenizer_train import publish_folder, train_tokenizer
from data.vocab import Tokenizer, tokenizer_files

__all__ = ["PrepareConfig", "prepare"]

STRIPE_BYTES = 8 << 20  # of a file on disk: the size of an encoding task
MAX_STRIPES = 64  # each stripe reads the whole file, and decodes its own records only
MIN_SAMPLE_BYTES = 4096  # of one file


@dataclass
class _Job:
    """One run of `prepare`: what the stages share."""

    config: PrepareConfig
    root: Path
    files: list[InputFile]
    seconds: dict[str, float]  # stage -> seconds of this run

    @property
    def work(self) -> str:
        return str(self.root / WORK_FOLDER)

    @property
    def sources(self) -> list[str]:
        return sorted(self.config.sources)


def prepare(config: PrepareConfig) -> Path:
    """Make the dataset that `config` describes, or finish it; returns its folder.

    ValueError, before any work is lost, when: the input is missing, damaged, of an unknown kind or not
    UTF-8; the folder holds something else, or is being worked on; no document would be held out, or none
    left; the text does not support the vocabulary; the disk is full (run again when there is room).
    ChildProcessError: a worker was killed. With several processes the caller's main module is imported
    anew in each worker, so a script must guard its own work by `if __name__ == "__main__"`.
    """
    root = Path(config.output)
    files, notes = find_files(config.sources)
    plan = make_plan(config, files)
    with locked_folder(root), explain_full_disk(root):
        if enter_folder(root, plan):
            shutil.rmtree(root / WORK_FOLDER, ignore_errors=True)
            Dataset.open(root)
            print(f"{root} is finished already, from the same text with the same options.")
            return root
        for note in notes:
            print(note)
        _carry_out(_Job(config, root, files, {}))
    return root


def _carry_out(job: _Job) -> None:
    try:
        scans = _scan(job)
        _check_splits(job, scans)
        tokenizer = _make_tokenizer(job)
    except ValueError:
        abandon_folder(job.root)  # text or options will change: the plan must not stand in the way
        raise
    buckets = _count_buckets(job, scans)
    encoded = _encode(job, tokenizer, buckets)
    written = _write_shards(job, tokenizer, buckets)
    _publish(job, tokenizer, written)
    print_summary(job.root, scans, encoded, job.seconds)


def _scan(job: _Job) -> list[Scan]:
    """Stage 1: one Scan per file. ValueError with all that is wrong in any of them."""
    tasks = [
        ScanTask(
            file=file,
            index=index,
            work=job.work,
            options=job.config.read_options,
            seed=job.config.seed,
            heldout_fraction=job.config.heldout_fraction,
            sample_bytes=size,
        )
        for index, (file, size) in enumerate(zip(job.files, _sample_shares(job), strict=True))
    ]
    scans = {task.index: scan for task in tasks if (scan := load_scan(job.work, task.index))}
    waiting = [task for task in tasks if task.index not in scans]
    with stage(job.seconds, "scan", sum(file.nbytes for file in job.files), "B") as bar:
        bar.update(sum(task.file.nbytes for task in tasks if task.index in scans))
        for task, scan in run_tasks(scan_file, waiting, job.config.num_processes):
            scans[task.index] = scan
            bar.update(task.file.nbytes)
    problems = [problem for task in tasks for problem in scans[task.index].problems]
    if problems:
        raise ValueError(capped("text that cannot be used:", problems))
    return [scans[task.index] for task in tasks]


def _sample_shares(job: _Job) -> list[int]:
    """Bytes of the tokenizer's sample that each file gives.

    Half of the sample is parted equally among the sources, so that small ones are heard, half by size.
    """
    if job.config.tokenizer is not None:
        return [0] * len(job.files)
    sizes = {s: sum(f.nbytes for f in job.files if f.source == s) for s in job.sources}
    total = sum(sizes.values())
    shares = []
    for file in job.files:
        by_size = file.nbytes / total
        equally = file.nbytes / sizes[file.source] / len(sizes)
        share = int(job.config.tokenizer_sample_bytes * (by_size + equally) / 2)
        shares.append(max(MIN_SAMPLE_BYTES, share))
    return shares


def _totals(job: _Job, scans: list[Scan], source: str, split: Split) -> tuple[int, int]:
    """(documents, bytes of text) of one split of a source."""
    chosen = [s for f, s in zip(job.files, scans, strict=True) if f.source == source]
    return sum(s.num_documents[split] for s in chosen), sum(s.num_bytes[split] for s in chosen)


def _check_splits(job: _Job, scans: list[Scan]) -> None:
    """ValueError unless some document is held out and every source keeps some for training."""
    num_train = {source: _totals(job, scans, source, "train")[0] for source in job.sources}
    num_heldout = sum(_totals(job, scans, source, "heldout")[0] for source in job.sources)
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
    if num_heldout == 0:
        raise ValueError(
            f"none of {total} documents is held out at heldout_fraction {fraction}: raise it to about "
            f"{min(0.5, 5 / total):.2g}, or give more documents{hint}"
        )
    if bare := [source for source, count in num_train.items() if count == 0]:
        raise ValueError(
            f"no document is left to train on in source {', '.join(bare)} at heldout_fraction {fraction}: "
            f"lower it, or give more documents{hint}"
        )


def _make_tokenizer(job: _Job) -> Tokenizer:
    """Stage 2: train the tokenizer, or copy the one that was given."""
    folder = job.root / "tokenizer"
    with stage(job.seconds, "tokenizer", 1, "") as bar:
        if not folder.is_dir() and job.config.tokenizer is None:
            train_tokenizer(
                sample_texts(job.work, len(job.files)),
                folder,
                vocab_size=job.config.vocab_size,
                kind=job.config.tokenizer_kind,
            )
        elif not folder.is_dir():
            given, staged = Path(str(job.config.tokenizer)), temporary_name(folder)
            staged.mkdir()
            for name in tokenizer_files(given):
                shutil.copyfile(given / name, staged / name)
            publish_folder(staged, folder)
        bar.update()
    return Tokenizer.load(folder)


def _count_buckets(job: _Job, scans: list[Scan]) -> dict[str, Buckets]:
    """Shards of each source: one per `shard_text_bytes` of text begun, by split."""
    size = job.config.shard_text_bytes
    return {
        source: Buckets(
            *(math.ceil(_totals(job, scans, source, split)[1] / size) for split in SPLITS)
        )
        for source in job.sources
    }


def _num_stripes(file: InputFile) -> int:
    """From the file's size alone, so that the tasks are the same in every run."""
    return min(MAX_STRIPES, math.ceil(file.nbytes / STRIPE_BYTES))


def _encode(job: _Job, tokenizer: Tokenizer, buckets: dict[str, Buckets]) -> list[dict[str, int]]:
    """Stage 3: tokenise everything into spill files; the counts of each task."""
    config = job.config
    tasks = [
        EncodeTask(
            file=file,
            index=index,
            stripe=stripe,
            num_stripes=_num_stripes(file),
            work=job.work,
            options=config.read_options,
            seed=config.seed,
            heldout_fraction=config.heldout_fraction,
            buckets=buckets[file.source],
            tokenizer=str(tokenizer.folder),
            token_dtype=token_dtype_for(tokenizer.vocab_size),
        )
        for index, file in enumerate(job.files)
        for stripe in range(_num_stripes(file))
    ]
    done = [task for task in tasks if encode_result_path(task).is_file()]
    waiting = [task for task in tasks if not encode_result_path(task).is_file()]
    with stage(job.seconds, "encode", sum(file.nbytes for file in job.files), "B") as bar:
        bar.update(sum(task.file.nbytes // task.num_stripes for task in done))
        for task, _ in run_tasks(encode_stripe, waiting, config.num_processes):
            bar.update(task.file.nbytes // task.num_stripes)
    return [read_json(encode_result_path(task)) for task in tasks]


def _write_shards(
    job: _Job, tokenizer: Tokenizer, buckets: dict[str, Buckets]
) -> list[tuple[ShardAddress, WrittenShard]]:
    """Stage 4: one shard per bucket."""
    tasks = []
    for number, source in enumerate(job.sources):
        spills = tuple(
            (file.relative, index, stripe)
            for index, file in enumerate(job.files)
            if file.source == source
            for stripe in range(_num_stripes(file))
        )
        for split, count in zip(SPLITS, buckets[source], strict=True):
            tasks += [
                ShardTask(
                    address=ShardAddress(source, number, split, shard),
                    root=str(job.root),
                    work=job.work,
                    spills=spills,
                    buckets=buckets[source],
                    block_tokens=job.config.block_tokens,
                    token_dtype=token_dtype_for(tokenizer.vocab_size),
                    vocab_size=tokenizer.vocab_size,
                )
                for shard in range(count)
            ]
    waiting = [task for task in tasks if not shard_result_path(task).is_file()]
    with stage(job.seconds, "shards", len(tasks), "") as bar:
        bar.update(len(tasks) - len(waiting))
        for _ in run_tasks(write_bucket, waiting, job.config.num_processes):
            bar.update()
    loaded = [(task.address, load_shard(task)) for task in tasks]
    return [(address, shard) for address, shard in loaded if shard is not None]


def _publish(
    job: _Job, tokenizer: Tokenizer, written: list[tuple[ShardAddress, WrittenShard]]
) -> None:
    """Stage 5: block table and manifest. With them the dataset is complete, and .work goes."""
    counts = {
        split: sum(
            (shard.token_counts for address, shard in written if address.split == split),
            np.zeros(tokenizer.vocab_size, dtype=np.int64),
        )
        for split in SPLITS
    }
    if bare := [split for split in SPLITS if not counts[split].any()]:
        raise ValueError(
            f"the documents of {' and '.join(bare)} hold nothing but control characters"
        )
    facts: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "token_dtype": token_dtype_for(tokenizer.vocab_size),
        "block_tokens": job.config.block_tokens,
        "tokenizer": {
            "digest": tokenizer.digest,
            "kind": tokenizer.kind,
            "special_ids": tokenizer.special_ids,
        },
        "seed": job.config.seed,
        "heldout_fraction": job.config.heldout_fraction,
        "unigram_entropy_nats": unigram_entropy(counts["train"]),
        "context_free_loss_nats": context_free_loss(
            counts["train"], tokenizer.vocab_size - len(tokenizer.special_ids)
        ),
        "heldout_unigram_nats": unigram_cross_entropy(counts["train"], counts["heldout"]),
    }
    publish_dataset(job.root, facts, job.sources, written)
    shutil.rmtree(job.work)
