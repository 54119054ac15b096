"""A dataset or a preset in, a table of what is well and what is not out, each ill with cause and remedy.

    cloze doctor DATASET [--ranks 8 --workers 2 --steps 100000]
    cloze doctor PRESET [key=value ...] --ranks 8
    cloze doctor --cluster PRESET [key=value ...]      the machines of a job: launcher/cluster_doctor.py

Exit status 1 where something is a PROBLEM.
"""

import argparse
import textwrap

import numpy as np

from data.diagnosis import Finding, judge_near_copies, judge_rows, judge_source
from data.inspection import (
    NEAR_TOKENS,
    PLANNED_TOKENS,
    SAMPLE_TOKENS,
    byte_ids,
    sampled_blocks,
    source_tokens,
    survey_rows,
    survey_sources,
)
from data.near_copies import near_copies
from data.shards import Dataset
from launcher.doctor_plan import Planned, judge_plan
from launcher.tables import text_table
from launcher.target import Target, add_target_arguments, read_target

VERDICTS = ("PROBLEM", "WARNING", "OK")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="dataset (folder or URL), or preset (.yaml)")
    add_target_arguments(parser)
    add = parser.add_argument
    add("--steps", type=int, help="optimizer steps (default: the preset's)")
    add(
        "--ranks-per-node",
        type=int,
        default=8,
        help="ranks that share a machine's memory (default: %(default)s)",
    )
    add(
        "--sample-tokens",
        type=int,
        default=SAMPLE_TOKENS,
        help="training text to look at (default: %(default)s)",
    )
    add("--verify", action="store_true", help="read every shard and compare its digest")
    add(
        "--cluster",
        action="store_true",
        help="examine the machines of this job instead, by one task on each",
    )
    add(
        "--wait-seconds",
        type=float,
        default=120.0,
        help="for all of them to come, with --cluster (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Print what was found. 0, or 1 where something is a PROBLEM. ValueError, OSError."""
    for name in ("steps", "ranks_per_node", "sample_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is below 1")
    if options.cluster:
        from launcher import cluster_doctor  # which prints a table with what is above

        return cluster_doctor.run(options)
    target = read_target(options)
    place = target.settings.data.path
    findings, dataset = _completeness(place, options.verify)
    if dataset is not None:
        findings += _text(dataset, options.sample_tokens)
        findings += _rows(dataset, target)
        steps = options.steps or (target.run.steps if target.run else None)
        findings += _plan(Planned(target, dataset, steps, options.ranks_per_node))
    print(report_text(place, findings))
    return int(any(found.verdict == "PROBLEM" for found in findings))


def _completeness(place: str, verify: bool) -> tuple[list[Finding], Dataset | None]:
    """Manifest, block table, tokenizer and sizes of shards; with `verify` all their bytes."""
    try:
        dataset = Dataset.open(place)
    except ValueError as error:
        if "is damaged" not in str(error):  # no dataset at all
            raise
        return [_damage(str(error))], None
    num_shards = sum(
        len(entry["shards"])
        for source in dataset.manifest["sources"].values()
        for entry in source.values()
    )
    found = f"{num_shards} shards, {len(dataset.blocks):,} blocks; tokenizer as in the manifest"
    if not verify:
        return [Finding("completeness", "all", found)], dataset
    try:
        dataset.verify()
    except ValueError as error:
        return [_damage(str(error))], dataset
    return [Finding("completeness", "all", f"{found}; every byte read")], dataset


def _damage(message: str) -> Finding:
    first, *rest = message.splitlines()
    advice = (
        f"{first} {'; '.join(line.strip() for line in rest)}. A copy was not finished, or files were changed "
        "since. Copy the dataset again, or prepare it again."
    )
    found = f"{len(rest) or 1} of its files are not as the manifest says"
    return Finding("completeness", "all", found, "PROBLEM", advice)


def _text(dataset: Dataset, sample_tokens: int) -> list[Finding]:
    """What the text of every source looks like, from a sample."""
    unknown, in_bytes = dataset.special_ids["[UNK]"], byte_ids(dataset.root / "tokenizer")
    findings = [
        found
        for survey in survey_sources(dataset, sample_tokens)
        for found in judge_source(survey, unknown, in_bytes)
    ]
    train = dataset.block_indices("train")
    num_tokens = int(dataset.blocks["num_tokens"][train].sum(dtype=np.int64))
    wanted = min(NEAR_TOKENS, sample_tokens) / max(1, num_tokens)
    near = [
        sampled_blocks(dataset, name, "train", int(wanted * size))
        for name, size in source_tokens(dataset).items()
    ]
    return [*findings, judge_near_copies(near_copies(dataset, np.concatenate(near)), num_tokens)]


def _rows(dataset: Dataset, target: Target) -> list[Finding]:
    """Rows of a few blocks of every source, at every row length of the run."""
    findings, seen = [], set()
    for _, settings in target.all_settings:
        data = settings.data
        if data.sequence_length in seen:
            continue
        seen.add(data.sequence_length)
        for name in dataset.sources:
            blocks = sampled_blocks(dataset, name, "train", PLANNED_TOKENS)
            if len(blocks):
                survey = survey_rows(
                    dataset, blocks, data.sequence_length, data.packing, target.seed
                )
                findings += judge_rows(survey, f"{name}, {data.sequence_length}", data.packing)
    return findings


def _plan(planned: Planned) -> list[Finding]:
    try:
        return judge_plan(planned)
    except ValueError as error:  # weights of a source that is not there
        return [Finding("mixture", "the run", "cannot be made", "PROBLEM", str(error))]


def report_text(place: str, findings: list[Finding]) -> str:
    """The table, then a paragraph for everything that is not well, the worst first."""
    rows = [[found.verdict, found.check, found.of, found.found] for found in findings]
    parts = [f"{place}\n", text_table(["verdict", "check", "of", "found"], rows), ""]
    for verdict in VERDICTS[:2]:
        parts += [
            f"{verdict}: {found.check} ({found.of}): {found.found}.\n{_wrapped(found.advice)}\n"
            for found in findings
            if found.verdict == verdict
        ]
    counts = {v: sum(found.verdict == v for found in findings) for v in VERDICTS}
    parts.append(", ".join(f"{counts[v]} {v}" for v in VERDICTS))
    return "\n".join(parts)


def _wrapped(text: str) -> str:
    """Lines of at most 100 characters, indented; a path is never broken."""
    return textwrap.fill(
        text,
        100,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
