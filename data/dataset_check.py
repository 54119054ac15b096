"""A dataset's folder in, everything that is wrong with it out: every byte is read."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from data.block_table import map_table, row_problems
from data.files import TEMPORARY_MARK
from data.manifest import (
    TOKENIZER_FILES,
    TOTALS,
    read_manifest,
    shard_entries,
    shard_problems,
    table_problems,
)
from data.pool import run_tasks
from data.shards import INDEX_MEMBER, SPLITS, Dataset, meta_path, shard_path

MAX_BLOCK_PROBLEMS = 5  # told of one shard


@dataclass(frozen=True)
class ShardCheck:
    """One shard, and what manifest and block table say of it."""

    root: str
    path: str
    meta: str
    digest: str  # xxh3_128 of the file
    rows: tuple[int, ...]  # of the block table


def dataset_problems(root: Path, num_processes: int) -> list[str]:
    """All that is wrong with a dataset in a local folder, one line each; [] for a sound one.

    ValueError when there is no manifest that could be compared with.
    """
    path = root / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{root} has no manifest.json: no complete dataset is there")
    raw, manifest = read_manifest(path)
    problems = table_problems(root, manifest) + shard_problems(root, manifest)
    problems += _foreign_files(root, manifest)
    if any(problem.startswith("blocks.npy") for problem in problems):
        return [
            *problems,
            "the blocks of the shards were not looked at: that needs a sound blocks.npy",
        ]
    dataset = _dataset(root, manifest, raw)
    problems += row_problems(dataset.blocks, manifest) + _total_problems(dataset)
    checks = [check for check in _checks(dataset) if (root / check.path).is_file()]
    found = {check: lines for check, lines in run_tasks(check_shard, checks, num_processes)}
    return problems + [line for check in checks for line in found[check]]


def _dataset(root: Path, manifest: dict[str, Any], raw: bytes) -> Dataset:
    """Opened without the checks of Dataset.open, which stop at the first kind of damage."""
    return Dataset(root, manifest, xxhash.xxh3_128_hexdigest(raw), map_table(root))


def _checks(dataset: Dataset) -> Iterator[ShardCheck]:
    for source, splits in dataset.manifest["sources"].items():
        for split in SPLITS:
            rows = dataset.block_indices(split, source)
            shards = dataset.blocks["shard"][rows]
            entries = {entry["path"]: entry for entry in splits[split]["shards"]}
            for shard in np.unique(shards).tolist():
                path = shard_path(source, split, shard)
                if path in entries:
                    mine = tuple(rows[shards == shard].tolist())
                    meta = meta_path(source, split, shard)
                    yield ShardCheck(str(dataset.root), path, meta, entries[path]["xxh3"], mine)


def _total_problems(dataset: Dataset) -> list[str]:
    """Sums of the manifest that the block table does not give; shards that only one of the two names."""
    problems = []
    for source, splits in dataset.manifest["sources"].items():
        for split in SPLITS:
            rows = dataset.blocks[dataset.block_indices(split, source)]
            for name in TOTALS:
                found, said = int(rows[name].sum(dtype=np.int64)), splits[split][name]
                if found != said:
                    problems.append(
                        f"{source} {split}: {name} is {said} in the manifest, {found} in blocks.npy"
                    )
            named = {entry["path"] for entry in splits[split]["shards"]}
            used = {shard_path(source, split, n) for n in np.unique(rows["shard"]).tolist()}
            problems += [f"{path} has no block in blocks.npy" for path in sorted(named - used)]
            problems += [f"{path} is not in the manifest" for path in sorted(used - named)]
    return problems


def _foreign_files(root: Path, manifest: dict[str, Any]) -> list[str]:
    """Files that belong to no part of the dataset, and metadata that is missing."""
    shards = {entry["path"] for entry in shard_entries(manifest)}
    metas = {
        path.replace(f"/{split}/", "/meta/", 1).removesuffix(".tar") + ".jsonl.zst"
        for path in shards
        for split in SPLITS
        if f"/{split}/" in path
    }
    known = {"manifest.json", "blocks.npy", *shards, *metas}
    known |= {f"tokenizer/{name}" for name in TOKENIZER_FILES}
    problems = [f"{path} is missing" for path in sorted(metas) if not (root / path).is_file()]
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() or name in known or ("/" not in name and name.startswith("prepare")):
            continue
        left_over = TEMPORARY_MARK in name or name.startswith(".")
        what = (
            "was left over by a command that was stopped" if left_over else "does not belong here"
        )
        problems.append(f"{name} {what}")
    return problems


def check_shard(check: ShardCheck) -> list[str]:
    """What is wrong with one shard: its bytes, blocks, index member and metadata."""
    root = Path(check.root)
    dataset = _dataset(root, json.loads((root / "manifest.json").read_bytes()), b"")
    rows = dataset.blocks[list(check.rows)]
    problems = _byte_problems(root / check.path, check, rows)
    for index in check.rows:
        if len(problems) >= MAX_BLOCK_PROBLEMS:
            break
        try:
            dataset.read_block(index)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if (root / check.meta).is_file():
        problems += _meta_problems(root / check.meta, check, rows)
    return problems


def _byte_problems(path: Path, check: ShardCheck, rows: np.ndarray) -> list[str]:
    """The digest of the file, and the member at its end that tells whether it is whole."""
    whole, inner = xxhash.xxh3_128(), xxhash.xxh3_128()
    ends = np.cumsum(rows["nbytes"], dtype=np.int64)
    problems = []
    if not np.array_equal(rows["offset"], ends - rows["nbytes"]):
        problems.append(f"{check.path}: blocks.npy does not say that its blocks are back to back")
    with open(path, "rb") as file:
        for size in rows["nbytes"].tolist():
            data = file.read(size)
            whole.update(data)
            inner.update(data)
        ending = file.read()
        whole.update(ending)
    if whole.hexdigest() != check.digest:
        problems.append(f"{check.path}: xxh3 is {whole.hexdigest()}, manifest says {check.digest}")
    try:
        with tarfile.open(fileobj=io.BytesIO(ending)) as tar:
            member = tar.extractfile(INDEX_MEMBER)
            index = json.loads(member.read()) if member is not None else {}
    except (tarfile.TarError, KeyError, ValueError) as error:
        return [*problems, f"{check.path}: no {INDEX_MEMBER} member after the last block: {error}"]
    expected = {"shard": path.stem, "num_blocks": len(rows), "digest": inner.hexdigest()}
    problems += [
        f"{check.path}: {INDEX_MEMBER} says {name} {index.get(name)!r}, found {value!r}"
        for name, value in expected.items()
        if index.get(name) != value
    ]
    if len(ending) % tarfile.BLOCKSIZE:
        problems.append(f"{check.path}: ends in the middle of a tar record")
    return problems


def _meta_problems(path: Path, check: ShardCheck, rows: np.ndarray) -> list[str]:
    """Documents, tokens and sentences of the metadata against the block table."""
    found = dict.fromkeys(TOTALS, 0)
    try:
        with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as lines:
            for line in io.BufferedReader(lines, 1 << 20):  # pyright: ignore[reportArgumentType]
                entry = json.loads(line)
                found["num_documents"] += 1
                found["num_tokens"] += entry["num_tokens"]
                found["num_sentences"] += entry["num_sentences"]
    except (zstandard.ZstdError, ValueError, KeyError) as error:
        return [f"{check.meta} is damaged: {error}"]
    return [
        f"{check.meta}: {name} is {found[name]}, {said} in blocks.npy"
        for name in TOTALS
        if found[name] != (said := int(rows[name].sum(dtype=np.int64)))
    ]
