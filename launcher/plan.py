"""`cloze plan PRESET`: a run's shape and a machine in; parameters, memory, time and disk out, before it runs.

The prediction for the preset's own setting goes into the run's folder, as plan.json; the run compares it with
what it measures (`trainer.prediction`).
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.objectives import MASKED, PAIRED, SHUFFLED
from data.shards import Dataset
from launcher.activation_memory import Batch
from launcher.cost_model import DEVICES, Links, StepTime, exchange_of, recomputed, step_time
from launcher.measured_speed import calibrated, seconds_of_run
from launcher.memory_plan import Memory, Rank, Zero, memory_of, parameters_of, zero_of
from launcher.plan_text import plan_text
from model.config import Checkpointing
from model.flops import attended_pairs, flops_per_step, peak_flops
from trainer.config import RunConfig, load_config
from trainer.ds import read_deepspeed_json
from trainer.files import write_atomically
from trainer.phases import Settings, phase_end, settings_at
from trainer.prediction import Prediction, to_json
from trainer.run_folder import PLAN_FILE

OFFERED = (Zero(0), Zero(1), Zero(2), Zero(3), Zero(2, True), Zero(3, True))
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
MICRO_BATCHES = (0.5, 1, 2, 4)  # times the preset's own
FORETOLD = (
    *MASKED,
    *PAIRED,
    *SHUFFLED,
    "cpc",
)  # tasks that leave the encoder and its rows as they are
USABLE = 0.9  # of a device's memory: the rest is torch's and NCCL's, and lost between blocks


@dataclass(frozen=True)
class Machine:
    device: str  # as torch.cuda.get_device_name() calls it, or cpu
    memory: float  # bytes of a rank
    peak_flops: float | None  # of a rank, per second
    memory_per_second: float  # bytes
    links: Links


@dataclass(frozen=True)
class Planned:
    """One phase of the run in one setting."""

    first_step: int
    num_steps: int
    rank: Rank
    memory: Memory
    needed: int  # bytes of the device: on CPUs everything
    fits: bool
    flops: float  # of a step, over all ranks
    num_tokens: int  # of a step
    time: StepTime | None  # None: no speed is known


@dataclass(frozen=True)
class Plan:
    run: RunConfig
    vocab_size: int
    num_ranks: int
    machine: Machine
    speed: float | None  # FLOP/s of a rank
    speed_from: str
    phases: list[Planned]  # in the preset's own setting
    offers: list[Planned]  # the dearest phase, in others
    best: Planned | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    add = parser.add_argument
    add("--ranks", type=int, default=1, help="training processes (default: %(default)s)")
    add("--ranks-per-node", type=int, default=8, help="(default: %(default)s)")
    add("--device", help="as torch names it, e.g. 'NVIDIA H200', or cpu (default: what is here)")
    add("--memory-gb", type=float, help="of a rank's device (default: that of --device)")
    add("--peak-tflops", type=float, help="dense bf16 peak of a rank (default: that of --device)")
    add("--memory-gb-per-second", type=float, help="of a rank (default: of --device; cpu: 10)")
    add("--mfu", type=float, help="share of the peak that is reached while computing, e.g. 0.4")
    add("--step-seconds", type=float, help="of this preset on these ranks, measured")
    add("--measured-run", type=Path, help="folder of a run on such devices, to take the speed from")
    add("--link-gb-per-second", type=float, default=200, help="of a rank (default: %(default)s)")
    add("--node-link-gb-per-second", type=float, default=25, help="of a node (default: 25)")
    add("--vocab-size", type=int, help="(default: the dataset's)")
    add("--json", action="store_true", help="for programs")
    add("--no-write", action="store_true", help="leave no plan.json in the run's folder")


def run(options: argparse.Namespace) -> int:
    """Print the plan and write it into the run. 0; 1 where the preset's setting does not fit. ValueError."""
    _check(options)
    plan = make_plan(options)
    written = None
    if not options.no_write:
        written = Path(plan.run.dir) / PLAN_FILE
        written.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(written, json.dumps(to_json(predictions(plan)), indent=1) + "\n")
    if options.json:
        print(json.dumps(as_json(plan), indent=1))
    else:
        print(plan_text(plan))
        print(f"\nWritten: {written}" if written else "\nNothing written.")
    return 0 if all(phase.fits for phase in plan.phases) else 1


def _check(options: argparse.Namespace) -> None:
    problems = [
        f"--{name.replace('_', '-')} {value} is not above 0"
        for name, value in vars(options).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0
    ]
    speeds = ("mfu", "step_seconds", "measured_run")
    if sum(getattr(options, name) is not None for name in speeds) > 1:
        problems.append(
            "give one of --mfu, --step-seconds and --measured-run: each tells the speed"
        )
    if options.mfu is not None and options.mfu > 1:
        problems.append(f"--mfu {options.mfu} is above 1: it is a share, e.g. 0.4")
    if problems:
        raise ValueError("; ".join(problems))


def make_plan(options: argparse.Namespace) -> Plan:
    config = load_config(options.preset, options.overrides)
    machine = _machine(options)
    vocab_size = options.vocab_size or _vocab_size(config)
    zero = zero_of(read_deepspeed_json(Path(config.deepspeed)))
    firsts = [0, *(phase.first_step for phase in config.phases)]
    ranks = [rank_of(config, settings_at(config, step), zero, vocab_size, options.ranks, machine.device)
             for step in firsts]  # fmt: skip
    speed, speed_from = _speed(options, ranks[0], machine)
    phases = [
        _planned(rank, machine, speed, step, phase_end(config, step) - step)
        for rank, step in zip(ranks, firsts, strict=True)
    ]
    dearest = max(phases, key=lambda phase: phase.rank.batch.sequence_length)
    offers = _offers(dearest, machine, speed)
    best = min((offer for offer in offers if offer.fits), key=_cost, default=None)
    return Plan(config, vocab_size, options.ranks, machine, speed, speed_from, phases, offers, best)


def _machine(options: argparse.Namespace) -> Machine:
    """ValueError where what is not given is not known of the device."""
    device = options.device or _this_device()
    memory, memory_speed = DEVICES.get(device, (None, None))
    if device == "cpu":
        here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory, memory_speed = here / min(options.ranks, options.ranks_per_node), 10e9
    if options.memory_gb:
        memory = options.memory_gb * 1e9
    if options.memory_gb_per_second:
        memory_speed = options.memory_gb_per_second * 1e9
    missing = [
        name
        for name, value in (("--memory-gb", memory), ("--memory-gb-per-second", memory_speed))
        if value is None
    ]
    if memory is None or memory_speed is None:
        raise ValueError(
            f"--device {device!r} is none of {', '.join(DEVICES)}, cpu: give {' and '.join(missing)} too"
        )
    peak = options.peak_tflops * 1e12 if options.peak_tflops else peak_flops(device)
    links = Links(
        options.ranks_per_node, options.link_gb_per_second * 1e9, options.node_link_gb_per_second * 1e9
    )  # fmt: skip
    return Machine(device, memory, peak, memory_speed, links)


def _this_device() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def _vocab_size(config: RunConfig) -> int:
    try:
        return Dataset.open(config.data.path, config.data.storage).vocab_size
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; to plan without the dataset, give --vocab-size") from None


def rank_of(
    config: RunConfig, settings: Settings, zero: Zero, vocab_size: int, num_ranks: int, device: str
) -> Rank:
    """ValueError when the batch does not divide, or there are tasks whose cost is not foretold."""
    if others := [task for task in config.model.tasks if task not in FORETOLD]:
        raise ValueError(
            f"cloze plan counts {', '.join(FORETOLD)}; what {', '.join(others)} cost is not foretold yet: "
            "plan with data.objectives={mlm+nsp: 1} for a lower bound"
        )
    slots = settings.micro_batch_size * num_ranks
    if settings.global_batch_size % slots:
        raise ValueError(
            f"global_batch_size {settings.global_batch_size} is not a multiple of micro_batch_size "
            f"{settings.micro_batch_size} x {num_ranks} ranks = {slots}"
        )
    data = settings.data
    kind = "cpu" if device == "cpu" else "cuda"
    batch = Batch(
        settings.micro_batch_size,
        data.sequence_length,
        data.masked_fraction,
        config.precision,
        kind,
    )
    accumulation = settings.global_batch_size // slots
    return Rank(config.model, vocab_size, config.optim, zero, batch, num_ranks, accumulation)


def _speed(options: argparse.Namespace, rank: Rank, machine: Machine) -> tuple[float | None, str]:
    """FLOP/s of a rank while it computes, and where that is known from."""
    if options.mfu is not None:
        if machine.peak_flops is None:
            raise ValueError(f"--mfu is a share of a peak, and that of {machine.device} is not known: "
                             "give --peak-tflops, or --step-seconds, or --measured-run")  # fmt: skip
        return options.mfu * machine.peak_flops, f"MFU {options.mfu:.0%}, as stated"
    if options.step_seconds is not None:
        speed = calibrated(
            rank, flops_of(rank), options.step_seconds, machine.memory_per_second, machine.links
        )
        return speed, f"a step of {options.step_seconds:g} s, as stated"
    if options.measured_run is not None:
        measured = seconds_of_run(options.measured_run, rank.vocab_size, machine.device, rank_of)
        speed = calibrated(measured.rank, flops_of(measured.rank), measured.step_seconds,
                           machine.memory_per_second, machine.links)  # fmt: skip
        return (
            speed,
            f"{options.measured_run}: {measured.step_seconds:.3g} s a step on {measured.rank.world_size}",
        )
    return None, "not known"


def flops_of(rank: Rank) -> int:
    """Of a step over all ranks, its rows full, each of one sequence (two segments)."""
    rows = rank.batch.micro_batch_size * rank.accumulation * rank.world_size
    lengths = np.full(rows, rank.batch.sequence_length)
    return flops_per_step(
        rank.model,
        rank.vocab_size,
        num_tokens=int(lengths.sum()),
        num_attended={window: attended_pairs(lengths, window) for window in rank.model.windows},
        num_labels={"mlm": round(int(lengths.sum()) * rank.batch.masked_fraction), "nsp": rows},
    )


def _planned(
    rank: Rank, machine: Machine, speed: float | None, first_step: int, num_steps: int
) -> Planned:
    memory, flops = memory_of(rank), flops_of(rank)
    needed = memory.total if machine.device == "cpu" else memory.peak
    tokens = rank.batch.num_tokens * rank.accumulation * rank.world_size
    time = None
    if speed is not None:
        time = step_time(
            rank, flops, flops_per_second=speed, memory_per_second=machine.memory_per_second,
            links=machine.links,
        )  # fmt: skip
    fits = needed <= USABLE * machine.memory
    return Planned(first_step, num_steps, rank, memory, needed, fits, flops, tokens, time)


def _offers(own: Planned, machine: Machine, speed: float | None) -> list[Planned]:
    """The same steps in other settings: as many rows, in other micro-batches."""
    rank, offers = own.rank, []
    rows = rank.batch.micro_batch_size * rank.accumulation
    sizes = [int(rank.batch.micro_batch_size * times) for times in MICRO_BATCHES]
    buckets = {"reduce_bucket_size": rank.zero.reduce_bucket_size}
    for zero in OFFERED:
        for checkpointing in CHECKPOINTING:
            for size in sizes:
                if size < 1 or rows % size:
                    continue
                every = 1 if checkpointing == "none" else rank.model.checkpoint_every
                other = replace(
                    rank,
                    model=replace(
                        rank.model, activation_checkpointing=checkpointing, checkpoint_every=every
                    ),
                    zero=replace(zero, **buckets),
                    batch=replace(rank.batch, micro_batch_size=size),
                    accumulation=rows // size,
                )
                offers.append(_planned(other, machine, speed, own.first_step, own.num_steps))
    return offers


def _cost(offer: Planned) -> tuple[Any, ...]:
    """The quickest first; where no speed is known, what computes twice, offloads or exchanges more is later."""
    rank = offer.rank
    exchanged = exchange_of(rank).total
    order = CHECKPOINTING.index(rank.model.activation_checkpointing)
    rest = (order, exchanged, rank.zero.stage, -rank.batch.micro_batch_size)
    if offer.time is not None:
        return (offer.time.exposed, *rest)
    return (rank.zero.offload_optimizer, recomputed(rank), *rest)


def predictions(plan: Plan) -> list[Prediction]:
    """Of the preset's own setting, phase by phase, as the trainer compares them."""
    return [
        Prediction(
            first_step=phase.first_step,
            world_size=plan.num_ranks,
            zero_stage=phase.rank.zero.stage,
            offload=phase.rank.zero.offload_optimizer,
            precision=phase.rank.batch.precision,
            activation_checkpointing=phase.rank.model.activation_checkpointing,
            micro_batch_size=phase.rank.batch.micro_batch_size,
            accumulation=phase.rank.accumulation,
            sequence_length=phase.rank.batch.sequence_length,
            device_type=phase.rank.batch.device_type,
            peak_bytes=phase.needed,
            step_seconds=None if phase.time is None else phase.time.exposed,
        )
        for phase in plan.phases
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that is printed, for programs: bytes, seconds, FLOPs."""
    return {
        "parameters": parameters_of(plan.run.model, plan.vocab_size).total,
        "ranks": plan.num_ranks,
        "machine": asdict(plan.machine),
        "flops_per_second": plan.speed,
        "phases": [_planned_json(phase) for phase in plan.phases],
        "offers": [_planned_json(offer) for offer in plan.offers],
        "best": None if plan.best is None else _planned_json(plan.best),
    }


def _planned_json(planned: Planned) -> dict[str, Any]:
    rank = planned.rank
    return {
        "first_step": planned.first_step,
        "num_steps": planned.num_steps,
        "zero": asdict(rank.zero),
        "micro_batch_size": rank.batch.micro_batch_size,
        "accumulation": rank.accumulation,
        "sequence_length": rank.batch.sequence_length,
        "activation_checkpointing": rank.model.activation_checkpointing,
        "memory": planned.memory._asdict(),
        "fits": planned.fits,
        "flops": planned.flops,
        "step_seconds": None if planned.time is None else asdict(planned.time),
        "exchanged_bytes": exchange_of(rank).total,
    }
