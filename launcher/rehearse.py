"""A dataset or preset and numbers of ranks in, what every rank and worker will read out, without reading.

cloze rehearse DATASET --ranks 512 --workers 8 --resume-ranks 256
cloze rehearse PRESET [key=value ...] --ranks 64 --steps 10000
cloze rehearse --blocks 1000000 --ranks 512 --workers 8      a dataset that is not there yet
"""

import argparse
import json
from typing import NamedTuple

import numpy as np

from data.layout import (
    SLOT_BYTES,
    check_owners,
    lane_owners,
    lane_readers,
    possible_ranks,
    reader_memory,
    readings_digest,
    readings_per_window,
    rows_at_once,
)
from data.rehearsal import (
    Streams,
    Windows,
    coverage,
    epoch_rows,
    imagined_dataset,
    simulate,
    state_after,
)
from data.shards import Dataset
from launcher.tables import bytes_text, text_table
from launcher.target import Target, add_target_arguments, read_target

RANK_TOKENS_PER_SECOND = 100_000  # where --tokens-per-second does not say
BUSY = 4  # times the mean: a step that opens so many blocks is told of


class Rehearsal(NamedTuple):
    """One simulated pass, and what it was simulated for."""

    target: Target
    streams: Streams
    num_rows: int  # of the run that were simulated
    windows: Windows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", nargs="?", help="dataset (folder or URL), or preset (.yaml); none with --blocks"
    )
    add_target_arguments(parser)
    add = parser.add_argument
    add("--blocks", type=int, help="rehearse a dataset of so many blocks that is not there yet")
    add("--steps", type=int, help="optimizer steps to rehearse (default: one epoch)")
    add(
        "--resume-ranks",
        type=int,
        nargs="+",
        default=[],
        help="numbers of ranks that the run may go on with, half-way",
    )
    add(
        "--tokens-per-second",
        type=float,
        help=f"of the whole run (default: {RANK_TOKENS_PER_SECOND:,} a rank)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the rehearsal. 0: all is read once and every resume is possible; 1: not so. ValueError."""
    _check(options)
    if options.target is None:
        options.target = "no.dataset"
        target, dataset = read_target(options), imagined_dataset(options.blocks)
    else:
        target = read_target(options)
        dataset = Dataset.open(target.settings.data.path)
    if problems := _layout_problems(target, target.num_ranks):
        raise ValueError("; ".join(problems))
    data = target.settings.data
    streams = Streams.of(dataset, data.weights)
    num_rows = (
        options.steps * target.settings.global_batch_size
        if options.steps
        else epoch_rows(streams, data)
    )
    rehearsal = Rehearsal(target, streams, num_rows, simulate(streams, data, target.seed, num_rows))
    print(_headline(rehearsal, dataset.place if options.blocks is None else "an imagined dataset"))
    covered, coverage_text = _coverage(rehearsal)
    resumes, resume_text = _resumes(rehearsal, options.resume_ranks)
    speed = options.tokens_per_second or RANK_TOKENS_PER_SECOND * target.num_ranks
    for text in (
        coverage_text,
        _balance(rehearsal),
        _memory(rehearsal),
        _reads(rehearsal, speed),
        resume_text,
        _state(rehearsal),
    ):
        print("\n" + text)
    return 0 if covered and resumes else 1


def _check(options: argparse.Namespace) -> None:
    problems = []
    if (options.target is None) == (options.blocks is None):
        problems.append("give a dataset or preset, or --blocks, and not both")
    for name in ("blocks", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            problems.append(f"--{name} {getattr(options, name)} is below 1")
    if options.tokens_per_second is not None and not options.tokens_per_second > 0:
        problems.append(f"--tokens-per-second {options.tokens_per_second} is not above 0")
    problems += [f"--resume-ranks {n} is below 1" for n in options.resume_ranks if n < 1]
    if problems:
        raise ValueError("; ".join(problems))


def _layout_problems(target: Target, num_ranks: int) -> list[str]:
    """What stands against so many ranks, in any phase of the preset."""
    problems = []
    for step, settings in target.all_settings:
        found = target.layout_of(settings, num_ranks).problems()
        problems += [f"{problem}{f' from step {step} on' if step else ''}" for problem in found]
    return problems


def _headline(rehearsal: Rehearsal, place: str) -> str:
    target, data = rehearsal.target, rehearsal.target.settings.data
    table, layout = rehearsal.streams.table, target.layout
    used = np.concatenate(rehearsal.streams.blocks)
    tokens = int(table["num_tokens"][used].sum(dtype=np.int64))
    steps = -(-rehearsal.num_rows // layout.global_batch_size)
    lines = [
        f"{place}: {len(used):,} training blocks, {tokens:,} tokens. No block is read.",
        f"{layout.num_ranks:,} ranks x {layout.num_workers} workers, {layout.num_lanes:,} lanes, "
        f"{layout.global_batch_size:,} rows a step in micro-batches of {layout.micro_batch_size}, "
        f"rows of {data.sequence_length}, seed {target.seed}.",
        f"Rehearsed: {steps:,} steps = {rehearsal.num_rows:,} rows, {len(rehearsal.windows.lane):,} "
        "readings of blocks. Rows per block are estimated.",
    ]
    if len(target.all_settings) > 1:
        first = [f"{step:,}" for step, _ in target.all_settings[1:]]
        lines.append(
            f"The preset changes settings at step {', '.join(first)}; these are the first."
        )
    return "\n".join(lines)


def _coverage(rehearsal: Rehearsal) -> tuple[bool, str]:
    """Every block of a source's first epoch is in one lane's list; how far the rehearsed steps come."""
    windows, rows, good = rehearsal.windows, [], True
    for index, found in enumerate(coverage(rehearsal.streams, rehearsal.target.seed)):
        mine = windows.source == index
        first = len(np.unique(windows.block[mine & (windows.epoch == 0)]))
        read_once = found.num_blocks - found.num_missing - found.num_repeated
        last = int(windows.epoch[mine].max()) if mine.any() else 0
        good &= not (found.num_missing or found.num_repeated)
        counts = [found.num_blocks, read_once, found.num_missing, found.num_repeated, first]
        rows.append([found.source, *(f"{n:,}" for n in counts), str(last + 1)])
    header = ["source", "blocks", "once", "missing", "repeated", "opened", "epochs begun"]
    text = "Coverage: how often the first epoch of a source reads each of its blocks\n"
    notes = [
        f"\n{name} has {len(blocks):,} blocks for {rehearsal.target.layout.num_lanes:,} lanes: the lanes "
        "begin several epochs of it at once. Fewer lanes, or smaller blocks, would read it in turn."
        for name, blocks in zip(rehearsal.streams.names, rehearsal.streams.blocks, strict=True)
        if len(blocks) < rehearsal.target.layout.num_lanes
    ]
    return good, text + text_table(header, rows) + "".join(notes)


def _balance(rehearsal: Rehearsal) -> str:
    layout, windows = rehearsal.target.layout, rehearsal.windows
    owner = lane_owners(layout)[windows.lane]
    blocks = np.bincount(owner, minlength=layout.num_ranks)
    tokens_of = rehearsal.streams.table["num_tokens"][windows.block].astype(np.float64)
    tokens = np.bincount(owner, weights=tokens_of, minlength=layout.num_ranks)
    rows = [
        [
            name,
            f"{values.min():,.0f}",
            f"{values.mean():,.1f}",
            f"{values.max():,.0f}",
            f"{values.max() / values.mean():.4f}",
        ]
        for name, values in (("blocks opened", blocks), ("tokens in them", tokens))
    ]
    return "Balance: every rank gives as many rows; what it opens for them\n" + text_table(
        ["per rank", "least", "mean", "most", "most / mean"], rows
    )


def _memory(rehearsal: Rehearsal) -> str:
    layout, data = rehearsal.target.layout, rehearsal.target.settings.data
    used = np.concatenate(rehearsal.streams.blocks)
    memory = reader_memory(
        rehearsal.streams.table[used], layout, data.sequence_length, data.packing
    )
    readers = lane_readers(layout)
    rows = [
        ["open lane", "1", bytes_text(memory.lane)],
        ["worker", str(int(readers.sum(axis=1).max())), bytes_text(memory.worker)],
        ["rank", str(int(readers.sum())), bytes_text(memory.rank)],
    ]
    at_once = rows_at_once(data.sequence_length)
    text = (
        "Memory: an open lane holds its block, 56 B a pair, 8 B a row, and "
        f"{at_once} assembled rows of up to {SLOT_BYTES} B a slot;\na rank also 2 micro-batches a worker. "
        "Python and torch themselves are not counted.\n"
    )
    text += text_table(["per", "open lanes", "most"], rows)
    times = readings_per_window(layout)
    if times > 1:
        wanted = layout.micro_batch_size * layout.num_workers
        text += (
            f"\nLanes are shared by {times:g} workers of a rank, each of which reads their blocks: a rank has "
            f"{layout.lanes_per_rank} lanes, its workers make micro-batches of {layout.micro_batch_size} in "
            f"turn. With lanes in multiples of {wanted} a rank "
            f"({wanted * layout.num_ranks:,} in all), none is shared."
        )
    return text


def _reads(rehearsal: Rehearsal, tokens_per_second: float) -> str:
    """Reads and bytes a second at a steady pace, at the start, and in the busiest step after it."""
    layout, windows = rehearsal.target.layout, rehearsal.windows
    table, times = rehearsal.streams.table, readings_per_window(layout)
    nbytes = float(table["nbytes"][windows.block].mean())
    tokens = float(table["num_tokens"][windows.block].mean())
    pace = tokens_per_second / tokens * times
    per_step = np.bincount(windows.opened // layout.global_batch_size)
    begun = -(-layout.num_lanes // layout.global_batch_size)
    later = per_step[begun:]
    peak = int(later.max()) if len(later) else 0
    start = min(layout.num_lanes, int(per_step[:begun].sum())) * times
    rows = [
        [
            f"at {tokens_per_second:,.0f} tokens/s",
            f"{pace:,.3f} /s",
            f"{bytes_text(pace * nbytes)}/s",
        ],
        [
            "of that, per rank",
            f"{pace / layout.num_ranks:,.5f} /s",
            f"{bytes_text(pace * nbytes / layout.num_ranks)}/s",
        ],
        ["to open all lanes", f"{start:,.0f}", bytes_text(start * nbytes)],
        ["busiest step later", f"{peak * times:,.0f}", bytes_text(peak * times * nbytes)],
    ]
    often = "once" if times == 1 else f"by {times:g} workers of its rank"
    text = f"Reads: blocks of {bytes_text(nbytes)}, each read {often}\n"
    text += text_table(["when", "reads", "bytes"], rows)
    if len(later) and peak > max(BUSY, BUSY * float(later.mean())):
        text += (
            f"\nLanes that began together end their blocks together: the busiest step opens {peak:,} blocks, "
            f"the mean one {later.mean():,.2f}."
        )
    return text


def _resumes(rehearsal: Rehearsal, resume_ranks: list[int]) -> tuple[bool, str]:
    """Half of the rows on the ranks asked for, the rest on others: the same readings, in the same order?"""
    target, windows = rehearsal.target, rehearsal.windows
    batch = target.layout.global_batch_size
    half = rehearsal.num_rows // batch // 2 * batch
    expected = readings_digest(windows, [(0, target.layout)])
    rows, reasons, good = [], [], True
    for ranks in [target.num_ranks, *resume_ranks]:
        layout = target.layout_of(target.settings, ranks)
        problems = _layout_problems(target, ranks) or check_owners(layout)
        if problems:
            verdict, count, digest = "NOT POSSIBLE", "-", "-"
            reasons.append(f"\n{ranks:,} ranks: {'; '.join(problems)}")
        else:
            count, digest = readings_digest(windows, [(0, target.layout), (half, layout)])
            verdict = "the same" if (count, digest) == expected else "DIFFERENT"
            count = f"{count:,}"
        good &= verdict == "the same"
        rows.append([f"{ranks:,}", verdict, str(count), digest])
    possible = sorted(
        set.intersection(
            *(
                set(possible_ranks(target.layout_of(settings, 1)))
                for _, settings in target.all_settings
            )
        )
    )
    text = (
        f"Resume at row {half:,}: readings of all ranks, brought into the run's order\n"
        + text_table(["ranks", "readings are", "number", "digest"], rows)
    )
    text += f"{''.join(reasons)}\nPossible numbers of ranks: {', '.join(map(str, possible))}"
    return good, text


def _state(rehearsal: Rehearsal) -> str:
    lanes = rehearsal.target.layout.num_lanes
    state = state_after(rehearsal.windows, rehearsal.num_rows, lanes, len(rehearsal.streams.names))
    nbytes = len(json.dumps(state.to_json()))
    return f"State: {bytes_text(nbytes)} of JSON in a checkpoint, {nbytes / lanes:.1f} B a lane."
