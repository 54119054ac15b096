"""The files of a corpus in, shards out: the three stages of `cloze prepare` whose tasks run side by side.

A task's files appear under their names only when complete, and their bytes depend on nothing but the plan. So
a job that was killed goes on where it stood, on any number of processes or machines.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.executors import run_on
from data.files import read_json
from data.inputs import InputFile, capped
from data.plan import PrepareConfig
from data.prepare_tasks import (
    Buckets,
    EncodeTask,
    ShardTask,
    encode_part,
    encode_result_path,
    load_shard,
    shard_result_path,
    write_bucket,
)
from data.progress import stage
from data.scan import Scan, ScanTask, load_scan, scan_file
from data.shard_writer import ShardAddress, WrittenShard
from data.shards import SPLITS, Split, token_dtype_for
from data.token_counts import TokenCounts, no_counts
from data.vocab import Tokenizer

PART_BYTES = 8 << 20  # of a file on disk: what an encoding task takes of a plain .jsonl
MAX_PARTS = 4096  # of all files: each shard opens the spill files of all parts
STRIPED_FILES = (
    64  # with so many files or more, one that cannot be read from its middle is one task
)
MAX_STRIPES = 16  # of such a file, if they are few: each stripe reads, and unpacks, the whole file
MIN_SAMPLE_BYTES = 4096  # of one file

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass
class Job:
    """One run of `prepare`: what the stages share."""

    config: PrepareConfig
    root: Path
    files: list[InputFile]
    work: str  # folder of what is only needed until the end
    first_source: int  # number of the first source in the manifest
    seconds: dict[str, float]  # stage -> seconds of this run

    @property
    def sources(self) -> list[str]:
        return sorted(self.config.sources)

    def run(
        self, function: Callable[[Task], Result], tasks: list[Task]
    ) -> Iterator[tuple[Task, Result]]:
        return run_on(self.config.executor, function, tasks, self.config.num_processes, self.work)

    def totals(self, scans: list[Scan], source: str, split: Split) -> tuple[int, int]:
        """(documents, bytes of text) of one split of a source."""
        chosen = [s for f, s in zip(self.files, scans, strict=True) if f.source == source]
        return sum(s.num_documents[split] for s in chosen), sum(s.num_bytes[split] for s in chosen)


def scan(job: Job) -> list[Scan]:
    """Stage 1: one Scan per file. ValueError with all that is wrong in any of them."""
    total = sum(file.nbytes for file in job.files)
    part_bytes = max(PART_BYTES, math.ceil(total / MAX_PARTS))
    tasks = [
        ScanTask(
            file=file,
            index=index,
            work=job.work,
            options=job.config.read_options,
            seed=job.config.seed,
            heldout_fraction=job.config.heldout_fraction,
            sample_bytes=size,
            part_bytes=part_bytes,
            num_stripes=_num_stripes(job, file),
        )
        for index, (file, size) in enumerate(zip(job.files, _sample_shares(job), strict=True))
    ]
    scans = {task.index: scan for task in tasks if (scan := load_scan(job.work, task.index))}
    waiting = [task for task in tasks if task.index not in scans]
    with stage(job.seconds, "scan", total, "B") as bar:
        bar.update(sum(task.file.nbytes for task in tasks if task.index in scans))
        for task, scan in job.run(scan_file, waiting):
            scans[task.index] = scan
            bar.update(task.file.nbytes)
    problems = [problem for task in tasks for problem in scans[task.index].problems]
    if problems:
        raise ValueError(capped("text that cannot be used:", problems))
    return [scans[task.index] for task in tasks]


def _num_stripes(job: Job, file: InputFile) -> int:
    """From the plan's files alone, so that the tasks are the same in every run."""
    if len(job.files) >= STRIPED_FILES:
        return 1
    return min(MAX_STRIPES, math.ceil(file.nbytes / PART_BYTES))


def _sample_shares(job: Job) -> list[int]:
    """Bytes of the sample for the tokenizer that each file gives.

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


def count_buckets(job: Job, scans: list[Scan]) -> dict[str, Buckets]:
    """Shards of each source: one per `shard_text_bytes` of text begun, by split."""
    size = job.config.shard_text_bytes
    return {
        source: Buckets(*(math.ceil(job.totals(scans, source, s)[1] / size) for s in SPLITS))
        for source in job.sources
    }


def encode(
    job: Job, scans: list[Scan], tokenizer: Tokenizer, buckets: dict[str, Buckets]
) -> list[dict[str, int]]:
    """Stage 3: tokenise everything into spill files; the counts of each task."""
    config = job.config
    tasks = [
        EncodeTask(
            file=file,
            index=index,
            part=part,
            number=number,
            work=job.work,
            options=config.read_options,
            seed=config.seed,
            heldout_fraction=config.heldout_fraction,
            buckets=buckets[file.source],
            tokenizer=str(tokenizer.folder),
            token_dtype=token_dtype_for(tokenizer.vocab_size),
            word_starts=config.word_starts,
        )
        for index, (file, scan) in enumerate(zip(job.files, scans, strict=True))
        for number, part in enumerate(scan.parts)
    ]
    done = [task for task in tasks if encode_result_path(task).is_file()]
    finished = {(task.index, task.number) for task in done}
    waiting = [task for task in tasks if (task.index, task.number) not in finished]
    with stage(job.seconds, "encode", sum(file.nbytes for file in job.files), "B") as bar:
        bar.update(sum(task.file.nbytes // len(scans[task.index].parts) for task in done))
        for task, _ in job.run(encode_part, waiting):
            bar.update(task.file.nbytes // len(scans[task.index].parts))
    return [read_json(encode_result_path(task)) for task in tasks]


def write_shards(
    job: Job, scans: list[Scan], tokenizer: Tokenizer, buckets: dict[str, Buckets]
) -> tuple[list[tuple[ShardAddress, WrittenShard]], TokenCounts]:
    """Stage 4: one shard per bucket. (shards without token counts, token counts over all shards)."""
    tasks = []
    for number, source in enumerate(job.sources, job.first_source):
        spills = tuple(
            (file.relative, index, part)
            for index, (file, scan) in enumerate(zip(job.files, scans, strict=True))
            if file.source == source
            for part in range(len(scan.parts))
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
        for _ in job.run(write_bucket, waiting):
            bar.update()
    written = []
    counts = no_counts(job.sources, tokenizer.vocab_size)
    for task in tasks:
        if (shard := load_shard(task)) is not None:
            counts[task.address.source, task.address.split] += shard.token_counts
            written.append((task.address, shard._replace(token_counts=shard.token_counts[:0])))
    return written, counts
