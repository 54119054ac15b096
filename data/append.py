"""A finished dataset and texts of new sources in, the dataset with these sources out.

The old shards stay as they are. Only manifest.json and blocks.npy are replaced, both at once: at every moment
the folder holds the old dataset or the new one.
"""

import os
import shutil
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.documents import ReadOptions
from data.files import read_json, remove_temporaries, sync_folder, write_array, write_json
from data.inputs import capped, find_files
from data.manifest import sealed
from data.plan import MANIFEST_FILE, PLAN_FILE, PrepareConfig, differences, locked_folder, make_plan
from data.prepare import check_splits, entropy_facts, neighbour_facts
from data.progress import explain_full_disk, print_summary, stage
from data.shard_writer import ShardAddress, WrittenShard, contents_of, table_facts, table_of
from data.shards import Dataset
from data.stages import Job, count_buckets, encode, scan, write_shards
from data.token_counts import TokenCounts, count_tasks, count_tokens, no_counts
from data.vocab import Tokenizer

WORK_FOLDER = ".work-append"
TABLES_FOLDER = ".tables"  # there while manifest.json and blocks.npy are being replaced
TABLES = (MANIFEST_FILE, "blocks.npy")
OWN_OPTIONS = {field.name for field in fields(ReadOptions)}  # may differ from the dataset's


def append(config: PrepareConfig) -> Path:
    """Add the sources of `config` to the dataset in `config.output`, or finish that; returns its folder.

    Tokenizer and options are the dataset's own; only how files are read is told anew. ValueError: no
    finished dataset there; a source that it holds already; an option that is not the dataset's; and what
    `prepare` says of text that cannot be used.
    """
    root = Path(config.output)
    files, notes = find_files(config.sources)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder: there is no dataset to add to")
    with locked_folder(root), explain_full_disk(root):
        finish_replacing(root)
        dataset = Dataset.open(root)
        config = _with_options_of(dataset, config)
        plan = make_plan(config, files)
        plan["options"]["tokenizer"] = dataset.manifest["tokenizer"]["digest"]
        plan_path = root / f"prepare-{'+'.join(sorted(config.sources))}.json"
        if _is_appended(dataset, config, plan, plan_path):
            shutil.rmtree(root / WORK_FOLDER, ignore_errors=True)
            print(f"{root} holds {', '.join(sorted(config.sources))} already, from the same text.")
            return root
        for note in notes:
            print(note)
        _enter(root, plan)
        work = str(root / WORK_FOLDER)
        job = Job(config, root, files, work, len(dataset.sources), {})
        _carry_out(job, dataset, plan_path, plan)
    return root


def _with_options_of(dataset: Dataset, config: PrepareConfig) -> PrepareConfig:
    """The config with all that decides the dataset's bytes as it was for the old sources."""
    made: dict[str, Any] = read_json(dataset.root / PLAN_FILE)["options"]
    defaults = {f.name: f.default for f in fields(PrepareConfig) if f.default is not MISSING}
    asked, problems = asdict(config), []
    for name, value in made.items():
        if name in OWN_OPTIONS or asked[name] in (value, defaults[name]):
            continue
        problems.append(f"{name} of the dataset is {value!r}, and cannot be {asked[name]!r}")
    if problems:
        raise ValueError(capped(f"{dataset.root} is added to with its own options:", problems))
    kept = {
        name: made[name]
        for name in ("block_tokens", "heldout_fraction", "seed", "shard_text_bytes", "word_starts")
    }
    return replace(config, tokenizer=str(dataset.root / "tokenizer"), lowercase=False, **kept)


def _is_appended(
    dataset: Dataset, config: PrepareConfig, plan: dict[str, Any], plan_path: Path
) -> bool:
    """ValueError when the dataset holds one of the sources, but not from this."""
    held = sorted(set(config.sources) & set(dataset.sources))
    if not held:
        return False
    reasons = ["they were not added by such a command"]
    if plan_path.is_file():
        reasons = differences(read_json(plan_path), plan)
    if not reasons and len(held) == len(config.sources):
        return True
    raise ValueError(
        capped(f"{dataset.root} holds {', '.join(held)} already:", reasons)
        + "\nGive the new text another source name."
    )


def _enter(root: Path, plan: dict[str, Any]) -> None:
    """Write the plan into the work folder, or check the one that is there."""
    path = root / WORK_FOLDER / PLAN_FILE
    remove_temporaries(root)
    if not path.is_file():
        write_json(path, plan)
    elif lines := differences(read_json(path), plan):
        raise ValueError(
            capped(f"adding something else to {root} was begun:", lines)
            + f"\nGive what was given before, or delete {path.parent} to give that up."
        )


def _carry_out(job: Job, dataset: Dataset, plan_path: Path, plan: dict[str, Any]) -> None:
    try:
        scans = scan(job)
        check_splits(job, scans)
    except ValueError:
        shutil.rmtree(job.work)  # the text will change: the plan must not stand in the way
        raise
    tokenizer = Tokenizer.load(job.root / "tokenizer", job.config.word_starts)
    buckets = count_buckets(job, scans)
    encoded = encode(job, scans, tokenizer, buckets)
    written, counts = write_shards(job, scans, tokenizer, buckets)
    counts = _count_old_tokens(job, dataset) | counts
    write_json(plan_path, plan)
    facts = entropy_facts(counts, tokenizer.vocab_size - len(tokenizer.special_ids))
    blocks = np.concatenate([dataset.blocks, table_of(written)])
    sources = {"sources": [*dataset.sources, *job.sources]}
    facts |= neighbour_facts(job, dataset.manifest | sources, blocks)
    _publish(job, dataset, facts, written)
    shutil.rmtree(job.work)
    print_summary(job.root, scans, encoded, job.seconds)


def _count_old_tokens(job: Job, dataset: Dataset) -> TokenCounts:
    """The tokens of the old shards: the manifest's entropies are over all sources."""
    counts = no_counts(dataset.sources, dataset.vocab_size)
    tasks = count_tasks(dataset)
    with stage(job.seconds, "count", len(tasks), "") as bar:
        for task, found in job.run(count_tokens, tasks):
            counts[task.source, task.split] += found
            bar.update()
    return counts


def _publish(
    job: Job,
    dataset: Dataset,
    facts: dict[str, Any],
    written: list[tuple[ShardAddress, WrittenShard]],
) -> None:
    """Write both tables anew, the old rows first, and put them in the place of the old ones."""
    folder = job.root / TABLES_FOLDER / "new"
    table = folder / "blocks.npy"
    write_array(table, np.concatenate([dataset.blocks, table_of(written)]))
    manifest = {
        **dataset.manifest,
        **facts,
        "sources": {**dataset.manifest["sources"], **contents_of(job.sources, written)},
        "blocks": table_facts(table),
    }
    write_json(folder / MANIFEST_FILE, sealed(manifest))
    _replace_tables(job.root)


def _replace_tables(root: Path) -> None:
    """Both names first lead through one link to the old files; turning that link changes both at once."""
    tables = root / TABLES_FOLDER
    (tables / "old").mkdir()
    for name in TABLES:
        os.link(root / name, tables / "old" / name)
    _point(tables / "now", "old")
    for name in TABLES:
        _point(root / name, f"{TABLES_FOLDER}/now/{name}")
    _point(tables / "now", "new")
    finish_replacing(root)


def _point(link: Path, target: str) -> None:
    """Make `link` a link to `target`, in one step."""
    temporary = link.with_name(f"{link.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync_folder(link.parent)


def finish_replacing(root: Path) -> None:
    """Give both tables their names as plain files again, whichever they are. Nothing, if they are."""
    tables = root / TABLES_FOLDER
    for name in TABLES:
        if (root / name).is_symlink():
            temporary = root / f"{name}.link"
            temporary.unlink(missing_ok=True)
            os.link((root / name).resolve(), temporary)
            os.replace(temporary, root / name)
        (root / f"{name}.link").unlink(missing_ok=True)
    if tables.is_dir():
        sync_folder(root)
        shutil.rmtree(tables)
