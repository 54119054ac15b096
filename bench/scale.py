"""A preset in; what each of 8 to 4,096 ranks reads, holds, writes and exchanges out, and what breaks first.

    python -m bench.scale configs/large_lamb.yaml --phase 1 --mfu 0.4

Nothing is run: the numbers come from a block table without blocks (`data.rehearsal`), the formats' own sizes
and the cost model of `cloze plan`. The global batch is the preset's, raised to a multiple of the ranks.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.block_table import BLOCK_DTYPE
from data.layout import Layout, reader_memory
from data.rehearsal import imagined_dataset
from launcher.cost_model import DEVICES, Links, exchange_of, exchange_seconds, step_time
from launcher.memory_plan import Rank, Zero, memory_of, optimizer_numbers, parameters_of
from launcher.plan import flops_of, rank_of
from launcher.tables import bytes_text, text_table
from model.flops import peak_flops
from trainer.config import RunConfig, load_config
from trainer.phases import Settings, settings_at

RANKS = tuple(8 << doublings for doublings in range(10))  # 8 to 4,096
STAGES = (1, 2, 3)
FP32_BYTES = 4
SAMPLE_BLOCKS = 10_000  # whose mean and largest stand for all


@dataclass(frozen=True)
class Machine:
    """What the ranks run on, as far as it is not the ranks' number."""

    device: str
    mfu: float
    links: Links
    disk_bytes_per_second: float  # of one rank that writes to the shared filesystem


@dataclass(frozen=True)
class Scaled:
    """One number of ranks. Bytes of one rank, unless it says otherwise."""

    num_ranks: int
    refused: str  # why the preset itself cannot be dealt to so many; empty where it can
    lanes_per_rank: int
    first_blocks: int  # read by a rank before its first step
    data_memory: int
    checkpoint_part: int
    exchange: dict[int, int]  # ZeRO stage -> sent in a step
    exchange_share: dict[int, float]  # of a step's time, if nothing of it hides behind computing
    memory: dict[int, int]  # ZeRO stage -> peak of the device
    step_seconds: float  # computing alone


def scaled(
    config: RunConfig,
    settings: Settings,
    num_ranks: int,
    machine: Machine,
    vocab: int,
    table: np.ndarray,
) -> Scaled:
    """The same steps by `num_ranks`: batch and lanes are raised to what so many can share."""
    wanted = Layout(
        num_ranks, settings.data.num_workers, 1, settings.global_batch_size, settings.data.num_lanes
    )
    batch = -(-settings.global_batch_size // num_ranks) * num_ranks
    micro = max(
        size for size in range(1, settings.micro_batch_size + 1) if batch // num_ranks % size == 0
    )
    lanes = settings.data.num_lanes if not wanted.problems() else num_ranks
    layout = Layout(num_ranks, settings.data.num_workers, micro, batch, lanes)
    fitting = settings._replace(global_batch_size=batch, micro_batch_size=micro)
    ranks = {
        stage: rank_of(config, fitting, Zero(stage), vocab, num_ranks, machine.device)
        for stage in STAGES
    }
    speed = machine.mfu * (peak_flops(machine.device) or 0)
    any_rank = ranks[STAGES[0]]
    compute = step_time(
        any_rank, flops_of(any_rank), flops_per_second=speed, links=machine.links,
        memory_per_second=DEVICES[machine.device][1],
    ).compute  # fmt: skip
    exchange = {stage: exchange_of(rank).total for stage, rank in ranks.items()}
    seconds = {s: exchange_seconds(sent, num_ranks, machine.links) for s, sent in exchange.items()}
    return Scaled(
        num_ranks,
        "; ".join(wanted.problems()),
        layout.lanes_per_rank,
        layout.lanes_per_rank * int(table["nbytes"].mean()),
        reader_memory(table, layout, settings.data.sequence_length, settings.data.packing).rank,
        checkpoint_bytes(any_rank) // num_ranks,
        exchange,
        {stage: value / (value + compute) for stage, value in seconds.items()},
        {stage: memory_of(rank).peak for stage, rank in ranks.items()},
        compute,
    )


def checkpoint_bytes(rank: Rank) -> int:
    """Of all ranks' parts: fp32 masters and the optimizer's state."""
    parameters = parameters_of(rank.model, rank.vocab_size)
    return FP32_BYTES * (parameters.total + round(optimizer_numbers(parameters, rank.optim)))


def report(rows: list[Scaled], config: RunConfig, machine: Machine, vocab: int, blocks: int) -> str:
    total = parameters_of(config.model, vocab).total
    header = ["ranks", "lanes", "first blocks", "data in memory", "checkpoint part",
              *(f"ZeRO {s} sends" for s in STAGES), *(f"share {s}" for s in STAGES), "step, s"]  # fmt: skip
    cells = [
        [
            f"{row.num_ranks:,}{'*' if row.refused else ''}", str(row.lanes_per_rank),
            bytes_text(row.first_blocks), bytes_text(row.data_memory), bytes_text(row.checkpoint_part),
            *(bytes_text(row.exchange[s]) for s in STAGES), *(f"{row.exchange_share[s]:.0%}" for s in STAGES),
            f"{row.step_seconds:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    lines = [
        f"{total / 1e6:,.0f} M parameters, {machine.device} at MFU {machine.mfu:.0%}, "
        f"{blocks:,} blocks ({blocks * (1 << 18) / 1e12:.2f} T tokens)",
        f"every node reads {bytes_text(blocks * BLOCK_DTYPE.itemsize)} of block table at its start",
        "", text_table(header, cells), "", *plot(rows), "", *breaks(rows, total, machine),
    ]  # fmt: skip
    return "\n".join(lines)


def plot(rows: list[Scaled]) -> list[str]:
    """A bar for each stage: the exchange's share of a step, if none of it hides."""
    lines = []
    for row in rows:
        for stage in STAGES:
            ranks = row.num_ranks if stage == STAGES[0] else ""
            lines.append(
                f"{ranks:>5}  ZeRO {stage}  |{'#' * round(50 * row.exchange_share[stage])}"
            )
    return lines


def breaks(rows: list[Scaled], num_parameters: int, machine: Machine) -> list[str]:
    """What stops being good, from the fewest ranks on."""
    found = [(row.num_ranks, f"refused: {row.refused}") for row in rows if row.refused][:1]
    for stage in STAGES:
        found += [
            (
                row.num_ranks,
                f"ZeRO {stage}: the exchange takes longer than computing, if none of it is hidden",
            )
            for row in rows
            if row.exchange_share[stage] > 0.5
        ][:1]
    whole = FP32_BYTES * num_parameters
    found += [
        (
            row.num_ranks,
            f"rank 0 writes hf/ ({whole / machine.disk_bytes_per_second:.0f} s) for longer than its part",
        )
        for row in rows
        if row.checkpoint_part < whole
    ][:1]
    size = rows[0].checkpoint_part * rows[0].num_ranks + whole
    found.append(
        (
            1,
            f"rank 0 alone hashes a checkpoint before it is used: {size / machine.disk_bytes_per_second:.0f} s",
        )
    )
    found.sort(key=lambda entry: entry[0])
    return [f"from {number:,} rank{'s' * (number > 1)} on: {what}" for number, what in found]


def main() -> None:
    parser = argparse.ArgumentParser(description="what each of many ranks does")
    add = parser.add_argument
    add("preset", type=Path)
    add("--phase", type=int, default=0, help="of the preset: 0 is the first")
    add("--vocab-size", type=int, default=32_768)
    add(
        "--blocks",
        type=int,
        default=3_814_697,
        help="of 2^18 tokens; the default is a trillion tokens",
    )
    add("--device", default="NVIDIA H100 80GB HBM3")
    add("--mfu", type=float, default=0.4)
    add("--link-gb-per-second", type=float, default=200, help="of a rank, within a node")
    add("--node-link-gb-per-second", type=float, default=50, help="of a node of 8")
    add("--disk-gb-per-second", type=float, default=1, help="of one rank")
    options = parser.parse_args()
    config = load_config(options.preset, [])
    firsts = [0, *(phase.first_step for phase in config.phases)]
    settings = settings_at(config, firsts[options.phase])
    links = Links(8, options.link_gb_per_second * 1e9, options.node_link_gb_per_second * 1e9)
    machine = Machine(options.device, options.mfu, links, options.disk_gb_per_second * 1e9)
    table = imagined_dataset(SAMPLE_BLOCKS).blocks
    rows = [scaled(config, settings, ranks, machine, options.vocab_size, table) for ranks in RANKS]
    print(report(rows, config, machine, options.vocab_size, options.blocks))


if __name__ == "__main__":
    main()
