"""A planned run and its dataset in, findings out: lanes, ranks, epochs, memory, disk, evaluation."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.diagnosis import Finding, Limits, finding
from data.layout import lane_readers, reader_memory, readings_per_window
from data.rehearsal import Streams, estimated_rows
from data.shards import Dataset
from launcher.tables import bytes_text
from launcher.target import Target
from trainer.checkpoint_files import checkpoints_folder, list_checkpoints, read_state
from trainer.config import RunConfig
from trainer.files import free_bytes, size_of
from trainer.phases import Settings

# Lanes for each block of a stream. Above 1 the lanes begin several epochs at once, so the first ones are
# not read in turn; with 16 lanes in each block, every batch is drawn from the same few documents.
LANES_PER_BLOCK = Limits(1.0 + 1e-9, 16.0)
FEW_BLOCKS = 8  # no number of lanes above this reads them in turn
# Of a source in the whole run. Devlin et al. 2019 trained for about 40 epochs, Liu et al. 2019 too.
EPOCHS = Limits(50, float("inf"))
MEMORY = Limits(0.25, 0.8)  # of this machine's, by the data of the ranks that share it
MIN_HELDOUT_ROWS = 100  # some 1,900 masked tokens: an accuracy is known to one percent


class Planned(NamedTuple):
    """What the checks need."""

    target: Target
    dataset: Dataset
    steps: int | None
    ranks_per_node: int


def judge_plan(planned: Planned) -> list[Finding]:
    """All that can be said of the run before it is started. ValueError when weights name no source."""
    target = planned.target
    findings = [_division(target, step, settings) for step, settings in target.all_settings]
    possible = all(found.verdict == "OK" for found in findings)
    streams = Streams.of(planned.dataset, target.settings.data.weights)
    findings += _lanes(target, streams)
    if possible:
        findings.append(_shared_lanes(target))
        findings.append(_memory(planned, streams))
    findings += _epochs(planned)
    findings += _heldout(planned)
    if target.run is not None:
        findings.append(_disk(target.run, planned.dataset.vocab_size))
        findings += _tokenizer_of_run(target.run, planned.dataset)
    return findings


def _division(target: Target, step: int, settings: Settings) -> Finding:
    layout = target.layout_of(settings, target.num_ranks)
    problems = layout.problems()
    found = (
        f"{layout.num_ranks} ranks, {layout.num_lanes} lanes, {layout.global_batch_size} rows a step, "
        f"micro-batches of {layout.micro_batch_size}"
    )
    of = f"from step {step} on" if target.run and target.run.phases else "the run"
    verdict = "PROBLEM" if problems else "OK"
    advice = "; ".join(problems) + ". Training would be refused: change one of these numbers."
    return finding("division", of, found, verdict, advice)


def _lanes(target: Target, streams: Streams) -> list[Finding]:
    findings = []
    num_lanes = target.layout.num_lanes
    for name, blocks in zip(streams.names, streams.blocks, strict=True):
        fitting = 1 << (len(blocks).bit_length() - 1)
        tokens = float(streams.table["num_tokens"][blocks].mean())
        smaller = max(1024, 1 << int(np.log2(tokens * len(blocks) / num_lanes)))
        found = f"{len(blocks):,} blocks: up to {fitting:,} lanes read them in turn"
        verdict = LANES_PER_BLOCK.verdict(num_lanes / len(blocks))
        if target.lanes_given:
            found = f"{len(blocks):,} blocks for {num_lanes:,} lanes"
        else:
            verdict = "OK" if len(blocks) >= FEW_BLOCKS else "WARNING"
        advice = (
            f"A lane reads one block at a time, so {num_lanes:,} lanes would read each of {len(blocks):,} "
            f"blocks {num_lanes / len(blocks):.1f} times at once, each time cut otherwise: the same text comes "
            f"again before the first epoch is over. Set data.num_lanes to {fitting} or fewer, or prepare with "
            f"--block-tokens {smaller}."
        )
        findings.append(finding("blocks against lanes", name, found, verdict, advice))
    return findings


def _shared_lanes(target: Target) -> Finding:
    layout = target.layout
    times = readings_per_window(layout)
    lanes = int(lane_readers(layout).sum(axis=1).max())
    often = "once" if times == 1 else f"{times:g} times"
    found = f"{layout.lanes_per_rank} lanes a rank, {lanes} a worker; each block is read {often}"
    needed = layout.num_ranks * layout.micro_batch_size * max(1, layout.num_workers)
    advice = (
        "Workers of a rank share lanes: each reads their blocks and plans their rows, and most of that is "
        f"thrown away. A number of lanes that is a multiple of {needed} (ranks x workers x micro-batch), or "
        "fewer workers, gives every worker lanes of its own."
    )
    return finding("lanes of workers", "the run", found, "WARNING" if times > 1 else "OK", advice)


def _memory(planned: Planned, streams: Streams) -> Finding:
    """Of the data alone: blocks, plans and rows of open lanes, over the ranks of one machine."""
    target, data = planned.target, planned.target.settings.data
    used = streams.table[np.concatenate(streams.blocks)]
    memory = reader_memory(used, target.layout, data.sequence_length, data.packing)
    ranks = min(target.num_ranks, planned.ranks_per_node)
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = (
        f"{bytes_text(memory.lane)} a lane, {bytes_text(memory.rank)} a rank, "
        f"{bytes_text(memory.rank * ranks)} for {ranks} ranks of {bytes_text(here)} here"
    )
    advice = (
        "Every open lane holds its block in memory. Fewer lanes, workers that share none, or smaller "
        "--block-tokens take less."
    )
    verdict = MEMORY.verdict(memory.rank * ranks / here)
    return finding("memory of the data", "the run", found, verdict, advice)


def _epochs(planned: Planned) -> list[Finding]:
    """How often each source is read: exact windows by weight, rows by estimate."""
    target, totals = planned.target, {}
    for (first, settings), end in zip(target.all_settings, _ends(planned), strict=True):
        streams = Streams.of(planned.dataset, settings.data.weights)
        data, batch = settings.data, settings.global_batch_size
        blocks = list(zip(streams.names, streams.blocks, streams.shares, strict=True))
        mean_rows = sum(
            share * estimated_rows(streams.table[b], data.sequence_length, data.packing).mean()
            for _, b, share in blocks
        )
        for name, rows, share in blocks:
            one = mean_rows * len(rows) / share / batch  # steps
            done, steps = totals.get(name, (0.0, one))
            totals[name] = (done + (max(0, end - first) / one if end is not None else 0), steps)
    findings = []
    for name, (epochs, steps) in totals.items():
        found = f"one is about {steps:,.0f} steps of {target.settings.global_batch_size:,} rows"
        if planned.steps is not None:
            found = f"{epochs:,.2f} in {planned.steps:,} steps; {found}"
        advice = (
            "The run reads the same text over and over, long past what is known to help. Fewer steps, more "
            "text, or a smaller weight for this source."
        )
        findings.append(finding("epochs", name, found, EPOCHS.verdict(epochs), advice))
    return findings


def _ends(planned: Planned) -> list[int | None]:
    """The first step after each phase; None for the last where the number of steps is not known."""
    firsts = [step for step, _ in planned.target.all_settings]
    return [*firsts[1:], planned.steps]


def _heldout(planned: Planned) -> list[Finding]:
    dataset, run = planned.dataset, planned.target.run
    data = planned.target.settings.data
    blocks = dataset.block_indices("heldout")
    rows = int(
        estimated_rows(dataset.blocks[blocks], data.sequence_length, data.packing).sum()
        if len(blocks)
        else 0
    )
    wanted = run.eval_rows if run else MIN_HELDOUT_ROWS
    found = f"about {rows:,} rows" + (f" for eval_rows {wanted:,}" if run else "")
    advice = (
        f"Evaluation would use {rows:,} rows, and its losses be uncertain. Prepare with a larger "
        "--heldout-fraction" + (", or lower eval_rows." if run else ".")
    )
    size = finding("held-out split", "all", found, "WARNING" if rows < wanted else "OK", advice)
    bare = [name for name in dataset.sources if not len(dataset.block_indices("heldout", name))]
    advice = (
        "No document of them is held out: how well the model does on them will not be seen. Prepare with a "
        "larger --heldout-fraction, or give these sources more documents."
    )
    found = (
        f"none of {', '.join(bare)}"
        if bare
        else f"{len(dataset.sources)} of {len(dataset.sources)}"
    )
    verdict = "WARNING" if bare else "OK"
    return [size, finding("held-out sources", "all", found, verdict, advice)]


class Room(NamedTuple):
    """What the checkpoints of a run take: one; those that are kept and one more, less what is there already."""

    num_parameters: int
    one_bytes: int
    needed_bytes: int


def room_for_checkpoints(run: RunConfig, vocab_size: int) -> Room:
    # imports torch: not where only a dataset is looked at
    from model.weights import parameter_shapes
    from trainer.optim import state_numel

    shapes = parameter_shapes(run.model, vocab_size)
    parameters = sum(shape.numel() for shape in shapes.values())
    # in fp32: the masters, the optimizer's state, and the weights in hf/
    one = 4 * (2 * parameters + state_numel(shapes, run.optim))
    there = checkpoints_folder(Path(run.dir))
    taken = size_of(there) if there.is_dir() else 0
    return Room(parameters, one, max(0, one * (run.keep_checkpoints + 1) - taken))


def _disk(run: RunConfig, vocab_size: int) -> Finding:
    room = room_for_checkpoints(run, vocab_size)
    folder = Path(run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = free_bytes(folder)
    found = (
        f"{room.num_parameters:,} parameters: {bytes_text(room.one_bytes)} a checkpoint, "
        f"{bytes_text(room.needed_bytes)} for {run.keep_checkpoints} + 1; {bytes_text(free)} free in {folder}"
    )
    advice = "The run would stop at a checkpoint that does not fit. Free some space, or give another dir=."
    verdict = "PROBLEM" if free < room.needed_bytes else "OK"
    return finding("disk", "the run", found, verdict, advice)


def _tokenizer_of_run(run: RunConfig, dataset: Dataset) -> list[Finding]:
    """A run that is continued must keep its tokenizer."""
    checkpoints = list_checkpoints(Path(run.dir))
    if not checkpoints:
        return []
    phases = read_state(checkpoints[-1])["phases"]
    trained, now = phases[-1]["tokenizer_digest"], dataset.manifest["tokenizer"]["digest"]
    advice = (
        f"{checkpoints[-1]} was trained with tokenizer {trained}; these ids mean other tokens. Prepare the "
        "text with the run's tokenizer (cloze prepare --tokenizer), or start a new run (dir=)."
    )
    verdict = "OK" if trained == now else "PROBLEM"
    return [finding("tokenizer of the run", "the run", f"dataset's is {now}", verdict, advice)]
